"""Calling a loss: adapters for the usual signatures, and a loss together with its options and claims."""

from __future__ import annotations

import importlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserError, unknown_name

Call = Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Any]

TEMPERATURES = ("temperature", "T", "tau", "temp", "kd_temperature")
LABELS = ("target", "targets", "label", "labels", "y", "y_true")


@dataclass(frozen=True)
class Adapter:
    """Calls a loss with logits ``(N, C)`` of student and teacher and labels ``(N,)``.

    Attributes:
        text: The call, for the help.
        call: ``call(loss, student_logits, teacher_logits, target)``.
        takes_target: Whether the adapter passes the labels.
        takes_teacher: Whether it passes the teacher's logits.
        takes_infinity: Whether it can pass a logit of -inf. A loss that multiplies inputs by weights cannot
            receive one: 0 * inf is NaN.
    """

    text: str
    call: Call
    takes_target: bool = True
    takes_teacher: bool = True
    takes_infinity: bool = True


def _everywhere(logits: Tensor) -> Mapping[str, Any]:
    """Recorded inputs and outputs of a network in which every module returned the logits."""
    return defaultdict(lambda: defaultdict(lambda: logits))


def _liger(loss: Callable[..., Any], student: Tensor, teacher: Tensor, target: Tensor) -> Any:
    heads = [torch.eye(logits.shape[1], dtype=logits.dtype) for logits in (student, teacher)]
    return loss(student, heads[0], teacher, heads[1], target)


ADAPTERS: dict[str, Adapter] = {
    "plain": Adapter("loss(student_logits, teacher_logits, target)", lambda f, s, t, y: f(s, t, y)),
    "unlabelled": Adapter(
        "loss(student_logits, teacher_logits)", lambda f, s, t, y: f(s, t), takes_target=False
    ),
    "student": Adapter("loss(student_logits, target)", lambda f, s, t, y: f(s, y), takes_teacher=False),
    "log_probs": Adapter(
        "loss(student_log_probs, teacher_probs), as torch.nn.KLDivLoss",
        lambda f, s, t, y: f(s.log_softmax(-1), t.softmax(-1)),
        takes_target=False,
    ),
    "log_targets": Adapter(
        "loss(student_log_probs, teacher_log_probs)",
        lambda f, s, t, y: f(s.log_softmax(-1), t.log_softmax(-1)),
        takes_target=False,
    ),
    "torchdistill": Adapter(
        "loss(student_io_dict, teacher_io_dict, targets), the logits at every path",
        lambda f, s, t, y: f(_everywhere(s), _everywhere(t), y),
    ),
    "trl": Adapter(
        "loss(student_logits, teacher_logits, labels) with logits (1, N, C): generalized_jsd_loss",
        lambda f, s, t, y: f(s[None], t[None], labels=y[None]),
    ),
    "liger": Adapter(
        "loss(student_input, student_weight, teacher_input, teacher_weight, labels), identity weights",
        _liger,
        takes_infinity=False,
    ),
}


