"""How a loss is called: adapters for the usual signatures, and a loss with what it claims."""

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
    """From logits ``(N, C)`` of student and teacher and labels ``(N,)`` to a call of somebody's loss.

    Attributes:
        text: How the loss is called, for the help.
        call: ``call(loss, student_logits, teacher_logits, target)``.
        takes_target: Whether the labels reach the loss.
        takes_teacher: Whether the teacher's logits do.
        takes_infinity: Whether a logit of -inf does; as a matrix product it cannot.
    """

    text: str
    call: Call
    takes_target: bool = True
    takes_teacher: bool = True
    takes_infinity: bool = True


def _everywhere(logits: Tensor) -> Mapping[str, Any]:
    """The recorded inputs and outputs of a network whose every module gave the logits."""
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
    """A loss under examination: a callable, how it is called, and what it claims.

    Attributes:
        function: Gives a scalar tensor, or a mapping of named terms with their sum under ``"loss"``.
        adapter: How it is called.
        options: Keyword arguments of the function, or of the constructor if it is a class.
        claims: Laws, or groups of laws, that not every loss obeys and this one does.
        name: As reports call it.
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
        """Find out how to call it from its signature, unless the adapter is named.

        Raises:
            UserError: If there is no such adapter, or an option that the function does not take.
        """
        if isinstance(function, Loss):
            given = function
            adapter = given.adapter if adapter == "auto" else adapter
            options, claims = {**given.options, **(options or {})}, (*given.claims, *claims)
            function, name = given.function, name or given.name
        name = name or str(getattr(function, "__name__", type(function).__name__))
        known = parameters_of(function)
        for option in options or {}:
            if known is not None and option not in known:
                raise unknown_name(f"option of `{name}`", option, known)
        if isinstance(adapter, str):
            adapter = ADAPTERS[adapter_name(function, adapter)]
        return cls(function, adapter, dict(options or {}), tuple(claims), name)

    def __str__(self) -> str:
        return f"{self.name} {json.dumps(self.options, default=str)}" if self.options else self.name

    def option(self, *names: str) -> inspect.Parameter | None:
        """The first of these options that the function has."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return None
        return next((parameters[name] for name in names if name in parameters), None)

    def with_options(self, **more: Any) -> Loss:
        """The same loss, called or built with these options too."""
        return replace(self, options={**self.options, **more})

    @cached_property
    def _callable(self) -> Callable[..., Any]:
        if inspect.isclass(self.function):
            return cast("Callable[..., Any]", self.function(**self.options))
        return partial(self.function, **self.options) if self.options else self.function

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Any:
        """What the function returns; what it draws at random it draws alike each time."""
        state = torch.random.get_rng_state()
        try:
            torch.default_generator.manual_seed(0)  # torch.manual_seed also asks after every device
            return self.adapter.call(self._callable, student, teacher, target)
        finally:
            torch.random.set_rng_state(state)


def adapter_name(function: Callable[..., Any], name: str = "auto") -> str:
    """`name`, or what the names of the parameters suggest where that is ``"auto"``."""
    if name != "auto":
        if name not in ADAPTERS:
            raise unknown_name("adapter", name, [*ADAPTERS, "auto"])
        return name
    kind = function if inspect.isclass(function) else type(function)
    called = getattr(function, "forward", function) if issubclass(kind, nn.Module) else function
    known = [word for word in parameters_of(called, even_if_any=True) or [] if word != "self"]
    if "student_io_dict" in known:
        return "torchdistill"
    if "student_weight" in known:
        return "liger"
    if "num_items_in_batch" in known:
        return "trl"
    if issubclass(kind, nn.KLDivLoss):
        return "log_probs"
    if known[1:2] and known[1] in LABELS[:4]:
        return "student"
    return "plain" if known[2:3] and known[2] in LABELS else "unlabelled"


def parameters_of(function: Callable[..., Any], even_if_any: bool = False) -> list[str] | None:
    """Names of what it takes; None if that cannot be told, or if it takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    any_keyword = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if any_keyword and not even_if_any else list(parameters)


def find(path: str) -> Callable[..., Any] | Loss:
    """What ``module:attribute`` names; importing the module runs its code.

    Raises:
        UserError: If there is no such module or attribute, or it cannot be called.
    """
    module_name, _, attributes = path.partition(":")
    if not module_name or not attributes:
        raise UserError(f"expected `module:callable`, such as luce:kd_loss, got `{path}`")
    try:
        found: Any = importlib.import_module(module_name)
    # The user's module may fail in any way, or quit; the cause stays in the traceback.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"could not import `{module_name}` for `{path}` ({type(error).__name__}: {error})"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            public = [name for name in dir(found) if not name.startswith("_")]
            raise unknown_name(f"attribute of `{module_name}`", attribute, public)
        found = getattr(found, attribute)
    if not callable(found):
        raise UserError(f"expected `{path}` to name a loss, got an object of type {type(found).__name__}")
    checked: Callable[..., Any] | Loss = found
    return checked
