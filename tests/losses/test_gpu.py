"""What only a CUDA device can show; every formula is covered on the CPU as well."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import luce

pytestmark = pytest.mark.gpu


def test_a_gpu_agrees_with_the_cpu(case):
    student, teacher, target = torch.randn(6, 9), torch.randn(6, 9), torch.randint(9, (6,))
    results = []
    for device in ("cpu", "cuda"):
        x = student.to(device).requires_grad_()
        loss = case(x, teacher.to(device), target.to(device))
        loss.backward()
        results.append((loss.detach().cpu(), x.grad.cpu()))
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_a_wrong_label_spoils_its_row_and_stalls_nothing():
    logits, target = torch.randn(3, 4, device="cuda"), torch.tensor([0, 7, 2], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [f(logits, logits, target, reduction="none") for f in (luce.pld_loss, luce.dkd_loss)]
        losses.append(luce.cross_entropy_loss(logits, target, reduction="none"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for loss in losses:
        assert loss.isnan().tolist() == [False, True, False]


LOSSES = [luce.kd_loss, luce.reverse_kl_loss, luce.jsd_loss, luce.dkd_loss, luce.pld_loss, luce.rkkd_loss]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_the_kernels_of_a_loss_stall_nothing(loss):
    """Forward, and backward with the gradient as it is, multiplied, and wanted once more."""
    pytest.importorskip("triton")
    teacher, target = torch.randn(6, 9, device="cuda"), torch.randint(9, (6,), device="cuda")
    student = torch.randn(6, 9, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(loss(student, teacher, target, backend="reference"), student)[0]
    loss(student, teacher, target, backend="gpu").backward()  # compiles the kernels
    student.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(student, teacher, target, backend="gpu")
        (twice,) = torch.autograd.grad(2 * value, student)
        value = loss(student, teacher, target, backend="gpu")
        (kept,) = torch.autograd.grad(3 * value, student, retain_graph=True)
        (once,) = torch.autograd.grad(value, student)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(twice, 2 * expected, rtol=1e-5, atol=1e-6)
    assert_close(kept, 3 * expected, rtol=1e-5, atol=1e-6)
    assert_close(once, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_compiled_and_captured(loss):
    """Under torch.compile, and replayed from a CUDA graph, the kernels say what they say otherwise."""
    pytest.importorskip("triton")
    teacher, target = torch.randn(6, 9, device="cuda"), torch.randint(9, (6,), device="cuda")
    student = torch.randn(6, 9, device="cuda", requires_grad=True)

    def run(x):
        return loss(x, teacher, target, backend="gpu")

    expected = torch.autograd.grad(run(student), student)[0]
    compiled = torch.compile(run, fullgraph=True)
    assert_close(torch.autograd.grad(compiled(student), student)[0], expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(run(student), student)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(run(student), student)
    captured.fill_(torch.nan)
    graph.replay()
    assert_close(captured, expected)
