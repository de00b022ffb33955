"""What only a CUDA device can show; every formula is covered on the CPU as well."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import luce
from luce.ops import engines

pytestmark = pytest.mark.gpu
kernels = pytest.mark.skipif(engines.NO_TRITON is not None, reason=str(engines.NO_TRITON))


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


@kernels
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_the_kernels_of_a_loss_stall_nothing(loss):
    """Forward, and backward with the gradient as it is, multiplied, and wanted once more."""
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


DEVICE = "cuda"


def networks(rows=8, classes=12, dtype=torch.float32):
    """A student of one layer, what it reads, and what it is taught by."""
    torch.manual_seed(1)
    student = nn.Linear(6, classes).to(DEVICE, dtype)
    x, teacher = torch.randn(rows, 6), torch.randn(rows, classes)
    return student, x.to(DEVICE, dtype), teacher.to(DEVICE, dtype), torch.randint(classes, (rows,)).to(DEVICE)


def gradients(student):
    return [parameter.grad for parameter in student.parameters()]


@pytest.fixture(params=[pytest.param(f, marks=kernels) for f in LOSSES], ids=lambda f: f.__name__)
def loss(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(loss, dtype):
    """The student's logits come in 16 bits, the teacher's may not; a scaler's factor goes through."""
    student, x, teacher, target = networks()
    found = []
    for backend in ("gpu", "reference"):
        student.zero_grad()
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        with torch.autocast(DEVICE, dtype):
            logits = student(x)
            assert logits.dtype == dtype
            value = loss(logits, teacher, target, backend=backend)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        found.append((value.detach(), gradients(student)))
        scaler.step(optimizer)
        scaler.update()
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], rtol=0.02, atol=0.02)


def test_sixteen_bits_cost_a_rounding(loss):
    """A gradient in bfloat16 is within twice of what rounding it costs; nothing else is lost."""
    _, _, teacher, target = networks(classes=300)
    logits = torch.randn(8, 300, device=DEVICE).bfloat16()
    teacher = teacher.bfloat16()
    found = []
    for backend, wide in (("gpu", logits), ("reference", logits.double())):
        student = wide.clone().requires_grad_()
        value = loss(student, teacher.to(wide.dtype), target, reduction="sum", backend=backend)
        value.backward()
        found.append((value.detach().double(), student.grad.double()))
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    largest = found[1][1].abs().amax(1, keepdim=True)
    assert ((found[0][1] - found[1][1]).abs() <= 2 * 2.0**-9 * largest).all()


def test_a_compiled_step(loss):
    student, x, teacher, target = networks()

    def step(x):
        return 3 * loss(student(x), teacher, target, backend="gpu")

    step(x).backward()
    expected = gradients(student)
    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        student.zero_grad()
        compiled(x).backward()
        assert_close(gradients(student), expected)


def test_a_captured_step_takes_new_numbers(loss):
    student, x, teacher, target = networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        value = 2 * loss(student(x), teacher, target, backend="gpu")
        value.backward()
        return value

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (2, 3):
        torch.manual_seed(seed)
        x.normal_()
        teacher.normal_()
        graph.replay()
        value, found = captured.clone(), [g.clone() for g in gradients(student)]
        again = 2 * loss(student(x), teacher, target, backend="gpu")
        assert_close(value, again.detach())
        assert_close(found, list(torch.autograd.grad(again, student.parameters())))


def test_the_same_twice_bit_for_bit(loss):
    torch.manual_seed(1)
    teacher, target = torch.randn(300, 1000, device=DEVICE), torch.randint(1000, (300,), device=DEVICE)
    logits = torch.randn(300, 1000, device=DEVICE)
    found = []
    for _ in range(2):
        student = logits.clone().requires_grad_()
        value = loss(student, teacher, target, backend="gpu")
        value.backward()
        found.append((value.detach(), student.grad))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_walked_back_in_other_ways(loss):
    """Twice; through a value used twice; checkpointed; with hooks; several directions at once."""
    student, x, teacher, target = networks()

    def value(weight, **options):
        return loss(x @ weight.t(), teacher, target, backend="gpu", **options)

    weight = student.weight
    (expected,) = torch.autograd.grad(loss(x @ weight.t(), teacher, target, backend="reference"), weight)
    once = value(weight)
    (both,) = torch.autograd.grad(2 * once + 3 * once, weight, retain_graph=True)
    (again,) = torch.autograd.grad(once, weight)
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_close((both, again), (5 * expected, expected), **close)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(once, weight)
    for reentrant in (False, True):
        student.zero_grad()
        (2 * checkpoint(value, weight, use_reentrant=reentrant)).backward()
        assert_close(weight.grad, 2 * expected, **close)
    seen = []
    logits = (x @ weight.t()).detach().requires_grad_()
    logits.register_hook(seen.append)
    (4 * loss(logits, teacher, target, backend="gpu")).backward()
    assert_close(seen[0].t() @ x, 4 * expected, **close)
    rows = value(weight, reduction="none")
    directions = torch.eye(len(rows), device=DEVICE)
    (each,) = torch.autograd.grad(rows, weight, directions, is_grads_batched=True)
    assert_close(each.mean(0), expected, **close)


