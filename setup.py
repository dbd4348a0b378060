"""Adds the native kernels (`csrc/README.md`) to the package when GENGRAM_NATIVE=1; all else is in `setup.cfg`.

The CUDA kernels are among them where PyTorch is built for CUDA and there is an nvcc.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import setup

ARGUMENTS = ["-std=c++17", "-O3", "-fno-math-errno"]
INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": [],
}
# Ampere and Hopper, and a form that later GPUs translate for themselves.
CUDA_ARGUMENTS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "--threads", "0"]  # a thread for each GPU below
CUDA_CODE = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)] + ["-gencode=arch=compute_90,code=compute_90"]


def native_kernels() -> dict:
    """Arguments of `setup` that build `gengram/motif_memory/ways/_native*.so`; needs PyTorch and a C++ compiler."""
    import torch
    from torch.utils import cpp_extension

    is_x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS if is_x86 else {"baseline": []}
    temporary = Path(".native-build")
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    has_cuda = torch.version.cuda is not None and nvcc is not None

    class Build(cpp_extension.BuildExtension):
        """Compiles the kernels once per instruction set, and everything outside the checkout's `build` folder."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(temporary)
            if self.inplace:
                self.build_lib = str(temporary / "lib")
            self.force = True  # setuptools does not see what the sources include

        def build_extension(self, extension) -> None:
            tasks = [partial(self.compile_for_cpu, name, flags) for name, flags in sets.items()]
            tasks += [self.compile_for_cuda] if has_cuda else []
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # a compiler each
                extension.extra_objects += pool.map(lambda task: task(), tasks)
            super().build_extension(extension)

        def compile_for_cpu(self, name: str, flags: list[str]) -> str:
            arguments = [
                *ARGUMENTS,
                *flags,
                f"-DGENGRAM_CAPABILITY={name}",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                "-fPIC",
            ]
            folder = str(temporary / name)
            return self.compiler.compile(["csrc/cpu/kernels.cpp"], output_dir=folder, extra_postargs=arguments)[0]

        def compile_for_cuda(self) -> str:
            output = temporary / "cuda" / "kernels.o"
            output.parent.mkdir(parents=True, exist_ok=True)
            command = [nvcc, *CUDA_ARGUMENTS, *CUDA_CODE, "-c", "csrc/cuda/kernels.cu", "-o", str(output)]
            print(*command)
            subprocess.run(command, check=True)
            return str(output)

    # Apple's compiler has no OpenMP; without it PyTorch's parallel_for, which is written with it, takes one thread.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # Of a C++ library that is linked statically, which would mix with PyTorch's and crash.
    own_library = ["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
    sources = ["csrc/cpu/operators.cpp", *(["csrc/cuda/operators.cpp"] if has_cuda else [])]
    kind = cpp_extension.CUDAExtension if has_cuda else cpp_extension.CppExtension
    extension = kind(
        "gengram.motif_memory.ways._native",
        sources,
        define_macros=[("GENGRAM_TORCH_VERSION", f'"{torch.__version__}"')],
        extra_compile_args=["-O2", *openmp],
        extra_link_args=[*openmp, *own_library],
        py_limited_api=True,
    )
    return dict(
        ext_modules=[extension],
        cmdclass=dict(build_ext=Build.with_options(use_ninja=False)),
        options=dict(bdist_wheel=dict(py_limited_api="cp310")),  # one wheel for all versions of Python
    )


setup(**native_kernels() if os.environ.get("GENGRAM_NATIVE") == "1" else {})
