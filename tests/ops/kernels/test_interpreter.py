"""The tests of this folder that call kernels, in Triton's interpreter: every formula without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luce.ops import engines

HERE = Path(__file__).parent
OTHERS = (Path(__file__).name, "test_compile.py")
FILES = sorted(str(path) for path in HERE.glob("test_*.py") if path.name not in OTHERS)
SHARES = [FILES[first::3] for first in range(3)]
"""Run side by side. To start takes longer than the tests of a short file."""


@pytest.mark.skipif(engines.INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (pip install triton)")
@pytest.mark.parametrize("files", SHARES, ids=["1", "2", "3"])
def test_interpreted(files):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
