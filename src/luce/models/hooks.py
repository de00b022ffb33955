"""Capturing features: the outputs of modules inside a network during a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..errors import UserError, unknown_name
from .classifier import Classifier

INPUT = ":input"


class Features:
    """Forward hooks on named modules of a network for the duration of a ``with`` block.

    A path is the dotted name of a module, such as ``stages.0`` or ``pool``, and denotes the module's output;
    ``stages.0.2.act:input`` denotes its input, here the map before the block's activation. ``stages.0.-1``
    counts from the end. Paths omit wrappers around the network (`Classifier`, ``torch.compile``,
    ``DistributedDataParallel``). Hooks remain in place when a wrapper is added later: register them before
    compiling a network.

    From a tuple, a dict or an output object of Hugging Face the first tensor is captured.

    Args:
        model: The network; unchanged apart from the hooks.
        paths: Paths of modules; duplicates count once.

    Raises:
        UserError: If a module does not exist; lists the closest names.

    Example:
        >>> from luce import models
        >>> model = models.build("cnn", classes=10, input_shape=(1, 8, 8))
        >>> with Features(model, ["stages.0", "pool"]) as features:
        ...     with features.capture() as captured:
        ...         logits = model(torch.zeros(2, 1, 8, 8))
        >>> {path: tuple(tensor.shape) for path, tensor in captured.items()}
        {'stages.0': (2, 64, 4, 4), 'pool': (2, 64)}
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self._captured: dict[str, tuple[Tensor, int]] | None = None
        self._with_gradient = False
        modules = {path: find(model, path) for path in self.paths}
        self._handles = [self._hook(module, path) for path, module in modules.items()]

    def __enter__(self) -> Features:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """Capture one forward pass; the mapping from paths to tensors is filled when the block ends.

        Outside of this block the hooks do nothing, and this object keeps no reference to the tensors.

        Raises:
            UserError: If a module did not run or ran more than once, returned no tensor, or its output was
                changed in place before the block ended.
        """
        captured: dict[str, tuple[Tensor, int]] = {}
        self._captured, self._with_gradient = captured, torch.is_grad_enabled()
        features: dict[str, Tensor] = {}
        try:
            yield features
        finally:
            self._captured = None
        for path in self.paths:
            if path not in captured:
                raise UserError(
                    f"the module at `{path}` did not run in this forward pass; name another module"
                )
            features[path], version = captured[path]
            if version not in (UNKNOWN, _version(features[path])):
                raise UserError(
                    f"the features at `{path}` were changed in place, as by ReLU(inplace=True); name the "
                    "module that changes them, or build the network without in-place operations"
                )

    def _hook(self, module: nn.Module, path: str) -> RemovableHandle:
        # Plain functions, not bound methods: deepcopy of the network would copy a method's object, and the
        # hooks of the copy would fill that one.
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._captured is not None:
                self._keep(path, (args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._captured is not None:
                self._keep(path, output)

        if path.endswith(INPUT):
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _keep(self, path: str, value: Any) -> None:
        assert self._captured is not None
        if path in self._captured:
            raise UserError(
                f"the module at `{path}` runs more than once in a forward pass, so its features are "
                "ambiguous; name a module that runs once"
            )
        tensor = first_tensor(value)
        if tensor is None:
            raise UserError(f"expected a tensor at `{path}`, got {type(value).__name__}; name another module")
        if self._with_gradient and not torch.is_grad_enabled():
            raise UserError(
                f"the module at `{path}` runs without gradients inside the network, as under reentrant "
                "checkpointing; use `use_reentrant=False`, or name a module outside the checkpoint"
            )
        self._captured[path] = tensor, _version(tensor)


UNKNOWN = -1


def _version(tensor: Tensor) -> int:
    """Return PyTorch's count of in-place changes of a tensor; `UNKNOWN` if PyTorch does not count."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return UNKNOWN
    return tensor._version


def first_tensor(value: object) -> Tensor | None:
    """Return the first tensor in a module's input or output, outermost first; None if there is none."""
    if isinstance(value, Tensor):
        return value
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):  # the outputs of Hugging Face are mappings
        parts = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        parts = value
    for part in parts:
        if (tensor := first_tensor(part)) is not None:
            return tensor
    return None


def find(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, below any wrapper of the network; see `Features`.

    Raises:
        UserError: If there is none; lists the closest names.
    """
    network, name = model, path.removesuffix(INPUT)
    while True:
        with suppress(KeyError):
            return _descend(network, name)
        inner = _unwrapped(network)
        if inner is None:
            known = [known for known, _ in network.named_modules() if known]
            raise unknown_name(f"module of {type(network).__name__}", name, known)
        network = inner


def _descend(network: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        children = dict(network.named_children())
        if part.startswith("-") and part[1:].isdecimal() and 0 < int(part[1:]) <= len(children):
            part = list(children)[int(part)]
        network = children[part]
    return network


def _unwrapped(network: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper; None if ``network`` is not a wrapper."""
    if isinstance(network, (DistributedDataParallel, DataParallel)):
        return network.module
    if isinstance(network, Classifier):
        return network.body
    return getattr(network, "_orig_mod", None)  # set by torch.compile
