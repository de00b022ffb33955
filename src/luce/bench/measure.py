"""Time and memory of the contestants of a case, and how fast and how quiet the machine is."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .contestants import Step, reason
from .inputs import Inputs

SHORTEST = 200e-6
"""Seconds below which the clock and the call to it would be part of the figure."""
FEWEST_ROUNDS = 5


@dataclass
class Timing:
    """Seconds of one step for every round, by contestant, and why others have none."""

    repeats: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run(step: Step, inputs: Inputs, *, backward: bool) -> None:
    """One step as a training loop takes it: outputs are allocated anew, gradients start from None."""
    if not backward:
        with torch.no_grad():
            step(inputs)
        return
    value = step(inputs)
    value.backward(None if value.ndim == 0 else inputs.upstream)
    inputs.student.grad = None


def interleave(
    steps: Mapping[str, Step],
    pool: Sequence[Inputs],
    *,
    seconds: float,
    backward: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Rounds in which everybody takes the same inputs, in an order reversed each time, until time is up.

    Who comes after whom decides what lies in the caches and how hot the processor is; reversing the order
    shares that out, and ratios are taken within a round. Short steps are repeated, each time with the next
    inputs of the pool. The first contestant is the candidate: without it nobody else is measured.
    """
    timing = Timing()
    warm: dict[str, float] = {}
    for name, step in steps.items():
        try:
            for inputs in itertools.islice(itertools.cycle(pool), 3):
                begin = clock()
                run(step, inputs, backward=backward)
                warm[name] = clock() - begin
        except Exception as error:  # whatever a baseline dies of is its own affair, and is reported
            timing.failed[name] = reason(error)
            warm.pop(name, None)
            if not warm:
                return timing
    timing.seconds = {name: [] for name in warm}
    timing.repeats = min(len(pool), max(1, math.ceil(SHORTEST / max(min(warm.values()), 1e-9))))
    turns = itertools.cycle(pool)
    order = list(warm)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = clock() + seconds
        while len(timing.seconds[order[0]]) < FEWEST_ROUNDS or clock() < end:
            batch = list(itertools.islice(turns, timing.repeats))
            for name in order:
                for inputs in batch:
                    inputs.read()
                step = steps[name]
                begin = clock()
                for inputs in batch:
                    run(step, inputs, backward=backward)
                timing.seconds[name].append((clock() - begin) / len(batch))
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return timing


@functools.cache
def copy_bandwidth(threads: int, megabytes: int = 128) -> float:
    """GB/s of a large copy, counting what is read and what is written; measured once a process."""
    source = torch.ones(megabytes * 2**18)
    target = torch.zeros_like(source)
    seconds = []
    with using(threads):
        for _ in range(7):
            begin = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load() -> float | None:
    """Processes that were running or waiting in the last minute, on average; None where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_quiet(load: float | None) -> bool:
    """Whether the load leaves the figures alone: a third of one core is the system's own."""
    return load is not None and load < 0.33
