"""Software and hardware of a run."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..source import commit


def environment() -> dict[str, Any]:
    """Return versions, commit, machine, threads, device and time, as values for JSON."""
    import torch

    return {
        **{name: importlib.metadata.version(name) for name in ("luce", "torch", "accelerate", "numpy")},
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Return the name of the processor, or its architecture where the system has no name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
