"""Builds the compiled module `wdkernels._C` by calling CMake; all else is in pyproject.toml.

The environment says what is built (docs/wheels.md):

    WDK_NATIVE=0        no compiled module: pure Python, with the Triton and eager backends
    WDK_CUDA            auto: with CUDA where nvcc is found; 1: fail where it is not; 0: without
    WDK_CUDA_ARCHS      "80;90": compute capabilities to compile for; native: this machine's GPUs
    WDK_LOCAL_VERSION   cu130: what follows the + of the version
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
SOURCE = Path("wdkernels/__init__.py")
VERSION = re.findall(r'^__version__ = "(.+)"', (ROOT / SOURCE).read_text(), re.MULTILINE)[0]
LOCAL_VERSION = os.environ.get("WDK_LOCAL_VERSION", "")
TAGGED_VERSION = f"{VERSION}+{LOCAL_VERSION}" if LOCAL_VERSION else VERSION

NATIVE = os.environ.get("WDK_NATIVE", "1") != "0"
# Ampere and Ada, Hopper, Blackwell in data centres and elsewhere: code for one compute capability
# runs on the later ones of its major version. PTX of the last is for what comes after it.
CHIPS = ("80", "90", "100", "120")
OLDEST_CUDA = (12, 0)

WITHOUT_KERNELS = (
    "WDK_NATIVE=0 to install without the compiled kernels (Triton and eager backends only)"
)
WITHOUT_CUDA = "WDK_CUDA=0 to build without CUDA"


def fail(problem: str, otherwise: str = WITHOUT_KERNELS) -> None:
    """End with one sentence: anything but SystemExit would bury it under a traceback."""
    raise SystemExit(f"wdkernels: {problem}; or set {otherwise}.")


def require_compiler() -> None:
    named = os.environ.get("CXX", "").split()
    if named and not shutil.which(named[0]):
        fail(f"the C++ compiler CXX={named[0]} was not found: install it or unset CXX")
    if not named and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        fail("no C++ compiler was found: install one (Debian, Ubuntu: apt install g++)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        fail(
            "the headers of this Python (Python.h) were not found: "
            "install them (Debian, Ubuntu: apt install python3-dev)"
        )


def cuda_settings() -> dict[str, str]:
    """What CMake is told of CUDA, once nvcc has shown that it works."""
    wanted = os.environ.get("WDK_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        fail(f"WDK_CUDA={wanted} is none of auto, 1 and 0: unset it for auto", WITHOUT_CUDA)
    places = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, os.path.join(home, "bin"))
    nvcc = None if wanted == "0" else shutil.which("nvcc", path=os.pathsep.join(places))
    if not nvcc:
        if wanted == "1":
            fail(
                "nvcc was not found on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin: install "
                "the CUDA toolkit or set CUDA_HOME to where it is",
                WITHOUT_CUDA,
            )
        return {"WDK_CUDA": "OFF"}

    compiler = os.environ.get("CXX", "").split()
    host = os.environ.get("CUDAHOSTCXX") or (compiler[0] if len(compiler) == 1 else "")
    settings = {"WDK_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
    if host:
        settings["CMAKE_CUDA_HOST_COMPILER"] = shutil.which(host) or host
    named = ["-ccbin", host] if host else []
    # It reads its own headers and its host compiler's version, and says if it cannot.
    ask_nvcc(nvcc, *named, "-x", "cu", "-E", os.devnull, "-o", os.devnull)
    release = re.search(r"release (\d+)\.(\d+)", ask_nvcc(nvcc, "--version"))
    if release and (found := (int(release[1]), int(release[2]))) < OLDEST_CUDA:
        fail(
            f"{nvcc} is of CUDA {found[0]}.{found[1]}, which is older than "
            f"{OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}: set CUDA_HOME to a newer toolkit",
            WITHOUT_CUDA,
        )
    settings["CMAKE_CUDA_ARCHITECTURES"] = architectures(nvcc)
    return settings


def ask_nvcc(nvcc: str, *arguments: str) -> str:
    """What it says, once it has succeeded."""
    answer = subprocess.run(
        [nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if answer.returncode != 0:
        lines = answer.stdout.splitlines() or ["it does not say why"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        fail(
            f"{nvcc} cannot compile ({reason.strip()}): if it does not take the C++ compiler, set "
            "CUDAHOSTCXX to one that it does",
            WITHOUT_CUDA,
        )
    return answer.stdout


def architectures(nvcc: str) -> str:
    """In CMake's words: machine code for each, and PTX of the last."""
    asked = os.environ.get("WDK_CUDA_ARCHS", "").replace(",", ";")
    if asked == "native":
        # No GPU is only a warning to it.
        if "find valid GPU" in ask_nvcc(nvcc, "-arch=native", "--dryrun", "-x", "cu", os.devnull):
            fail(
                "WDK_CUDA_ARCHS=native, but nvcc finds no GPU on this machine: name compute "
                'capabilities, such as "80;90"',
                WITHOUT_CUDA,
            )
        return asked
    known = set(re.findall(r"sm_(\w+)", ask_nvcc(nvcc, "--list-gpu-code")))
    chips = [chip.strip() for chip in asked.split(";") if chip.strip()]
    if unknown := [chip for chip in chips if chip not in known]:
        fail(
            f"nvcc has no code for WDK_CUDA_ARCHS={';'.join(unknown)}: it knows "
            f"{' '.join(sorted(known, key=number_of))}",
            "WDK_CUDA_ARCHS=native for the GPUs of this machine",
        )
    *others, last = sorted(chips or known.intersection(CHIPS), key=number_of)
    return ";".join([*(f"{chip}-real" for chip in others), last])


def number_of(chip: str) -> int:
    return int(re.sub(r"\D", "", chip))  # without the a of 90a


def another_nvcc(build: Path, settings: dict[str, str | None]) -> bool:
    """Whether CMake knows one already: told of another, it would forget all other settings."""
    cache = build / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    known = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", text, re.MULTILINE)
    return known is not None and settings.get("CMAKE_CUDA_COMPILER", known[1]) != known[1]


class DistInfo(dist_info):
    """The metadata come first, so a missing compiler is reported before pip downloads torch."""

    def run(self) -> None:
        if NATIVE:
            require_compiler()
            cuda_settings()
        super().run()


class BuildPy(build_py):
    """`wdkernels.__version__` says what the metadata say."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            copy = Path(self.build_lib) / SOURCE
            text = (ROOT / SOURCE).read_text()
            copy.write_text(text.replace(f'"{VERSION}"', f'"{TAGGED_VERSION}"'))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        import pybind11  # here, because a build without kernels does not need it

        # Not setuptools' build_temp: an editable install would compile everything each time.
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # cmake and ninja are scripts of this environment, activated or not.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=path),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **cuda_settings(),
        }
        configure = ["-G", "Ninja", "-S", ROOT, "-B", build]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        if not self.editable_mode or another_nvcc(build, settings):
            configure += ["--fresh"]
        install = ["--install", build, "--prefix", package, "--strip"]
        for arguments in (configure, ["--build", build], install):
            sys.stdout.flush()
            cmake = subprocess.run(["cmake", *arguments], env={**os.environ, "PATH": path})
            if cmake.returncode != 0:
                fail("CMake stopped with the messages above: mend what they name")


setup(
    version=TAGGED_VERSION,
    ext_modules=[Extension("wdkernels._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy, "dist_info": DistInfo},
)
