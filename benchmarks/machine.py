"""Facts about the machine that figures depend on, and the tests that precede them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from luce import ops
from luce.source import commit

CHECKOUT = Path(__file__).resolve().parents[1]
# Prefixes in /proc/cpuinfo of the instruction sets that vector code is chosen by, on x86 and on Arm.
INSTRUCTIONS = ("sse4", "avx", "amx", "fma", "f16c", "neon", "asimd", "sve", "bf16")
VERSIONS = ("luce", "torch", "triton", "numpy")


def describe_run(device: str, tests: str, load: float | None) -> dict[str, Any]:
    """Return what all figures of a run share."""
    now, revision = datetime.now(timezone.utc), commit()
    environment: dict[str, Any] = {
        **{name: _version(name) for name in VERSIONS},
        "commit": revision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "gpu" else "cpu",
        "started": now.isoformat(timespec="seconds"),
        **getattr(ops, "describe", dict)(),
        "instructions": _instructions(),
    }
    return {
        "id": f"{now:%Y%m%dT%H%M%S}-{(revision or 'installed').rstrip('+')[:7]}",
        "tests": tests,
        "load": load,
        "quiet": is_quiet(load),
        "environment": environment,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _processor() -> str:
    models = (line.partition(":")[2] for line in _cpuinfo().splitlines() if line.startswith("model name"))
    return next(models, "").strip() or platform.processor() or platform.machine()


def _instructions() -> str:
    """Vector instructions of the processor, as far as the system lists them."""
    return " ".join(sorted({flag for flag in _cpuinfo().split() if flag.startswith(INSTRUCTIONS)}))


def read_load() -> float | None:
    """Return the mean number of running or waiting processes in the last minute; None where unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_quiet(load: float | None) -> bool:
    """Whether the load leaves the figures alone: a third of one core is the system's own."""
    return load is not None and load < 0.33


def run_tests(device: str, seconds: float | None = None) -> str:
    """Run the operators' tests, on a GPU those marked ``gpu``, and return ``"passed"`` or what happened.

    Args:
        seconds: Time limit.
    """
    tests = CHECKOUT / "tests"
    marker, paths = "not slow", [str(tests / "ops")]
    if device == "gpu":
        marked = [str(path) for path in tests.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
        marker, paths = "gpu", sorted(marked)
    if not paths or not tests.is_dir():
        return "not run: this is no checkout"
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", *paths]
    if device == "gpu" and importlib.util.find_spec("xdist") is not None:  # kernels compile side by side
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 1)))]
    path = os.pathsep.join(filter(None, [str(CHECKOUT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} seconds"
    summary = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    return "passed" if done.returncode == 0 else f"failed: {summary}"
