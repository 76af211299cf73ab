"""What a machine with CUDA and compilers but no network needs: fetched elsewhere, built there.

Used by gpu.py; the standard library alone, since nothing else need be there yet. ``fetch`` fills
a folder where there is an index: wheels of what Gemloom imports, the sources of ggml-python and of
llama-cpp-python (less what no build reads, which is most of it). ``build`` unpacks and compiles
them below that folder, with cmake and a C++ and a CUDA compiler from the machine; stopped and run
again it goes on. Each library brings a ggml of its own: theirs differ by a dozen releases, so that
neither could use the other's CUDA kernels.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

WHEELS = [  # what Gemloom imports to load, compute and measure, and llama_cpp to be imported
    "numpy>=1.26", "gguf>=0.17,<0.20", "pyyaml", "tokenizers>=0.21,<1", "jinja2>=3.1.6",
    "markupsafe", "typing-extensions", "rich>=13", "markdown-it-py", "mdurl", "pygments",
    "diskcache",
]  # fmt: skip
SOURCES = {"ggml-python": "0.0.45", "llama-cpp-python": "0.3.36"}
PACKAGES = {"ggml-python": "ggml", "llama-cpp-python": "llama_cpp"}  # what Python calls them
UNREAD = ("models", "docs", "tests", "media", "benches", "examples", "pocs", "gguf-py", "tools")
PLATFORMS = ["manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1"]
CUDA = [
    "-DGGML_CUDA=ON",
    "-DGGML_CUDA_GRAPHS=ON",  # off by default in ggml itself, on in llama.cpp
    "-DGGML_CUDA_FA_ALL_QUANTS=OFF",  # both sides' cells are f16, or q8_0 for K and V alike
    "-DGGML_CUDA_NCCL=OFF",  # several GPUs
    "-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON",  # toolkits may lie where no loader looks
]
DRIVERS = [
    f"{place}/libcuda.so.1" for place in ("/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu")
]
BLAS = "cublas_v2.h"
BLAS_HEADERS = {BLAS, "cublas.h", "cublas_api.h", "cublasLt.h", "cublasXt.h"}
PEER = ["-DLLAVA_BUILD=OFF", "-DLLAMA_OPENSSL=OFF"]  # no pictures, no downloads
MOST = 64 << 20  # bytes of the folder


class BuildError(Exception):
    """What failed, in a line."""


# --- where there is an index ----------------------------------------------------


def fetch(folder: Path, python: str, machine: str) -> int:
    """Fill the folder for such a Python ("3.12") and processor ("x86_64"); bytes of all.

    BuildError where the index does not give what is wanted, or it is more than MOST.
    """
    for part in ("wheels", "sources"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    platforms = [f"--platform={name}_{machine}" for name in PLATFORMS]
    _pip(
        "download", "--no-deps", "--only-binary=:all:", f"--python-version={python}",
        "--implementation=cp", *platforms, "--dest", str(folder / "wheels"), *WHEELS,
    )  # fmt: skip
    for name, version in SOURCES.items():
        sources = folder / "sources"
        _pip(
            "download", "--no-deps", "--no-binary=:all:", "--dest", str(sources),
            f"{name}=={version}",
        )  # fmt: skip
        _trim(sources / f"{_stem(name)}.tar.gz")
    there = [*folder.glob("wheels/*"), *folder.glob("sources/*")]
    size = sum(path.stat().st_size for path in there)
    if size > MOST:
        raise BuildError(f"{folder} has {size >> 20} MiB, more than {MOST >> 20}")
    return size


def _pip(*arguments: str) -> None:
    _do([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments])


def _stem(name: str) -> str:
    return f"{name.replace('-', '_')}-{SOURCES[name]}"


def _trim(path: Path) -> None:
    """Leave out of a source archive what no build of the libraries reads."""
    part = path.with_name(path.name + ".part")
    with tarfile.open(path) as whole, tarfile.open(part, "w:gz", compresslevel=9) as kept:
        for member in whole:
            if not _unread(member.name):
                kept.addfile(member, whole.extractfile(member) if member.isreg() else None)
    part.replace(path)


def _unread(name: str) -> bool:
    """Whether a member is history, or in a folder of llama.cpp or ggml that is left out."""
    parts = name.split("/")[1:]  # less the package's own folder
    below = parts[2:] if parts[:1] == ["vendor"] else []
    below = below[1:] if below[:1] == ["ggml"] else below
    return parts[:1] == [".git"] or (len(below) > 1 and below[0] in UNREAD)


# --- where there is none --------------------------------------------------------


def site(folder: Path) -> Path:
    """Where the built packages are, to be put on Python's path."""
    return folder / "site"


def build(
    folder: Path, name: str, *, cuda: bool, architectures: str | None = None, jobs: int = 1
) -> None:
    """Unpack all, compile one of SOURCES; what is done already is not done again.

    ``architectures`` is CMake's list for CUDA, that of the machine's own chips if None; ``jobs``
    compilers run at once. CMAKE_ARGS in the environment are given to CMake too. BuildError where
    the folder lacks something, a compiler is missing or fails.
    """
    if built(folder, name):
        return
    for tool in ["cmake", "c++", *(["nvcc"] if cuda else [])]:
        if not shutil.which(tool):
            raise BuildError(f"{tool} is not on the PATH: it is needed to build")
    options = ["-DGGML_CUDA=OFF"]
    if cuda:
        options = [*CUDA, f"-DCMAKE_CUDA_ARCHITECTURES={architectures or _own_architectures()}"]
        toolkit = _toolkit()
        options += [*_driver(), *_runtime(toolkit), *_blas(folder, toolkit)]
    options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    _unpack(folder)
    _compile(folder, name, options + (PEER if name == "llama-cpp-python" else []), jobs)