def test_nothing_to_do(loss):
    student = torch.randn(0, 5, device=DEVICE, requires_grad=True)
    value = loss(student, student.detach(), torch.empty(0, dtype=torch.int64, device=DEVICE), backend="gpu")
    value.backward()
    assert student.grad.shape == (0, 5)


@kernels
def test_an_image_is_not_copied():
    """(N, C, H, W), and the same with the classes last in memory: little is allocated but the gradient."""
    shape = (2, 19, 256, 256)
    for layout in (torch.contiguous_format, torch.channels_last):
        student, teacher = (torch.randn(shape, device=DEVICE).to(memory_format=layout) for _ in range(2))
        student.requires_grad_()
        luce.kd_loss(student, teacher, backend="gpu").backward()
        student.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        luce.kd_loss(student, teacher, backend="gpu").backward()
        more = torch.cuda.max_memory_allocated() - before
        assert more < 1.5 * student.numel() * student.element_size()


@kernels
def test_strides_beyond_two_to_the_31st():
    far = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 3 * far:
        pytest.skip("needs 6.5 GB of free memory on the device")
    memory = torch.empty(far, dtype=torch.bfloat16, device=DEVICE)
    for shape, strides in (((2, 8), (2**31 + 16, 1)), ((2, 3), (8, 2**30 + 8))):
        student, teacher = torch.randn(2, *shape, device=DEVICE).bfloat16()
        view = memory.as_strided(shape, strides)
        view.copy_(student)
        found = []
        for logits in (view, student):
            logits = logits.detach().requires_grad_()
            value = luce.kd_loss(logits, teacher, reduction="none", backend="gpu")
            found.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
        assert_close(found[0], found[1], rtol=0, atol=0)


def test_networks_on_different_devices():
    """The words are those of the CPU."""
    here, there = torch.zeros(2, 5, device=DEVICE), torch.zeros(2, 5)
    for loss in (luce.kd_loss, luce.pld_loss):
        with pytest.raises(ValueError, match=r"expected `teacher_logits` on cuda:0 .* got cpu; move it with"):
            loss(here, there, torch.zeros(2, dtype=torch.int64, device=DEVICE))


def test_a_device_that_is_not_the_current_one(loss):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    found = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(1)
        teacher, student, target = torch.randn(6, 9), torch.randn(6, 9), torch.randint(9, (6,))
        student = student.to(device).requires_grad_()
        (2 * loss(student, teacher.to(device), target.to(device), backend="gpu")).backward()
        found.append(student.grad.cpu())
    assert_close(found[0], found[1], rtol=0, atol=0)


IN_PARALLEL = """
import torch, torch.distributed as dist
import luce
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("nccl")
rank, device = dist.get_rank(), "cuda"
torch.cuda.set_device(rank)
torch.manual_seed(0)
student = torch.nn.Linear(6, 9).to(device)
x, teacher = torch.randn(8, 6).to(device), torch.randn(8, 9).to(device)
(whole,) = torch.autograd.grad(luce.kd_loss(student(x), teacher, backend="reference"), student.weight)
mine = slice(rank, None, 2)
wrapped = DistributedDataParallel(student)
for _ in range(2):
    student.zero_grad()
    luce.kd_loss(wrapped(x[mine]), teacher[mine], backend="gpu").backward()
    torch.testing.assert_close(student.weight.grad, whole)
dist.destroy_process_group()
"""


@kernels
def test_two_devices_in_parallel(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    (tmp_path / "step.py").write_text(IN_PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(tmp_path / "step.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
