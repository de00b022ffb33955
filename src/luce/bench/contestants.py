"""Who is measured: our functions and what they are compared with, each a function of `Inputs`.

They are looked up when they are called, so that a missing one costs its own figures and nothing else.
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

from ..errors import MissingExtra, import_optional
from .cases import PER_ALGORITHM
from .inputs import Inputs

Step = Callable[[Inputs], Any]
TEMPERATURE = 4.0
COMPILED = "compiled "

_pld: Callable[..., Tensor] = luce.pld_loss


def eager_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def eager_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """What distillation costs everybody else: KL divergence and cross-entropy."""
    return eager_kl_div(student, teacher) + F.cross_entropy(student, target)


def eager_pld(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return _pld(student, teacher, target, backend="reference")


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


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


@functools.cache
def _op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"luce.ops.{module}"), name)


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


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


def _scipy_softmax(array: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(array, axis=-1)


def _call(function: Callable[..., Tensor], fields: str, **options: Any) -> Step:
    get = operator.attrgetter(*fields.split())
    return lambda inputs: function(*get(inputs), **options)


_PAIR, _LABELLED = "student teacher", "student teacher target"

CONTESTANTS: dict[str, Step] = {
    "PLD": _call(_pld, _LABELLED),
    "PLD exact": _call(_pld, _LABELLED, tolerance=0),
    "PLD exact, order given": lambda i: _pld(
        i.student, i.teacher, i.target, tolerance=0, teacher_order=i.order
    ),
    "PLD top_k=128": _call(_pld, _LABELLED, top_k=128),
    "KD": _call(luce.kd_loss, _PAIR, temperature=TEMPERATURE),
    "KD + CE": lambda i: (
        luce.kd_loss(i.student, i.teacher, temperature=TEMPERATURE)
        + luce.cross_entropy_loss(i.student, i.target)
    ),
    "reverse KL": _call(luce.reverse_kl_loss, _PAIR, temperature=TEMPERATURE),
    "JSD": _call(luce.jsd_loss, _PAIR, temperature=TEMPERATURE),
    "DKD": _call(luce.dkd_loss, _LABELLED, temperature=TEMPERATURE),
    "RKKD": _call(luce.rkkd_loss, _PAIR),
    "suffix_logsumexp": lambda i: _op("suffix_logsumexp", "suffix_logsumexp")(i.student),
    "op pld": lambda i: _op("pld", "pld")(i.student, i.teacher, i.target),
    "eager kl_div": _call(eager_kl_div, _PAIR),
    "eager KD": _call(eager_kd, _LABELLED),
    "eager PLD": _call(eager_pld, _LABELLED),
    "eager RKKD": _call(eager_rkkd, _PAIR),
    "lean float32 PLD": _call(lean_pld, _LABELLED),
    "compiled eager KD": lambda i: _compiled(eager_kd)(i.student, i.teacher, i.target),
    "compiled eager PLD": lambda i: _compiled(eager_pld)(i.student, i.teacher, i.target),
    "reference reverse KL": _call(luce.reverse_kl_loss, _PAIR, temperature=TEMPERATURE, backend="reference"),
    "reference JSD": _call(luce.jsd_loss, _PAIR, temperature=TEMPERATURE, backend="reference"),
    "reference DKD": _call(luce.dkd_loss, _LABELLED, temperature=TEMPERATURE, backend="reference"),
    "reference RKKD": _call(luce.rkkd_loss, _PAIR, backend="reference"),
    "flipped logcumsumexp": lambda i: i.student.flip(-1).logcumsumexp(-1).flip(-1),
    "torch.softmax": lambda i: i.student.softmax(-1),
    "scipy": lambda i: _scipy_softmax(i.student.numpy()),
    "numpy": lambda i: numpy_softmax(i.student.numpy()),
    "ONNX Runtime": lambda i: _onnx_softmax(torch.get_num_threads())(i.student.numpy()),
}


def find(name: str) -> Step:
    """The step of a name; ``softmax ALGORITHM`` is every algorithm there is."""
    operation, _, algorithm = name.partition(" ")
    if operation != "softmax":
        return CONTESTANTS[name]
    return lambda i: _op("softmax", "softmax")(i.student, algorithm=algorithm)


def names(candidate: str, baselines: tuple[str, ...]) -> list[str]:
    """The candidate, then its baselines, each once, with all algorithms in the place of `PER_ALGORITHM`."""
    try:
        algorithms = [f"softmax {algorithm}" for algorithm in _op("softmax", "ALGORITHMS")]
    except (ImportError, AttributeError):
        algorithms = [PER_ALGORITHM]  # to be reported as missing
    found = [candidate]
    for name in baselines:
        found += algorithms if name == PER_ALGORITHM else [name]
    return list(dict.fromkeys(found))


def reason(error: Exception) -> str:
    """Why a contestant did not run, in a sentence."""
    if isinstance(error, MissingExtra):
        return f"not installed: {error}"
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("luce."):
        return f"not in this Luce: `{error.name}`"
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return f"not in this Luce: {error}"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