def _own_architectures() -> str:
    """Those of the machine's chips, compiled for and nothing else: "90-real" for an H100 or H200.

    Without "-real" there would be code in it as well that the driver compiles for other chips.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True).stdout.split()
    except OSError:
        told = []
    if not told or not all(one.replace(".", "").isdecimal() for one in told):
        raise BuildError("nvidia-smi does not tell the GPU's architecture: name it by --arch")
    return ";".join(f"{one.replace('.', '')}-real" for one in sorted(set(told)))


def _driver() -> list[str]:
    """CMake's option that names the driver's library; toolkits from Python's index have none."""
    try:
        told = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    except OSError:
        told = ""
    known = [line.rpartition("=> ")[2] for line in told.splitlines() if "libcuda.so.1 " in line]
    there = [path for path in [*known, *DRIVERS] if Path(path).is_file()]
    return [f"-DCUDA_cuda_driver_LIBRARY={there[0]}"] if there else []


def _toolkit() -> list[Path]:
    """Where nvcc says that its toolkit has headers and libraries."""
    told = subprocess.run(["nvcc", "--dryrun", "nothing.cu"], capture_output=True, text=True).stderr
    tops = [
        Path(top.strip()).resolve() for top in re.findall(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    ]
    return [top / below for top in tops for below in (".", "targets/x86_64-linux")]


def _runtime(toolkit: list[Path]) -> list[str]:
    """CMake's option by which CUDA's runtime is found again where no loader looks for it."""
    places = [place / below for place in toolkit for below in ("lib64", "lib")]
    there = [place for place in places if any(place.glob("libcudart.so*"))]
    return [f"-DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,{there[0].resolve()}"] if there else []


def _blas(folder: Path, toolkit: list[Path]) -> list[str]:
    """CMake's options for cuBLAS from a package of this Python's, where the toolkit has none.

    Its headers alone are copied below ``folder``: others beside them may be of another version.
    """
    headers = [place / "include" / BLAS for place in [*toolkit, Path("/usr")]]
    if not toolkit or any(header.is_file() for header in headers):
        return []
    for include in (path for base in sys.path for path in Path(base).glob("nvidia/*/include")):
        if (include / BLAS).is_file():
            copies, libraries = folder / "cublas", include.parent / "lib"
            shutil.rmtree(copies, ignore_errors=True)
            shutil.copytree(include, copies, ignore=lambda _, names: set(names) - BLAS_HEADERS)
            return [f"-DCMAKE_CUDA_FLAGS=-I{copies.resolve()}"] + [
                f"-DCUDA_{name}_LIBRARY={path}"
                for name in ("cublas", "cublasLt")
                for path in sorted(libraries.glob(f"lib{name}.so*"))[-1:]
            ]
    raise BuildError("neither CUDA's toolkit nor a package of this Python has cuBLAS")


def built(folder: Path, name: str) -> bool:
    """Whether ``build`` came to its end."""
    return (folder / "build" / name / "done").is_file()


def _unpack(folder: Path) -> None:
    wheels = sorted((folder / "wheels").glob("*.whl"))
    if not wheels:
        raise BuildError(f"{folder} has no wheels: fill it with --fetch where there is an index")
    if not site(folder).is_dir():
        part = folder / "site.part"
        shutil.rmtree(part, ignore_errors=True)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(part)
        part.rename(site(folder))
    for name in SOURCES:
        source = folder / "source" / _stem(name)
        if not source.is_dir():
            with tarfile.open(folder / "sources" / f"{_stem(name)}.tar.gz") as archive:
                archive.extractall(folder / "source.part", filter="data")
            source.parent.mkdir(exist_ok=True)
            (folder / "source.part" / _stem(name)).rename(source)


def _compile(folder: Path, name: str, options: list[str], jobs: int) -> None:
    """Compile a package's libraries and put it below ``site``."""
    source, build = folder / "source" / _stem(name), folder / "build" / name
    package = site(folder) / PACKAGES[name]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _do(
        [
            "cmake", "-S", str(source), "-B", str(build), *generator, *options,
            "-DCMAKE_BUILD_TYPE=Release", f"-DSKBUILD_PROJECT_NAME={name.replace('-', '_')}",
            f"-DSKBUILD_PROJECT_VERSION={SOURCES[name]}", "-DSKBUILD_STATE=wheel",
            f"-DSKBUILD_PLATLIB_DIR={site(folder).resolve()}",
            f"-DCMAKE_INSTALL_PREFIX={(build / 'installed').resolve()}",
        ]
    )  # fmt: skip
    _do(["cmake", "--build", str(build), "--parallel", str(jobs)])
    shutil.copytree(source / PACKAGES[name], package, dirs_exist_ok=True)
    _do(["cmake", "--install", str(build)])
    for library in package.glob("lib/libggml-cuda.so"):
        _check_loads(library)
    (build / "done").touch()


def _check_loads(library: Path) -> None:
    """BuildError where a library that it needs is not found, which importing would not say."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    command = [sys.executable, "-c", code, str(library.resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise BuildError(f"{why}; if CUDA's own: name its folder in LD_LIBRARY_PATH, run it again")


def _do(command: list[str]) -> None:
    """Run a command, its output where ours goes."""
    try:
        done = subprocess.run(command, stdout=sys.stderr)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command[:4])} ... failed with status {done.returncode}")
