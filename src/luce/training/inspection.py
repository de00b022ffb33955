"""Whether a training can teach at all: a look at the tensors of its first batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .. import log
from ..errors import UserError
from ..methods.observation import Observation, observing
from ..models import Classifier
from ..models.hooks import first_tensor
from ..signals import Signal
from .networks import DOUBT, at_most, check_width, judge_accuracy

Terms = dict[str, Tensor]

COUNTED_BATCHES = 16
"""Batches after which the teacher's accuracy is judged, unless the first one decides."""
SUM_TOLERANCE = 1e-3
"""Difference from 1 of the sum of a row of probabilities; the dtype's precision where that is coarser."""
SCALE = 2.0**16
"""Factor on a term before its gradient is compared with 0, so that 16-bit features do not round it to 0."""


class FirstLook:
    """Looks at the first batches of a training and says what cannot teach.

    It reads the tensors that the step computes anyway, with one synchronisation of a GPU in the first step.
    A term without a gradient gets further chances where the batch has no label; a teacher whose accuracy is
    in doubt, some more batches.

    Args:
        student: Not wrapped for several processes.
        learned: The method's parameters that the student's optimizer trains.
        targets: Labels of all training rows, below 0 where there is none.
    """

    def __init__(self, student: Classifier, learned: Sequence[nn.Parameter], targets: Tensor) -> None:
        self.student = student
        self.learned = [parameter for parameter in learned if parameter.requires_grad]
        self.highest = int(targets.max()) if len(targets) else -1
        self.batches = 0
        self.silent: set[str] | None = None
        self.indirect = False
        self.counts: Tensor | None = None
        self.classes = 0
        self.figures: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        return self.batches > 0 and not self.silent and self.counts is None

    def step(self, batch: Mapping[str, Tensor], compute: Callable[[Mapping[str, Tensor]], Terms]) -> Terms:
        """Compute the terms of a batch and note what `conclude` reads after the backward pass.

        Raises:
            UserError: If the student or the teacher has a single logit; in place of another error, if the
                inputs, the logits or the numbers of classes explain it.
        """
        with observing() as seen, _outputs(self.student) as outputs:
            try:
                terms = compute(batch)
            except (ValueError, RuntimeError) as error:
                _check_widths(outputs, seen.signal)
                if reason := self._explanation(batch, outputs, seen.signal):
                    # A loss that is not finite keeps its kind of error.
                    kind = type(error) if isinstance(error, UserError) else UserError
                    raise kind(reason) from error
                raise
        _check_widths(outputs, seen.signal)
        if self.batches == 0:
            self.figures = _answers(outputs, seen.signal, batch["input"])
            _report_features(seen.features)
        if self.silent or self.silent is None:
            self.indirect = bool(seen.features or self.learned)
            self.figures |= self._gradients(terms, [*outputs, *seen.features.values()])
            self.figures["labelled"] = (batch["target"] >= 0).any()
        self._count(seen)
        self.batches += 1
        return terms

    def conclude(self) -> None:
        """Say what the batch shows, once its backward pass has left the gradients."""
        if self.batches == 1:
            self.figures |= _reached(self.student)
        if self.counts is not None and self.batches in (1, COUNTED_BATCHES):
            self.figures |= {"right": self.counts[0], "rows": self.counts[1]}
        if not self.figures:
            return
        # One transfer for all: each would make the host wait for a GPU.
        device = next(self.student.buffers()).device
        flat = [value.detach().float().sum().to(device) for value in self.figures.values()]
        values = torch.stack(flat).tolist()
        found = dict(zip(self.figures, values, strict=True))
        self.figures = {}
        if self.batches == 1:
            _report_answers(found)
        if "labelled" in found:
            self._report_silence(found)
        if "rows" in found:
            self._report_accuracy(int(found["right"]), int(found["rows"]))

    def close(self) -> None:
        """End the look with the first epoch, and name the terms that no batch gave a gradient."""
        if self.silent:
            _warn_of_silence(self.silent, "in the first epoch")
        if self.counts is not None:
            self._report_accuracy(*map(int, self.counts.tolist()))
        self.silent, self.counts = set(), None

    def _explanation(
        self, batch: Mapping[str, Tensor], outputs: Sequence[Tensor], signal: Signal | None
    ) -> str | None:
        """Return what the tensors of a step that failed show about its cause; None for nothing."""
        inputs = batch["input"]
        if inputs.is_floating_point() and not inputs.isfinite().all():
            return (
                "expected inputs of finite numbers, got NaN or infinity in the first batch; look at the data"
            )
        if signal is not None and _has_no_value(signal.logits):
            return (
                "expected finite logits of the teacher, got NaN or infinity for the first batch; look at its "
                "weights, and at the normalisation and the dtype of its inputs"
            )
        if not outputs:
            return None
        if _has_no_value(outputs[0]):
            return (
                "expected finite logits of the student, got NaN or infinity for the first batch; look at its "
                "initial weights and at the normalisation of its inputs"
            )
        classes, answers = outputs[0].shape[1], None if signal is None else signal.logits
        if answers is not None and answers.ndim == outputs[0].ndim == 2 and answers.shape[1] != classes:
            return (
                f"expected `teacher_logits` of shape {tuple(outputs[0].shape)}, as the student's, got "
                f"{tuple(answers.shape)}: the teacher has {answers.shape[1]} classes, the student {classes}; "
                "give both the same"
            )
        if self.highest >= classes:  # on a GPU the loss is then NaN
            return (
                f"expected labels in [0, {classes}), one for each logit of the student, got {self.highest}; "
                "give the student more logits, or mark rows without a label by -1"
            )
        return None

    def _gradients(self, terms: Terms, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return for each term whether it gives no gradient to the student's outputs or the method.

        At first a term is followed to the last output that it depends on, which is cheap: the way to an
        earlier one leads through the network. A term without a gradient there is followed to all.
        """
        names = [name for name in terms if name != "loss"] or ["loss"]
        figures = {f"value {name}": terms[name] for name in {*names, "loss"}}
        connected = [tensor for tensor in outputs if tensor.grad_fn is not None]
        latest = sorted(connected, key=lambda tensor: -_age(tensor))
        for name in names:
            if self.silent is not None and name not in self.silent:
                continue
            if not terms[name].requires_grad:
                figures[f"cut {name}"] = torch.ones_like(terms[name])
            elif not _repeatable(terms[name], latest):
                figures[f"zero {name}"] = torch.zeros_like(terms[name])
            elif self.silent is None:
                figures[f"zero {name}"] = ~_any_gradient(terms[name], [[tensor] for tensor in latest])
            else:
                figures[f"zero {name}"] = ~_any_gradient(terms[name], [[*latest, *self.learned]])
        return figures

    def _count(self, seen: Observation) -> None:
        """Count the labelled rows and those that the teacher gets right."""
        signal, target = seen.signal, seen.target
        if signal is None or signal.learning or target is None or (self.batches and self.counts is None):
            return
        logits = signal.logits
        if logits.ndim != 2 or target.shape != logits.shape[:1]:
            return
        self.classes = logits.shape[1]
        labelled = (target >= 0) & (target < self.classes)
        counts = torch.stack([(labelled & (logits.argmax(-1) == target)).sum(), labelled.sum()])
        self.counts = counts if self.counts is None else self.counts + counts

    def _report_accuracy(self, right: int, rows: int) -> None:
        problem = judge_accuracy(right, rows, self.classes, "labelled rows of the first batches")
        if problem:
            log.warning(problem)
        clear = rows > 0 and 1 - at_most(right - 1, rows, 1 / self.classes) < DOUBT
        if problem or clear or self.batches >= COUNTED_BATCHES:
            self.counts = None

    def _report_silence(self, found: Mapping[str, float]) -> None:
        """Warn of terms without a gradient; in a batch without a label, wait for one that has."""
        cut = _of(found, "cut ")
        values = {name: found[f"value {name}"] for name in cut if found[f"value {name}"]}
        others = sum(found[f"value {name}"] for name in _of(found, "zero ") if name != "loss")
        # Figures that a loss merely reports are no part of the sum.
        if not math.isclose(others + sum(values.values()), found["value loss"], rel_tol=1e-3, abs_tol=1e-6):
            values = {}
        silent = {*values, *(name for name, is_zero in _of(found, "zero ").items() if is_zero)}
        if found.get("same"):
            silent = set(values)  # the copy explains the others, and was stated
        # Once more: a label may be needed, or an earlier output of the student may have the gradient.
        if silent and (
            (not found["labelled"] and self.highest >= 0) or (self.batches == 1 and self.indirect)
        ):
            self.silent = silent
            return
        if silent:
            _warn_of_silence(silent, "on the first batches")
        elif not found.get("reached", 1.0) and not found.get("same"):
            log.warning(
                "the first batch gives every parameter of the student a gradient of exactly zero; look for "
                "saturated or dead layers, and for a term that is constant"
            )
        self.silent = set()


def _check_widths(outputs: Sequence[Tensor], signal: Signal | None) -> None:
    for logits in outputs:
        check_width("student", logits)
    if signal is not None:
        check_width("teacher", signal.logits)


def _answers(outputs: Sequence[Tensor], signal: Signal | None, inputs: Tensor) -> dict[str, Tensor]:
    """Return what the logits of both networks look like, as numbers on their device."""
    figures: dict[str, Tensor] = {}
    if outputs and outputs[0].ndim == 2:
        figures["student softmax"] = _are_probabilities(outputs[0].detach())
    if signal is None or signal.logits.ndim != 2:
        return figures
    logits = signal.logits
    if signal.kind == "logits":
        inside = (logits >= 0).all() & (logits <= 1).all()
        figures["teacher softmax"] = _are_probabilities(logits)
        figures["teacher sigmoid"] = inside & ((logits > 0) & (logits < 1)).any()
    if signal.kind in ("logits", "probs") and len(logits) > 1:
        figures["teacher constant"] = (logits == logits[:1]).all()
        figures["teacher flat"] = (logits == logits[:, :1]).all()
        figures["inputs constant"] = (inputs == inputs[:1]).all()
    if outputs and outputs[0].shape == logits.shape:
        figures["same"] = (outputs[0].detach() == logits).all()
    return figures


def _report_answers(found: Mapping[str, float]) -> None:
    """Warn of answers that cannot teach, and of outputs that cannot learn."""
    for role in ("student", "teacher"):
        if found.get(f"{role} softmax"):
            log.warning(
                f"the {role} gives probabilities, each row of which sums to 1, where losses expect logits "
                "and apply the softmax; let it return what its softmax receives, or `torch.log` of its output"
            )
    if found.get("inputs constant"):
        log.warning("all rows of the first batch are the same input; look at the data")
    elif found.get("teacher flat"):
        log.warning(
            "the teacher gives all classes the same logit in the first batch, which ranks none; look for "
            "weights that are zero or were not loaded"
        )
    elif found.get("teacher constant"):
        log.warning(
            "the teacher gives every row of the first batch the same logits; look for weights that were not "
            "loaded, and for inputs in another range than it was trained on"
        )
    elif found.get("teacher sigmoid") and not found["teacher softmax"]:
        log.warning(
            "all answers of the teacher to the first batch lie in [0, 1], as behind a sigmoid, where losses "
            "expect logits; let it return what its sigmoid receives, or `torch.logit` of its output"
        )
    if found.get("same"):
        _report_copy(nothing_to_learn=not found.get("reached", 1.0))


def _report_copy(*, nothing_to_learn: bool) -> None:
    start = "the student answers the first batch exactly as its teacher does"
    if nothing_to_learn:
        log.warning(f"{start}, so that it has nothing to learn; start it from other weights")
    else:
        log.info(f"{start}: it starts from a copy of the same weights")


def _report_features(features: Mapping[str, Tensor]) -> None:
    for path, tensor in features.items():
        if not tensor.requires_grad:
            log.warning(
                f"the student's features at `{path}` carry no gradient, so a loss on them cannot teach it; "
                "train the layers before them, or name a later module"
            )


def _reached(student: Classifier) -> dict[str, Tensor]:
    """State which parameters got no gradient; return whether any entry of the others' is not 0."""
    trained = {name: p for name, p in student.body.named_parameters() if p.requires_grad}
    left_out = [name for name, parameter in trained.items() if parameter.grad is None]
    if trained and len(left_out) == len(trained):
        log.warning("the loss gives no parameter of the student a gradient; detach nothing of the student")
    elif left_out:
        named = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        log.info(
            f"{len(left_out)} of the student's {len(trained)} trainable tensors are no part of the loss and "
            f"stay as they are: {named}"
        )
    gradients = [p.grad for p in trained.values() if p.grad is not None and p.grad.layout == torch.strided]
    if not gradients or len(gradients) + len(left_out) < len(trained):
        return {}
    # The first that is not 0 would do, but to look for it would make the host wait for each.
    return {"reached": (torch.stack(torch._foreach_norm(gradients)) != 0).any()}


def _warn_of_silence(names: set[str], when: str) -> None:
    for name in sorted(names):
        what = "the loss" if name == "loss" else f"the term `{name}` of the loss"
        log.warning(
            f"{what} gives the student no gradient {when} and teaches nothing; look for a value that was "
            "detached, frozen layers, or labels that are missing, or leave the term out"
        )


@contextmanager
def _outputs(student: nn.Module) -> Iterator[list[Tensor]]:
    """Note the logits of the student's first forward pass with gradients."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        tensor = first_tensor(output)
        if tensor is not None and torch.is_grad_enabled() and not outputs:
            outputs.append(tensor)

    handle = student.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def _any_gradient(term: Tensor, choices: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return whether a term has a gradient other than 0 to the first of these tensors that it depends on."""
    for tensors in choices:
        gradients = torch.autograd.grad(
            term, tensors, torch.full_like(term, SCALE), retain_graph=True, allow_unused=True
        )
        if used := [(gradient != 0).any() for gradient in gradients if gradient is not None]:
            return torch.stack(used).any()
    return torch.zeros_like(term, dtype=torch.bool)


def _repeatable(term: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Return whether the way from a term to the student's outputs may be differentiated twice.

    Functions of other libraries may change what they saved in their backward pass, as Liger's losses do; the
    second pass, which is the training's, would then be wrong.
    """
    seen = {tensor.grad_fn for tensor in outputs}
    ahead: list[Any] = [term.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and not _is_ours(node):
            return False
        ahead += [following for following, _ in node.next_functions]
    return True


def _is_ours(node: Any) -> bool:
    function = getattr(node, "_forward_cls", type(node))
    return function.__module__.startswith("luce.") or "_luce_" in function.__name__


def _age(tensor: Tensor) -> int:
    """Return the place of a tensor's operation in the order of the forward pass."""
    return int(tensor.grad_fn._sequence_nr()) if tensor.grad_fn is not None else -1


def _are_probabilities(logits: Tensor) -> Tensor:
    tolerance = max(SUM_TOLERANCE, torch.finfo(logits.dtype).eps)
    one = (logits.float().sum(-1) - 1).abs() <= tolerance
    return (logits >= 0).all() & one.all()


def _has_no_value(logits: Tensor) -> bool:
    # -inf excludes a class.
    return bool((logits.isnan() | (logits == torch.inf)).any())


def _of(found: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
