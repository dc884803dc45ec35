"""Builds the compiled module `wdkernels._C` by calling CMake; all else is in pyproject.toml.

`WDK_NATIVE=0` leaves it out: the package is then pure Python, with the Triton and eager backends.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("WDK_NATIVE", "1") != "0"


def fail(problem: str) -> None:
    """End with one sentence: anything but SystemExit would bury it under a traceback."""
    raise SystemExit(
        f"wdkernels: {problem}; or set WDK_NATIVE=0 to install without the compiled kernels "
        "(Triton and eager backends only)."
    )


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


class DistInfo(dist_info):
    """The metadata come first, so a missing compiler is reported before pip downloads torch."""

    def run(self) -> None:
        if NATIVE:
            require_compiler()
        super().run()


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
        }
        configure = ["-G", "Ninja", "-S", ROOT, "-B", build]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        if not self.editable_mode:
            configure += ["--fresh"]
        install = ["--install", build, "--prefix", package, "--strip"]
        for arguments in (configure, ["--build", build], install):
            sys.stdout.flush()
            cmake = subprocess.run(["cmake", *arguments], env={**os.environ, "PATH": path})
            if cmake.returncode != 0:
                fail("CMake stopped with the messages above: mend what they name")


setup(
    ext_modules=[Extension("wdkernels._C", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "dist_info": DistInfo},
)
