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
