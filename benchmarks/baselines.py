"""Candidates and baselines: each a step, a function of `Inputs`.

A name is looked up when it is called, so that a package that is missing costs its own figures and no others.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import luce
from luce.errors import MissingExtra, import_optional

from .cases import HELD, PER_ALGORITHM, PRODUCTS, Case
from .inputs import Inputs

Step = Callable[..., Any]
"""Takes `Inputs` and, if it is a candidate, the engine to use as ``backend``."""
TEMPERATURE = 4.0


def run(step: Step, inputs: Inputs, *, backward: bool) -> None:
    """Take one step as a training loop does: outputs are allocated anew, gradients start from None."""
    if not backward:
        with torch.no_grad():
            step(inputs)
        return
    value = step(inputs)
    if value is not None:
        value.backward(None if value.ndim == 0 else inputs.upstream)
    for tensor in inputs.trained():
        tensor.grad = None


def eager_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def eager_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The usual distillation loss: KL divergence and cross-entropy."""
    return eager_kl_div(student, teacher) + F.cross_entropy(student, target)


def lean_pld(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """PLD in few float32 steps, as in the paper's listing: worst class first, so that no flip is needed."""
    student, teacher = student.float(), teacher.float()
    order = teacher.argsort(-1)
    others = order[order != target[:, None]].view(len(order), -1)
    order = torch.cat([others, target[:, None]], -1)
    u, alpha = student.gather(-1, order), teacher.softmax(-1).gather(-1, order)
    return (alpha * (u.logcumsumexp(-1) - u)).sum(-1).mean()


def eager_rkkd(student: Tensor, teacher: Tensor) -> Tensor:
    """RKKD as its formula reads, all pairs of classes at once."""
    d_s, d_t = (x[:, :, None] - x[:, None, :] for x in (student, teacher))
    rows, classes = student.shape
    return 1 - (d_t.tanh() * d_s.tanh()).sum() / (rows * classes * (classes - 1))


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scipy_softmax(x: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(x, axis=-1)


@functools.cache
def _onnx_softmax(threads: int) -> Callable[[np.ndarray], np.ndarray]:
    onnxruntime = import_optional("onnxruntime", "bench")
    helper = import_optional("onnx.helper", "bench")
    float32 = import_optional("onnx", "bench").TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, float32, ["N", "C"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], axis=-1)], "softmax", [x], [y])
    # Versions that every onnxruntime of the last years reads, whatever onnx writes by default.
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda array: session.run(None, {"x": array})[0]


def liger_kd(student: Tensor, teacher: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerKLDIVLoss

    log_q, p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    return LigerKLDIVLoss(reduction="batchmean")(log_q, p) * TEMPERATURE**2


def liger_cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(student, target)


def liger_linear_kd(i: Inputs) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    pair = (i.student, i.student_head, i.teacher, i.teacher_head)
    return liger_fused_linear_jsd(*pair, i.target, jsd_beta=0.0, temperature=TEMPERATURE) * TEMPERATURE**2


def trl_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=0.5, temperature=TEMPERATURE)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


@functools.cache
def _op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"luce.ops.{module}"), name)


def _step(function: Callable[..., Tensor], fields: str, **options: Any) -> Step:
    get = operator.attrgetter(*fields.split())
    return lambda inputs, **more: function(*get(inputs), **options, **more)


def _linear(loss: Callable[..., Tensor], **options: Any) -> Step:
    return lambda i: loss(*_heads(i), i.target, **options)


def _heads(i: Any) -> tuple[luce.LinearLogits, luce.LinearLogits]:
    return luce.LinearLogits(i.student, i.student_head), luce.LinearLogits(i.teacher, i.teacher_head)


