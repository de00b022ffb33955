"""Builds the native kernels of csrc/ into the package, where PyTorch's headers and a compiler are at hand.

Where they are not, the package is built without, and says why when asked (``luce info``). Run as a program,
it builds into the source tree: ``python hatch_build.py``, with ``--sanitize`` for the sanitizers' build.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

ROOT = Path(__file__).parent
NATIVE = ROOT / "src/luce/ops/lib"
WHY_NOT = NATIVE / "why_not.txt"


class CannotBuild(Exception):
    """What is missing, and what to do about it."""


def build(*, sanitize: bool = False) -> None:
    """Build the shared library and put it into the package."""
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise CannotBuild(
            "PyTorch was not there when Luce was installed from source; install torch first, then Luce with "
            "`pip install --no-build-isolation`"
        )
    torch_folder = Path(torch.submodule_search_locations[0])
    if not (torch_folder / "include/torch/csrc/stable/c/shim.h").exists():
        raise CannotBuild("the native kernels need the headers of PyTorch 2.10 or newer; upgrade torch")
    cmake = _find("cmake")
    if cmake is None:
        raise CannotBuild("CMake was not found; `pip install cmake ninja` brings it")
    folder = ROOT / "build" / ("sanitized" if sanitize else "native")
    generator = ["-G", "Ninja"] if _find("ninja") else []
    _run([cmake, "-S", ROOT / "csrc", "-B", folder, *generator, f"-DTORCH={torch_folder}",
          f"-DSANITIZE={'ON' if sanitize else 'OFF'}"])  # fmt: skip
    _run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
    if not sanitize:
        _run([cmake, "--install", folder, "--prefix", NATIVE])
        WHY_NOT.unlink(missing_ok=True)


def _find(program: str) -> str | None:
    """Beside this Python first, where pip puts programs, then on the path."""
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

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        shutil.rmtree(NATIVE, ignore_errors=True)
        try:
            build()
        except CannotBuild as reason:
            self.app.display_warning(f"Luce is built without its native kernels: {reason}")
            NATIVE.mkdir(parents=True, exist_ok=True)
            WHY_NOT.write_text(f"{reason}\n", encoding="utf-8")
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"


if __name__ == "__main__":
    try:
        build(sanitize="--sanitize" in sys.argv[1:])
    except CannotBuild as reason:
        sys.exit(str(reason))
