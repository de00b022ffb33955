"""Peak memory against what can be counted by hand."""

from __future__ import annotations

import pytest

from benchmarks import memory
from benchmarks.cases import CASES

pytestmark = [
    pytest.mark.slow,  # each launches a process
    pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux keeps a peak that can be reset"),
]


def test_arrays_are_counted() -> None:
    case = CASES["softmax/auto/1x4194304/float32"]
    arrays = memory.of(
        case, ("numpy", "torch.softmax"), threads=1
    )  # an earlier peak does not count for a later step
    assert arrays["numpy"] == pytest.approx(2, abs=0.03)  # x - max and exp of it; then that and the result
    assert arrays["torch.softmax"] == pytest.approx(1, abs=0.03)  # the result


def test_the_way_back_is_counted() -> None:
    case = CASES["kd/kl/1024x1000/float32"]  # of a size that an allocator likes to keep for later
    arrays = memory.of(case, ("eager kl_div",), threads=1)
    # log q and p, which the way back needs, with the two terms and the difference that kl_div makes of them
    assert arrays["eager kl_div"] == pytest.approx(5, abs=0.1)


def test_small_inputs_are_not_measured() -> None:
    assert memory.of(CASES["kd/kl/256x1000/float32"], ("KD",), threads=1) == {}


def test_a_process_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"process that measures memory failed: .*'nobody'"):
        memory.of(CASES["kd/kl/64x32000/float32"], ("nobody",), threads=1)
