"""The native PLD in several threads, in forked processes, and on lower instruction sets.

Run as a module, it stores the results of `battery`: so other instruction sets are compared.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from luce.ops import engines

from .pld_cases import (
    NOISE,
    assert_right,
    assert_same,
    call,
    inf,
    native,
    normal,
    rounded_gradients,
    run,
    truth,
)

pytestmark = native

# Threads


def test_the_number_of_threads_changes_nothing():
    for shape in ((3, 5000), (700, 9), (2, 30, 100)):
        student, teacher = torch.randn(2, *shape)
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run(student, teacher, tolerance=1e-3))
        torch.set_num_threads(1)
        for result in results[1:]:
            for one, other in zip(result, results[0], strict=True):
                assert_same(one, other)


def test_an_error_in_another_thread_is_raised():
    order = torch.arange(2000).repeat(16, 1)
    order[15, 7] = 8
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="every class once"):
        run(torch.randn(16, 2000), torch.randn(16, 2000), order=order)


def test_called_from_several_threads_at_once():
    """Each has its own scratch memory, whatever sizes come one after the other."""
    cases = []
    for classes in (5, 3000, 100, 1025, 31, 2000):
        for options in ({}, {"top_k": 3}, {"tolerance": 1e-3}):
            student, teacher = normal(4, classes)
            cases.append((student, teacher, options, run(student, teacher, **options)))

    def all_again(shift):
        for student, teacher, options, expected in cases[shift:] + cases[:shift]:
            for one, other in zip(run(student, teacher, **options), expected, strict=True):
                assert_same(one, other)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(all_again, range(12)))


def _in_a_child(student, teacher, expected):
    torch.set_num_threads(1)  # as the workers of a data loader do: OpenMP's own threads are not forked
    for one, other in zip(run(student, teacher, tolerance=1e-3), expected, strict=True):
        assert_same(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_after_use():
    student, teacher = normal(8, 3000)
    torch.set_num_threads(2)
    expected = run(student, teacher, tolerance=1e-3)
    child = multiprocessing.get_context("fork").Process(target=_in_a_child, args=(student, teacher, expected))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code == 0


def test_other_threads_go_on_meanwhile():
    """Seen in the middle of a call, where no Python code of this thread runs."""
    student, teacher = torch.randn(2, 24, 60000)
    stamps, done = [], threading.Event()

    def watch():
        while not done.wait(0.001):
            stamps.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(10):
            start = time.perf_counter()
            call(student, teacher)
            took = time.perf_counter() - start
            if any(start + took / 4 < stamp < start + 3 * took / 4 for stamp in stamps):
                return
    finally:
        done.set()
        watcher.join()
    pytest.fail("no other thread ran during ten calls")


# Instruction sets


def battery():
    """A little of everything, from a generator of its own: inputs with their results."""
    generator = torch.Generator().manual_seed(3)
    cases = []
    for classes in (1, 3, 9, 33, 1000, 1024, 1025, 3000):
        for spread in (1.0, 50.0, 1e4):
            student, teacher = spread * torch.randn(2, 3, classes, generator=generator)
            target = torch.tensor([-1, 0, classes - 1])
            if classes > 1:
                student[2, 0] = -inf
            if classes > 9:
                teacher[1, 1 : classes // 2] = -inf
            for options in (
                {},
                {"top_k": 4},
                {"tolerance": 1e-3},
                {"average_ties": True},
                {"teacher_temperature": 3.0},
            ):
                for dtype in (torch.float32, torch.float64):
                    inputs = (student.to(dtype), teacher.to(dtype), target)
                    cases.append((*inputs, options, run(*inputs, **options)))
    every = torch.arange(65536).to(torch.uint16).reshape(64, 1024)
    for student in (every.clone().view(torch.float16), every.clone().view(torch.bfloat16)):
        cases.append((student, torch.zeros(64, 1024), None, {}, run(student, torch.zeros(64, 1024))))
        assert_same(*rounded_gradients(student.dtype))
    return cases


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not an x86-64 processor")
@pytest.mark.parametrize("name", ["x86-64-v2", "x86-64-v3"])
def test_instruction_sets(name, tmp_path):
    current = engines.describe()["instruction_set"].split()[0]
    if current <= name:
        pytest.skip(f"this processor offers no more than {current}, which all other tests run on")
    results = tmp_path / "results.pt"
    environment = {**os.environ, "LUCE_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_pld_threads", results],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    used, cases = torch.load(results, weights_only=True)
    assert used.startswith(name)
    for (*inputs, options, other), (*_, here) in zip(cases, battery(), strict=True):
        precise = inputs[0].dtype == torch.float64
        largest = here[1].abs().float().nan_to_num(0, 0).amax(1, keepdim=True)
        loose = options.get("tolerance", 0)
        assert_close(
            other[0],
            here[0],
            rtol=1e-12 if precise else 1e-6,
            atol=NOISE[here[0].dtype] + loose,
            equal_nan=True,
        )
        unit = 1e-12 if precise else 2e-6 if inputs[0].dtype == torch.float32 else 2**-7
        apart = (other[1].float() - here[1].float()).nan_to_num(0).abs()
        assert (apart <= unit * largest + loose + NOISE[here[0].dtype] + (1e-7 if unit > 1e-3 else 0)).all()
        expected = (
            truth(*inputs) if not options and inputs[0].dtype in (torch.float32, torch.float64) else None
        )
        if expected is not None and expected[0].isfinite().all():
            assert_right(other, expected)
        if inputs[0].dtype in (torch.float16, torch.bfloat16) and inputs[2] is None:
            assert_close(other[1].isnan(), here[1].isnan())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save((engines.describe()["instruction_set"], battery()), sys.argv[1])
