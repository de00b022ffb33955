"""Turns, rounds and repeats, with a clock that the steps advance themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import machine, measure
from benchmarks.baselines import run
from benchmarks.cases import Case
from benchmarks.inputs import Inputs, pool
from benchmarks.measure import CpuTimer, interleave

POOL = pool(Case("toy", (2, 3), "PLD", inputs=("student", "teacher", "target", "upstream")))[:8]


class Clock:
    """Time that passes only while somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds: float) -> Callable[[Inputs], torch.Tensor]:
        def step(inputs: Inputs) -> torch.Tensor:
            self.now += seconds
            self.calls.append((name, next(k for k, known in enumerate(POOL) if known is inputs)))
            return inputs.student.sum()

        return step


def test_everybody_takes_the_same_inputs_in_an_order_that_turns() -> None:
    clock = Clock()
    steps = {name: clock.worker(name, 1.0) for name in "abc"}
    timing = interleave(steps, POOL, seconds=0.1, timer=CpuTimer(clock))
    assert [len(values) for values in timing.seconds.values()] == [measure.FEWEST_ROUNDS] * 3
    rounds = clock.calls[3 * 3 :]  # after three calls each to warm up
    assert [name for name, _ in rounds] == list("abccbaabccbaabc")
    assert [number for _, number in rounds] == [k for k in range(5) for _ in "abc"]


def test_time_is_that_of_one_step_and_ends_the_rounds() -> None:
    clock = Clock()
    steps = {"fast": clock.worker("fast", 1.0), "slow": clock.worker("slow", 3.0)}
    timing = interleave(steps, POOL, seconds=40.0, timer=CpuTimer(clock))
    assert timing.seconds == {"fast": [1.0] * 10, "slow": [3.0] * 10}
    assert timing.repeats == 1


def test_short_steps_are_repeated_on_different_inputs() -> None:
    clock = Clock()
    steps = {"fast": clock.worker("fast", 50e-6), "slow": clock.worker("slow", 1.0)}
    timing = interleave(steps, POOL, seconds=1e-9, timer=CpuTimer(clock))
    assert timing.repeats == 4  # 200 us
    assert timing.seconds["fast"] == pytest.approx([50e-6] * 5)
    assert timing.seconds["slow"] == pytest.approx([1.0] * 5)
    batches = [number for name, number in clock.calls[6:] if name == "fast"]
    assert batches == [0, 1, 2, 3, 4, 5, 6, 7] * 2 + [0, 1, 2, 3]


def test_no_input_comes_twice_in_a_batch() -> None:
    clock = Clock()
    assert interleave(
        {"instant": clock.worker("i", 1e-12)}, POOL, seconds=1e-15, timer=CpuTimer(clock)
    ).repeats == len(POOL)


def broken(inputs: Inputs) -> None:
    raise RuntimeError("out of order")


def test_a_broken_baseline_costs_only_its_own_figures() -> None:
    clock = Clock()
    steps = {"good": clock.worker("good", 1.0), "bad": broken, "fine": clock.worker("fine", 2.0)}
    timing = interleave(steps, POOL, seconds=0.1, timer=CpuTimer(clock))
    assert timing.failed == {"bad": "RuntimeError: out of order"}
    assert list(timing.seconds) == ["good", "fine"]


@pytest.mark.parametrize("others", [(), ("fine",)])
def test_without_the_candidate_nothing_is_measured(others: tuple[str, ...]) -> None:
    clock = Clock()
    timing = interleave(
        {"bad": broken, **{n: clock.worker(n, 1.0) for n in others}}, POOL, seconds=1, timer=CpuTimer(clock)
    )
    assert (timing.seconds, clock.calls) == ({}, [])
    assert timing.failed == {"bad": "RuntimeError: out of order"}


def test_a_step_goes_backward_and_leaves_no_gradient() -> None:
    inputs, seen = POOL[0], []
    inputs.student.register_hook(lambda gradient: seen.append(gradient.clone()))
    run(lambda i: (2 * i.student).sum(), inputs, backward=True)
    run(lambda i: 3 * i.student, inputs, backward=True)
    torch.testing.assert_close(seen, [torch.full((2, 3), 2.0), 3 * inputs.upstream])
    assert inputs.student.grad is None


def test_forward_alone_builds_no_graph() -> None:
    def step(inputs: Inputs) -> None:
        assert not (2 * inputs.student).requires_grad

    run(step, POOL[0], backward=False)


def test_threads_are_put_back() -> None:
    with measure.using(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr(measure, "CpuTimer", lambda: CpuTimer(lambda: float(next(times))))  # a second a copy
    measure.copy_bandwidth.cache_clear()
    assert measure.copy_bandwidth("cpu", 1, megabytes=1) == 2 * 2**20 / 1e9
    measure.copy_bandwidth.cache_clear()


def test_quiet() -> None:
    assert machine.is_quiet(0.1)
    assert not machine.is_quiet(1.0)
    assert not machine.is_quiet(None)
