"""Wheel, source distribution and checkout hold the same package."""

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]


def in_tree() -> dict[str, bytes]:
    """Every tracked file of the package's folders by its place in an installed package."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = dict(line.replace(" ", "").split("=") for line in setup["options"]["package_dir"].strip().splitlines())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = {}
    for package, folder in folders.items():
        for name in tracked:
            if name.startswith(f"{folder}/"):
                files[package.replace(".", "/") + name[len(folder) :]] = (ROOT / name).read_bytes()
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel and a source distribution of what is tracked, built without network."""
    folder = tmp_path_factory.mktemp("build")
    clone, dist = folder / "clone", folder / "dist"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:  # with the changes that are not committed yet
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).unlink(missing_ok=True)
            shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(clone)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder
    )  # the wheel is built from the source distribution
    assert done.returncode == 0, done.stdout + done.stderr
    return dist


def test_wheel_holds_what_the_tree_holds(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if not name.split("/")[0].endswith("-info")]
        files = {name: wheel.read(name) for name in names}
    expected = in_tree()
    assert sorted(files) == sorted(expected)
    for name, content in expected.items():
        assert files[name] == content, name


def test_source_distribution_can_be_built_again(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    for needed in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "modeling_gengram/modeling_gengram.py"):
        assert needed in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/arguments.h", "csrc/cuda/kernels.cu", "csrc/cuda/operators.cpp"} <= sources <= names


def test_installed_modules_are_those_of_the_tree():
    code = (
        "import gengram.configuration.configuration_gengram as c, gengram.modeling_gengram.modeling_gengram as m\n"
        "print(c.__file__, m.__file__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    for path, name in zip(
        done.stdout.split(),
        ("configuration/configuration_gengram.py", "modeling_gengram/modeling_gengram.py"),
        strict=True,
    ):
        assert Path(path).read_bytes() == (ROOT / name).read_bytes()
