"""Adds the native kernels (`csrc/README.md`) to the package when GENGRAM_NATIVE=1; all else is in `setup.cfg`."""

import os
import platform
from pathlib import Path

from setuptools import setup

ARGUMENTS = ["-std=c++17", "-O3", "-fno-math-errno"]
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}


def native_kernels() -> dict:
    """Arguments of `setup` that build `gengram/operators/_native*.so`; needs PyTorch and a C++ compiler."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS if is_x86 else {"baseline": []}
    temporary = Path(".native-build")

    class Build(BuildExtension):
        """Compiles the kernels once per instruction set, and everything outside the checkout's `build` folder."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(temporary)
            if self.inplace:
                self.build_lib = str(temporary / "lib")
            self.force = True  # setuptools does not see what the sources include

        def build_extension(self, extension) -> None:
            for name, flags in sets.items():
                objects = self.compiler.compile(
                    ["csrc/cpu/kernels.cpp"],
                    output_dir=str(temporary / name),
                    extra_postargs=[*ARGUMENTS, *flags, f"-DGENGRAM_CAPABILITY={name}", "-Wno-psabi", "-fPIC"],
                )
                extension.extra_objects += objects
            super().build_extension(extension)

    extension = CppExtension(
        "gengram.operators._native",
        ["csrc/cpu/operators.cpp"],
        define_macros=[("GENGRAM_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=["-O2", "-fopenmp"],  # PyTorch's parallel_for is written with OpenMP
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=Build.with_options(use_ninja=False)))


setup(**native_kernels() if os.environ.get("GENGRAM_NATIVE") == "1" else {})
