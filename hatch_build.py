"""Build the native kernels of csrc/ into the package, where PyTorch's headers and a compiler are at hand.

Without them the wheel is pure Python, and ``luce info`` gives the reason. Run as a program, this file builds
into the source tree: ``python hatch_build.py``, with ``--sanitize`` for the sanitizers' build.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

ROOT = Path(__file__).parent
LIB = "luce/ops/lib"


# auditwheel's manylinux policy (minor version of glibc) for each libstdc++ (last part of GLIBCXX_3.4.x).
GLIBC_OF_GLIBCXX = {19: 17, 22: 24, 24: 28, 28: 31, 29: 34, 30: 35, 33: 39}


class CannotBuild(Exception):
    """What is missing, and what to do about it."""


def build(destination: Path | None, *, sanitize: bool = False) -> None:
    """Build the shared library and put it into a folder; None leaves it in ``build/``."""
    torch = find_torch()
    if torch is None:
        raise CannotBuild(
            "PyTorch was not there when Luce was installed from source; install torch first, then Luce again"
        )
    if not (torch / "include/torch/csrc/stable/c/shim.h").exists():
        raise CannotBuild("the native kernels need the headers of PyTorch 2.10 or newer; upgrade torch")
    cmake = _find("cmake")
    if cmake is None:
        raise CannotBuild("CMake was not found; `pip install cmake ninja` brings it")
    folder = ROOT / "build" / ("sanitized" if sanitize else "native")
    generator = ["-G", "Ninja"] if _find("ninja") else []
    _run([cmake, "-S", ROOT / "csrc", "-B", folder, *generator, f"-DTORCH={torch}",
          f"-DSANITIZE={'ON' if sanitize else 'OFF'}"])  # fmt: skip
    _run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
    if destination is not None:
        shutil.rmtree(destination, ignore_errors=True)
        _run([cmake, "--install", folder, "--prefix", destination])


def find_torch() -> Path | None:
    """Return the folder of the installed PyTorch, whose headers the kernels are compiled against.

    An isolated build hides the site-packages that Luce is installed into. They are searched all the same: pip
    runs the build with the Python they belong to, and other front ends leave ``VIRTUAL_ENV`` set.
    """
    folders = [*sys.path, sysconfig.get_path("platlib")]
    if environment := os.environ.get("VIRTUAL_ENV"):
        folders.append(
            sysconfig.get_path("platlib", "venv", vars={"base": environment, "platbase": environment})
        )
    found = (Path(folder) / "torch" for folder in folders)
    return next((folder for folder in found if (folder / "include").is_dir()), None)


def platform_tag(library: Path) -> str:
    """Return the tag of the oldest Linux that can load the library; elsewhere, that of this platform.

    The library binds to glibc and libstdc++ by versioned symbols, and to PyTorch by name alone.
    """
    if not sys.platform.startswith("linux"):
        return next(sys_tags()).platform
    content = library.read_bytes()
    glibc = max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", content))
    glibcxx = max((int(patch) for patch in re.findall(rb"GLIBCXX_3\.4\.(\d+)", content)), default=0)
    for newest, policy in GLIBC_OF_GLIBCXX.items():
        if glibcxx <= newest:
            return f"manylinux_2_{max(glibc, policy)}_{platform.machine()}"
    return f"linux_{platform.machine()}"


def _find(program: str) -> str | None:
    """Return the path of a program: beside this Python, where pip puts programs, else on the PATH."""
    return shutil.which(program, path=os.path.dirname(sys.executable)) or shutil.which(program)


def _run(command: list[str | Path]) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-12:]
        raise CannotBuild("\n".join([f"`{' '.join(map(str, command))}` failed:", *last]))


class NativeKernels(BuildHookInterface):
    """The hook that hatchling calls; never fails a build."""

    def dependencies(self) -> list[str]:
        """Have an isolated build bring CMake, where there is something to build."""
        compiler = (
            os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        )
        return ["cmake>=3.18", "ninja"] if compiler and find_torch() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        # An editable installation runs from the source tree; a wheel leaves it alone, where tests may run.
        editable = version == "editable"
        folder = ROOT / "src" / LIB if editable else ROOT / "build/wheel"
        try:
            build(folder)
        except CannotBuild as reason:
            self.app.display_warning(f"Luce is built without its native kernels: {reason}")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "why_not.txt").write_text(f"{reason}\n", encoding="utf-8")
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag(next(folder.glob('luce_native.*')))}"
        if not editable:
            build_data["force_include"][str(folder)] = LIB


if __name__ == "__main__":
    sanitize = "--sanitize" in sys.argv[1:]
    try:
        build(None if sanitize else ROOT / "src" / LIB, sanitize=sanitize)
    except CannotBuild as reason:
        sys.exit(str(reason))