@dataclass(frozen=True)
class Loss:
    """A loss under test: a callable, how to call it, and the laws that it claims.

    Attributes:
        function: Returns a scalar tensor, or a mapping of named terms with their sum under ``"loss"``.
        adapter: How to call it.
        options: Keyword arguments of the function, or of the constructor if it is a class.
        claims: Laws, or groups of laws, that a sound loss need not obey and this one does.
        name: Its name in reports.
    """

    function: Callable[..., Any]
    adapter: Adapter = ADAPTERS["plain"]
    options: Mapping[str, Any] = field(default_factory=dict)
    claims: Collection[str] = ()
    name: str = "loss"

    @classmethod
    def of(
        cls,
        function: Callable[..., Any] | Loss,
        adapter: str | Adapter = "auto",
        *,
        options: Mapping[str, Any] | None = None,
        claims: Collection[str] = (),
        name: str | None = None,
    ) -> Loss:
        """Wrap a callable; unless the adapter is named, choose it by the signature.

        Raises:
            UserError: If the adapter is unknown, or the function does not accept an option.
        """
        if isinstance(function, Loss):
            base = function
            adapter = base.adapter if adapter == "auto" else adapter
            options, claims = {**base.options, **(options or {})}, (*base.claims, *claims)
            function, name = base.function, name or base.name
        name = name or str(getattr(function, "__name__", type(function).__name__))
        accepted = parameters_of(function)
        for option in options or {}:
            if accepted is not None and option not in accepted:
                raise unknown_name(f"option of `{name}`", option, accepted)
        if isinstance(adapter, str):
            adapter = ADAPTERS[adapter_name(function, adapter)]
        return cls(function, adapter, dict(options or {}), tuple(claims), name)

    def __str__(self) -> str:
        return f"{self.name} {json.dumps(self.options, default=str)}" if self.options else self.name

    def option(self, *names: str) -> inspect.Parameter | None:
        """The first of these parameters that the function has."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return None
        return next((parameters[name] for name in names if name in parameters), None)

    def with_options(self, **more: Any) -> Loss:
        """The same loss with further options."""
        return replace(self, options={**self.options, **more})

    @cached_property
    def _callable(self) -> Callable[..., Any]:
        if inspect.isclass(self.function):
            return cast("Callable[..., Any]", self.function(**self.options))
        return partial(self.function, **self.options) if self.options else self.function

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Any:
        """Call the function with a fixed random seed; the caller's random state is restored."""
        state = torch.random.get_rng_state()
        try:
            # `torch.manual_seed` would seed every GPU too, and start CUDA for it.
            torch.default_generator.manual_seed(0)
            return self.adapter.call(self._callable, student, teacher, target)
        finally:
            torch.random.set_rng_state(state)


def adapter_name(function: Callable[..., Any], name: str = "auto") -> str:
    """Return `name`, or for ``"auto"`` the adapter that the names of the parameters suggest.

    Raises:
        UserError: If there is no adapter of this name.
    """
    if name != "auto":
        if name not in ADAPTERS:
            raise unknown_name("adapter", name, [*ADAPTERS, "auto"])
        return name
    kind = function if inspect.isclass(function) else type(function)
    called = getattr(function, "forward", function) if issubclass(kind, nn.Module) else function
    parameters = [name for name in parameters_of(called, with_var_keyword=True) or [] if name != "self"]
    if "student_io_dict" in parameters:
        return "torchdistill"
    if "student_weight" in parameters:
        return "liger"
    if "num_items_in_batch" in parameters:
        return "trl"
    if issubclass(kind, nn.KLDivLoss):
        return "log_probs"
    # `y_true` as the second of two is a teacher in ranking libraries, and labels only as a third parameter.
    if parameters[1:2] and parameters[1] in LABELS[:4]:
        return "student"
    return "plain" if parameters[2:3] and parameters[2] in LABELS else "unlabelled"


def parameters_of(function: Callable[..., Any], with_var_keyword: bool = False) -> list[str] | None:
    """Names of the parameters; None if the function has no signature.

    A function with ``**kwargs`` accepts any option: the result is None for it too, unless `with_var_keyword`.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    var_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if var_keyword and not with_var_keyword else list(parameters)


def load_loss(path: str) -> Callable[..., Any] | Loss:
    """Import ``module:attribute``; this runs the module's code.

    Raises:
        UserError: If there is no such module or attribute, or the attribute cannot be called.
    """
    module_name, _, attributes = path.partition(":")
    if not module_name or not attributes:
        raise UserError(f"expected `module:callable`, such as luce:kd_loss, got `{path}`")
    try:
        value: Any = importlib.import_module(module_name)
    # A user's module may raise anything, even SystemExit; the cause stays in the traceback of --debug.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"could not import `{module_name}` for `{path}` ({type(error).__name__}: {error})"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            public = [name for name in dir(value) if not name.startswith("_")]
            raise unknown_name(f"attribute of `{module_name}`", attribute, public)
        value = getattr(value, attribute)
    if not callable(value):
        raise UserError(f"expected `{path}` to name a loss, got an object of type {type(value).__name__}")
    loss: Callable[..., Any] | Loss = value
    return loss
