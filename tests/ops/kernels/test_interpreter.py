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
QUICK = [
    f"{HERE}/{test}"
    for test in (
        "test_cross_entropy.py::test_long_rows_take_several_steps",
        "test_divergence.py::test_long_rows_take_several_steps",
        "test_divergence.py::test_a_gradient_is_multiplied_in_its_place",
        "test_dkd.py::test_long_rows_take_several_steps",
        "test_pld.py::test_weights",
        "test_pld_top_k.py::test_weights_and_strides",
        "test_rkkd.py::test_weights",
        "test_suffix_logsumexp.py::test_a_long_row",
    )
]
"""Each kernel, on rows of several steps or with weights, and its gradient."""
SHARES = [
    pytest.param(QUICK, id="each kernel"),
    *(
        pytest.param(FILES[first::3], id=f"all, share {first + 1}", marks=pytest.mark.slow)
        for first in range(3)
    ),
]
"""Run side by side. To start takes longer than the tests of a short file."""


@pytest.mark.skipif(engines.INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (pip install triton)")
@pytest.mark.parametrize("tests", SHARES)
def test_interpreted(tests):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
