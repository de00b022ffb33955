"""Time, memory and errors of a case's steps, the candidate and its baselines interleaved."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from . import memory
from .baselines import Step, find, names, reason, run
from .cases import COMPILED, Case
from .inputs import Inputs, device_of, make, pool
from .results import Record, record

SHORTEST = 200e-6
"""Seconds below which the clock and the call to it would be part of the figure."""
FEWEST_ROUNDS = 5
GPU_CACHE = 256 * 2**20
"""Bytes that empty every GPU's last cache."""


@dataclass
class Timing:
    """Seconds of one step in every round, by name, and why the others have none."""

    repeats: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Timer(Protocol):
    shortest: float

    def prepare(self, batch: Sequence[Inputs]) -> None:
        """Bring the caches into the same state before every step."""

    def __call__(self, work: Callable[[], None]) -> float:
        """Return the seconds that `work` takes."""


class CpuTimer:
    shortest = SHORTEST

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def prepare(self, batch: Sequence[Inputs]) -> None:
        for inputs in batch:
            inputs.read()

    def __call__(self, work: Callable[[], None]) -> float:
        begin = self.clock()
        work()
        return self.clock() - begin


class GpuTimer:
    """Time between two events on the device, with its caches emptied before."""

    shortest = 0.0  # the events cost the device nothing

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache = torch.empty(GPU_CACHE, dtype=torch.int8, device="cuda")

    def prepare(self, batch: Sequence[Inputs]) -> None:
        self.cache.zero_()

    def __call__(self, work: Callable[[], None]) -> float:
        self.start.record()
        work()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


def interleave(
    steps: Mapping[str, Step],
    inputs: Sequence[Inputs],
    *,
    seconds: float,
    backward: bool = True,
    timer: Timer | None = None,
) -> Timing:
    """Time the steps in rounds until `seconds` are over, on the same inputs within a round.

    The order is reversed after every round: which step precedes decides what lies in the caches and how hot
    the processor is. Ratios are taken within a round. Short steps are repeated, each time with other inputs.
    The first step is the candidate; if it fails, no other is measured.
    """
    timer = timer or CpuTimer()
    timing = Timing()
    warm: dict[str, float] = {}
    for name, step in steps.items():
        try:
            for each in itertools.islice(itertools.cycle(inputs), 3):
                warm[name] = timer(functools.partial(run, step, each, backward=backward))
        except Exception as error:  # a baseline may fail in any way: its own figures are missing, no others
            timing.failed[name] = reason(error)
            warm.pop(name, None)
            if not warm:
                return timing
    timing.seconds = {name: [] for name in warm}
    timing.repeats = min(len(inputs), max(1, math.ceil(timer.shortest / max(min(warm.values()), 1e-9))))
    turns = itertools.cycle(inputs)
    order = list(warm)
    spent = 0.0
    with _no_garbage_collection():
        while len(timing.seconds[order[0]]) < FEWEST_ROUNDS or spent < seconds:
            batch = list(itertools.islice(turns, timing.repeats))
            for name in order:
                timer.prepare(batch)
                took = timer(functools.partial(_run_all, steps[name], batch, backward))
                timing.seconds[name].append(took / len(batch))
                spent += took
            order.reverse()
    return timing


def _run_all(step: Step, batch: Sequence[Inputs], backward: bool) -> None:
    for inputs in batch:
        run(step, inputs, backward=backward)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def measure_case(case: Case, threads: int, *, seconds: float, compile: bool) -> Record:
    """Return time, memory and errors of a case; what cannot run has its reason instead."""
    copied = copy_bandwidth(case.device, threads)
    left_out = [name for name in names(case) if name.startswith(COMPILED) and not compile]
    timing, arrays, errors = Timing(), {}, {}
    if compile:
        torch.compiler.reset()  # every case is compiled for its own shape and threads
    try:
        with using(threads):
            steps = {name: find(name) for name in names(case) if name not in left_out}
            timer = GpuTimer() if case.device == "gpu" else CpuTimer()
            inputs = pool(case)
            timing = interleave(steps, inputs, seconds=seconds, backward=case.backward, timer=timer)
            if case.candidate in timing.seconds:
                errors = errors_of(case) if any("error" in goal.measure for goal in case.goals) else {}
                arrays = memory.of(case, list(timing.seconds), threads)
    except Exception as error:  # a full or lost device, a killed process: the figures so far are kept
        timing.failed["memory" if timing.seconds else case.candidate] = reason(error)
    timing.failed |= dict.fromkeys(left_out, "only with --compile")
    return {"threads": threads, "copy_gbps": copied} | record(case, timing, arrays, errors, copied)


def errors_of(case: Case) -> dict[str, float]:
    """Return the largest relative errors of value and gradient on a few rows, against float64."""
    rows = min(case.shape[0], 32 if case.shape[1] < 10000 else 2)
    small = replace(case, shape=(rows, case.shape[1]))
    inputs = make(small, small.shape, torch.Generator(device_of(case)).manual_seed(0))
    step = find(case.candidate)
    value, gradient = _differentiate(step, inputs)
    truth, slope = _differentiate(functools.partial(step, backend="reference"), inputs.to(torch.float64))
    relative = (gradient - slope).abs().amax(1) / slope.abs().amax(1)
    of_value = (value - truth).abs() / truth.abs()
    return {"value error": float(of_value), "gradient error": float(relative.max())}


def _differentiate(step: Callable[..., Any], inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    value = step(inputs).sum()
    (gradient,) = torch.autograd.grad(value, inputs.student)
    return value.detach().double(), gradient.double()


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


@functools.cache
def copy_bandwidth(device: str, threads: int, megabytes: int | None = None) -> float:
    """Return GB/s of a large copy, reading and writing both counted; measured once a process."""
    timer: Timer = GpuTimer() if device == "gpu" else CpuTimer()
    place = torch.device("cuda" if device == "gpu" else "cpu")
    source = torch.ones((megabytes or (1024 if device == "gpu" else 128)) * 2**18, device=place)
    target = torch.zeros_like(source)
    with using(threads):
        seconds = [timer(lambda: _copy(source, target)) for _ in range(7)]
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
