"""A network read as the chain that spikes can run through, and what stands in the way of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..errors import UserError
from ..models.binary import WEIGHTED, baked, binary_parts

POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOTHING = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
"""What does nothing in evaluation."""

LISTED = 4
"""Obstacles that an error names."""


@dataclass(frozen=True)
class Obstacle:
    """Something in a network that spikes cannot do.

    Attributes:
        path: Of the module, as `named_modules` has it.
        what: What it is, and what to do about it.
    """

    path: str
    what: str

    def __str__(self) -> str:
        return f"`{self.path}` {self.what}" if self.path else self.what


@dataclass
class Layer:
    """What happens between two activations: a layer with weights, and what is linear around it.

    Attributes:
        path: Of the layer with weights.
        before: From the spikes to the layer: pooling, flattening.
        weighted: The layer itself, without its weights' scales.
        scale: Of each filter, ``(O,)``: all 1 where the weights are real.
        after: From the layer to the activation: pooling. The output of the network is not one.
        binary: Whether the weights are -1 and 1.
    """

    path: str
    before: nn.Sequential
    weighted: nn.Module
    scale: Tensor
    after: nn.Sequential
    binary: bool

    def scaled(self, factor: Tensor | float, bias_factor: Tensor | float) -> nn.Sequential:
        """The layer with each filter's weights and bias multiplied by factors, ``(O,)`` or one for all."""
        layer: Any = copy.deepcopy(self.weighted)
        factors = torch.as_tensor(factor, dtype=layer.weight.dtype, device=layer.weight.device)
        layer.weight.data.mul_(factors.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.data.mul_(torch.as_tensor(bias_factor, dtype=layer.bias.dtype))
        return nn.Sequential(*copy.deepcopy(self.before), layer, *copy.deepcopy(self.after))


class Chain(nn.Module):
    """The same answers as the network it was read from, but for rounding, layer by layer.

    Batch normalisation is part of the layer before it: its factors of the scales (a negative one turns the
    signs around), its shift of the bias.

    Args:
        layers: In order; the last one gives the logits.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.linear = nn.ModuleList(layer.scaled(layer.scale, 1.0) for layer in layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activations(inputs)[-1]

    def activations(self, inputs: Tensor) -> list[Tensor]:
        """After the ReLU of each layer, and the logits."""
        found = [inputs]
        for linear in self.linear[:-1]:
            found.append(F.relu(linear(found[-1])))
        return [*found[1:], self.linear[-1](found[-1])]


class Call(nn.Module):
    """A function of tensors, as a module."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, *self.args, **self.kwargs)


def read(network: nn.Module) -> Chain:
    """The chain that a network is.

    Convolutions and linear layers with ReLU between them, average pooling on either side of the ReLU, biases,
    and batch normalisation right behind a layer with weights can be read; dropout vanishes.

    Args:
        network: From normalised inputs to logits; unchanged.
    Raises:
        UserError: If anything in it does not convert; names the modules.
    Example:
        >>> from luce import models
        >>> network = models.build("binary:vgg_pool", classes=10, input_shape=(1, 8, 8), widths=[4, 8, 8])
        >>> [(layer.path, layer.binary) for layer in read(network).layers]
        [('stem.0', False), ('stages.0.0', True), ('stages.1.0', True), ('head', False)]
    """
    chain, found = _read(network)
    if found:
        listed = "; ".join(map(str, found[:LISTED]))
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise UserError(f"expected a network that converts to spikes: {listed}{more}")
    assert chain is not None
    return chain


def obstacles(network: nn.Module) -> list[Obstacle]:
    """Everything in a network that does not convert; none if `read` can read it.

    Example:
        >>> from luce import models
        >>> for obstacle in obstacles(models.build("cnn", classes=10, input_shape=(1, 8, 8))):
        ...     print(obstacle)
        `stages.0.0` is MaxPool2d, and the largest of some spikes is no sum; use average pooling
    """
    return _read(network)[1]


def _read(network: nn.Module) -> tuple[Chain | None, list[Obstacle]]:
    pieces, found = _pieces(network)
    steps: list[list[tuple[str, nn.Module]]] = [[]]
    for path, piece in pieces:
        if isinstance(piece, nn.ReLU):
            steps.append([])
        else:
            steps[-1].append((path, piece))
    layers = []
    if not found:
        for number, step in enumerate(steps):
            layers.append(_layer(step, last=number == len(steps) - 1, found=found))
        if not found and len(steps) == 1:
            found.append(Obstacle("", "it has no ReLU, so that nothing in it would spike"))
    if found:
        return None, found
    return Chain([layer for layer in layers if layer is not None]).eval(), []


def _pieces(network: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[Obstacle]]:
    """The modules that run one after the other, with their paths."""
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # whatever a forward pass does that cannot be followed
        reason = " ".join(str(error).split())[:160]
        return [], [Obstacle("", f"its forward pass cannot be followed ({type(error).__name__}: {reason})")]
    pieces: list[tuple[str, nn.Module]] = []
    found: list[Obstacle] = []
    strays: list[Obstacle] = []  # what leads nowhere, unless other obstacles say where
    (start, *others) = [node for node in graph.nodes if node.op == "placeholder"]
    previous = start
    for node in graph.nodes:
        if node in (start, *others):
            continue
        if node.op == "output":
            if node.all_input_nodes != [previous] or not isinstance(node.args[0], fx.Node):
                found.append(Obstacle("", "it returns something else than the output of its last layer"))
            continue
        path = node.target if node.op == "call_module" else _place(node)
        if node.all_input_nodes not in ([], [previous]):
            strays.append(Obstacle(path, "branches off, and spikes run along a chain"))
        if len(node.all_input_nodes) > 1:
            found.append(
                Obstacle(path, "joins several paths, as a residual block does, and spikes run along a chain")
            )
        elif node.op == "call_module":
            module = network.get_submodule(node.target)
            if _is_reworked(module):
                found.append(Obstacle(path, "has hooks, or weights that are computed; make them plain"))
            elif isinstance(module, (*WEIGHTED, *POOLS, *NORMS, nn.ReLU, nn.Flatten)):
                pieces.append((path, module))
            elif not isinstance(module, NOTHING):
                found.append(Obstacle(path, _refusal(module)))
        elif (piece := _function(node)) is not None:
            pieces.append((path, piece))
        else:
            name = getattr(node.target, "__name__", node.target)
            found.append(Obstacle(path, f"calls {name}, which has no spiking counterpart"))
        previous = node
    return pieces, found or strays


def _is_reworked(module: Any) -> bool:
    """Whether more happens in a module than its class says, such as pruning or weight normalisation."""
    computed = parametrize.is_parametrized(module) and binary_parts(module) is None
    return bool(computed or module._forward_pre_hooks or module._forward_hooks)


def _place(node: fx.Node) -> str:
    """The module in whose forward pass a function is called."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")


FUNCTIONS: dict[Any, Callable[..., Tensor] | None] = {
    torch.relu: None,
    F.relu: None,
    "relu": None,
    torch.flatten: torch.flatten,
    "flatten": torch.flatten,
    F.avg_pool2d: F.avg_pool2d,
    F.adaptive_avg_pool2d: F.adaptive_avg_pool2d,
}
AVERAGES = (F.avg_pool2d, F.adaptive_avg_pool2d)


def _function(node: fx.Node) -> nn.Module | None:
    """A function or method as a module; None for one that does not convert."""
    if node.target not in FUNCTIONS:
        return None
    function = FUNCTIONS[node.target]
    return nn.ReLU() if function is None else Call(function, *node.args[1:], **node.kwargs)


def _refusal(module: nn.Module) -> str:
    name = type(module).__name__
    if "MaxPool" in name:
        return f"is {name}, and the largest of some spikes is no sum; use average pooling"
    if "Norm" in name:
        return f"is {name}, which depends on the input; use none, or batch normalisation"
    if "activation" in inspect.getmodule(type(module)).__name__:  # type: ignore[union-attr]
        return f"is {name}, and a rate of spikes is a ReLU; use that"
    return f"is {name}, which has no spiking counterpart"


def _layer(step: Iterable[tuple[str, nn.Module]], *, last: bool, found: list[Obstacle]) -> Layer | None:
    """One layer from the modules between two activations; None, and obstacles found, if they are none."""
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    layer: Layer | None = None
    for path, module in step:
        if isinstance(module, WEIGHTED):
            if layer is not None:
                found.append(Obstacle(path, f"follows `{layer.path}` without a ReLU between them"))
                return None
            layer = _weighted(path, module)
        elif isinstance(module, NORMS):
            if layer is None or after:
                found.append(Obstacle(path, f"is {type(module).__name__} that does not follow its layer"))
                return None
            if module.running_var is None:
                found.append(Obstacle(path, f"is {type(module).__name__} of each batch's own statistics"))
                return None
            _fold(layer, module)
        elif layer is None:
            before.append(module)
        elif isinstance(module, POOLS) or last or getattr(module, "function", None) in AVERAGES:
            after.append(module)
        else:
            found.append(Obstacle(path, "stands between a layer and its ReLU; put it behind the ReLU"))
            return None
    if layer is None:
        where = "behind its last ReLU" if last else "between two activations"
        found.append(Obstacle("", f"it has no layer with weights {where}"))
        return None
    layer.before, layer.after = nn.Sequential(*before), nn.Sequential(*after)
    return layer


def _weighted(path: str, module: nn.Module) -> Layer:
    parts = binary_parts(module)
    weighted: Any = copy.deepcopy(baked(nn.Sequential(module))[0])  # type: ignore[index]
    weighted.requires_grad_(False)
    if parts is None:
        scale = torch.ones(len(weighted.weight), dtype=weighted.weight.dtype, device=weighted.weight.device)
    else:
        weighted.weight.data, scale = parts
    return Layer(path, nn.Sequential(), weighted, scale, nn.Sequential(), parts is not None)


@torch.no_grad()
def _fold(layer: Layer, norm: Any) -> None:
    """Batch normalisation, as in evaluation, becomes part of the layer before it."""
    weighted: Any = layer.weighted
    shape = (-1, *[1] * (weighted.weight.ndim - 1))
    factor = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    old = 0.0 if weighted.bias is None else weighted.bias
    shift = torch.zeros_like(factor) if norm.bias is None else norm.bias
    weighted.bias = nn.Parameter((old - norm.running_mean) * factor + shift, requires_grad=False)
    if layer.binary:
        weighted.weight.mul_(torch.where(factor < 0, -1.0, 1.0).view(shape))
        layer.scale = layer.scale * factor.abs()
    else:
        weighted.weight.mul_(factor.view(shape))