def _held(i: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    """KD on logits that the heads make whole."""
    return eager_kl_div(*(head.logits().to(dtype or i.student.dtype) for head in _heads(i)))


@torch.no_grad()
def _products(i: Any) -> None:
    """The matrix products that every loss from hidden states needs, forward and backward."""
    logits = i.student @ i.student_head.T
    logits.T @ i.student
    logits @ i.student_head
    i.teacher @ i.teacher_head.T


def _both(i: Inputs, **more: Any) -> Tensor:
    kd = luce.kd_loss(i.student, i.teacher, temperature=TEMPERATURE, **more)
    return kd + luce.cross_entropy_loss(i.student, i.target, **more)


_PAIR, _LABELLED, _ALONE = "student teacher", "student teacher target", "student target"

CANDIDATES: dict[str, Step] = {
    "PLD": _step(luce.pld_loss, _LABELLED),
    "PLD exact": _step(luce.pld_loss, _LABELLED, tolerance=0),
    "PLD exact, order given": lambda i: luce.pld_loss(
        i.student, i.teacher, i.target, tolerance=0, teacher_order=i.order
    ),
    "PLD top_k=128": _step(luce.pld_loss, _LABELLED, top_k=128),
    "KD": _step(luce.kd_loss, _PAIR, temperature=TEMPERATURE),
    "KD + CE": _both,
    "CE": _step(luce.cross_entropy_loss, _ALONE),
    "reverse KL": _step(luce.reverse_kl_loss, _PAIR, temperature=TEMPERATURE),
    "JSD": _step(luce.jsd_loss, _PAIR, temperature=TEMPERATURE),
    "DKD": _step(luce.dkd_loss, _LABELLED, temperature=TEMPERATURE),
    "RKKD": _step(luce.rkkd_loss, _PAIR),
    "suffix_logsumexp": lambda i, **more: _op("suffix_logsumexp", "suffix_logsumexp")(i.student, **more),
    "op pld": lambda i: _op("pld", "pld")(i.student, i.teacher, i.target),
    "linear KD": _linear(luce.linear_kd_loss, temperature=TEMPERATURE),
    "linear PLD top_k=128": _linear(luce.linear_pld_loss, top_k=128),
}
BASELINES: dict[str, Step] = {
    "eager kl_div": _step(eager_kl_div, _PAIR),
    "eager KD": _step(eager_kd, _LABELLED),
    "eager CE": _step(F.cross_entropy, _ALONE),
    "eager PLD": _step(luce.pld_loss, _LABELLED, backend="reference"),
    "eager RKKD": _step(eager_rkkd, _PAIR),
    "lean float32 PLD": _step(lean_pld, _LABELLED),
    "compiled eager kl_div": lambda i: _compiled(eager_kl_div)(i.student, i.teacher),
    "compiled eager KD": lambda i: _compiled(eager_kd)(i.student, i.teacher, i.target),
    "compiled eager CE": lambda i: _compiled(F.cross_entropy)(i.student, i.target),
    "compiled eager PLD": lambda i: _compiled(_reference_pld)(i.student, i.teacher, i.target),
    **{
        f"reference {name}": functools.partial(CANDIDATES[name], backend="reference")
        for name in ("reverse KL", "JSD", "DKD", "RKKD")
    },
    "flipped logcumsumexp": lambda i: i.student.flip(-1).logcumsumexp(-1).flip(-1),
    "torch.softmax": lambda i: i.student.softmax(-1),
    "scipy": lambda i: scipy_softmax(i.student.numpy()),
    "numpy": lambda i: numpy_softmax(i.student.numpy()),
    "ONNX Runtime": lambda i: _onnx_softmax(torch.get_num_threads())(i.student.numpy()),
    "Liger KD": _step(liger_kd, _PAIR),
    "Liger CE": _step(liger_cross_entropy, _ALONE),
    "Liger linear KD": liger_linear_kd,
    "TRL JSD": _step(trl_jsd, _PAIR),
    PRODUCTS: _products,
    HELD: _held,
    f"{HELD} in float32": functools.partial(_held, dtype=torch.float32),
}


def _reference_pld(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return luce.pld_loss(student, teacher, target, backend="reference")


def find(name: str) -> Step:
    """Return the step of a name; ``softmax ALGORITHM`` names each algorithm of the operator."""
    operation, _, algorithm = name.partition(" ")
    if operation == "softmax":
        return lambda i: _op("softmax", "softmax")(i.student, algorithm=algorithm)
    return CANDIDATES[name] if name in CANDIDATES else BASELINES[name]


def names(case: Case) -> list[str]:
    """Return the candidate, then the baselines, each once, all algorithms in the place of `PER_ALGORITHM`."""
    try:
        algorithms = [f"softmax {algorithm}" for algorithm in _op("softmax", "ALGORITHMS")]
    except (ImportError, AttributeError):
        algorithms = [PER_ALGORITHM]  # reported as missing when it runs
    expanded = [case.candidate]
    for name in case.baselines:
        expanded += algorithms if name == PER_ALGORITHM else [name]
    return list(dict.fromkeys(expanded))


def reason(error: Exception) -> str:
    """Return why a step did not run, in a sentence."""
    if isinstance(error, MissingExtra):
        return f"not installed: {error}"
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("luce."):
        return f"not in this Luce: `{error.name}`"
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return f"not in this Luce: {error}"
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
