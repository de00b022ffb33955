"""What the modules inside a network return, caught while it runs."""

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
    """Forward hooks on named modules of a network, for as long as a ``with`` block.

    A path is the dotted name of a module, such as ``stages.0`` or ``pool``, and stands for what the module
    returns; ``stages.0.2.act:input`` stands for what it is given, here the map before the block's activation.
    ``stages.0.-1`` counts from behind. The wrappers around a network need no mention (`Classifier`,
    ``torch.compile``, ``DistributedDataParallel``), and hooks stay where they are when one is put on later:
    to compile a network, hook it first.

    Of a tuple, a dict or an output object of Hugging Face it is the first tensor that is caught.

    Args:
        model: The network; itself unchanged.
        paths: Of the modules. One that is given twice counts once.

    Raises:
        UserError: If there is no such module; names the nearest ones.

    Example:
        >>> from luce import models
        >>> model = models.build("cnn", classes=10, input_shape=(1, 8, 8))
        >>> with Features(model, ["stages.0", "pool"]) as features:
        ...     with features.capture() as seen:
        ...         logits = model(torch.zeros(2, 1, 8, 8))
        >>> {path: tuple(tensor.shape) for path, tensor in seen.items()}
        {'stages.0': (2, 64, 4, 4), 'pool': (2, 64)}
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self._seen: dict[str, tuple[Tensor, int]] | None = None
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
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """Catch in one forward pass; the mapping from paths to tensors is filled when the block ends.

        Outside of this block the hooks do nothing, and nobody but the caller keeps what was caught.

        Raises:
            UserError: If a module ran not at all or more than once, returned no tensor, or what it returned
                was changed in place before the block ended.
        """
        seen: dict[str, tuple[Tensor, int]] = {}
        self._seen, self._with_gradient = seen, torch.is_grad_enabled()
        features: dict[str, Tensor] = {}
        try:
            yield features
        finally:
            self._seen = None
        for path in self.paths:
            if path not in seen:
                raise UserError(f"the module of `{path}` did not run in this forward pass; name another")
            features[path], version = seen[path]
            if version not in (UNKNOWN, _version(features[path])):
                raise UserError(
                    f"what was caught at `{path}` has been changed in place since, as by ReLU(inplace=True); "
                    "name the module that changes it, or build the network without in-place operations"
                )

    def _hook(self, module: nn.Module, path: str) -> RemovableHandle:
        # Plain functions rather than bound methods: a copy of the network then shares this object.
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._seen is not None:
                self._keep(path, (args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._seen is not None:
                self._keep(path, output)

        if path.endswith(INPUT):
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _keep(self, path: str, value: Any) -> None:
        assert self._seen is not None
        if path in self._seen:
            raise UserError(
                f"the module of `{path}` runs more than once in a forward pass, so that its features are "
                "several; name a module that runs once"
            )
        tensor = first_tensor(value)
        if tensor is None:
            raise UserError(f"expected a tensor at `{path}`, got {type(value).__name__}; name another module")
        if self._with_gradient and not torch.is_grad_enabled():
            raise UserError(
                f"the module of `{path}` runs without gradients inside the network, as under reentrant "
                "checkpointing; use `use_reentrant=False`, or name a module outside of it"
            )
        self._seen[path] = tensor, _version(tensor)


UNKNOWN = -1


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place, where PyTorch keeps count."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return UNKNOWN
    return tensor._version


def first_tensor(value: object) -> Tensor | None:
    """The first tensor in what a module was given or returned, outermost first; None if there is none."""
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
    """The module that a path names, below any wrapper of the network; see `Features`.

    Raises:
        UserError: If there is none; names the nearest ones.
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
    """What a wrapper holds; None if it is none."""
    if isinstance(network, (DistributedDataParallel, DataParallel)):
        return network.module
    if isinstance(network, Classifier):
        return network.body
    return getattr(network, "_orig_mod", None)  # of torch.compile
