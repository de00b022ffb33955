"""Reading a network as a chain of layers that spikes can run through, and the obstacles to it."""

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
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
)
"""Modules that are the identity in evaluation mode."""

LISTED = 4
"""Number of obstacles that an error lists."""


@dataclass(frozen=True)
class Obstacle:
    """A part of a network that does not convert to spikes.

    Attributes:
        path: Path of the module, as in ``named_modules``.
        what: Reason and remedy.
    """

    path: str
    what: str

    def __str__(self) -> str:
        return f"`{self.path}` {self.what}" if self.path else self.what


@dataclass
class Layer:
    """The part of a network between two activations: a layer with weights and the linear modules around it.

    Attributes:
        path: Path of the layer with weights.
        before: Modules from the spikes to the layer: pooling, flattening.
        weighted: The layer, its weights without their scales.
        scale: Scale of each filter, ``(O,)``; 1 for real weights.
        after: Modules from the layer to the activation: pooling.
        binary: Whether the weights are -1 and 1.
    """

    path: str
    before: nn.Sequential
    weighted: nn.Module
    scale: Tensor
    after: nn.Sequential
    binary: bool

    def scaled(self, factor: Tensor | float, bias_factor: Tensor | float) -> nn.Sequential:
        """Return the layer with each filter's weights and bias multiplied by factors, ``(O,)`` or scalar."""
        layer: Any = copy.deepcopy(self.weighted)
        factors = torch.as_tensor(factor, dtype=layer.weight.dtype, device=layer.weight.device)
        layer.weight.data.mul_(factors.view(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.data.mul_(torch.as_tensor(bias_factor, dtype=layer.bias.dtype))
        return nn.Sequential(*copy.deepcopy(self.before), layer, *copy.deepcopy(self.after))


class Chain(nn.Module):
    """A network as a chain of layers, equal to its source up to rounding.

    Batch normalisation is folded into the layer before it: its factors into the scales (a negative factor
    flips the signs), its shift into the bias.

    Args:
        layers: Layers in order; the last one gives the logits.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.linear = nn.ModuleList(layer.scaled(layer.scale, 1.0) for layer in layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activations(inputs)[-1]

    def activations(self, inputs: Tensor) -> list[Tensor]:
        """Return the output of each ReLU, and the logits."""
        activations = [inputs]
        for linear in self.linear[:-1]:
            activations.append(F.relu(linear(activations[-1])))
        return [*activations[1:], self.linear[-1](activations[-1])]


class Call(nn.Module):
    """A function of tensors, as a module."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, *self.args, **self.kwargs)


def read(network: nn.Module) -> Chain:
    """Read a network as a chain.

    Convertible are convolutions and linear layers with ReLU between them, average pooling before or after the
    ReLU, biases, and batch normalisation directly after a layer with weights. Dropout is dropped.

    Args:
        network: From normalised inputs to logits; unchanged.
    Raises:
        UserError: If a part of it does not convert; lists the modules.
    Example:
        >>> from luce import models
        >>> network = models.build("binary:vgg_pool", classes=10, input_shape=(1, 8, 8), widths=[4, 8, 8])
        >>> [(layer.path, layer.binary) for layer in read(network).layers]
        [('stem.0', False), ('stages.0.0', True), ('stages.1.0', True), ('head', False)]
    """
    chain, problems = _read(network)
    if problems:
        listed = "; ".join(map(str, problems[:LISTED]))
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(f"expected a network that converts to spikes: {listed}{more}")
    assert chain is not None
    return chain


def obstacles(network: nn.Module) -> list[Obstacle]:
    """List the parts of a network that do not convert; empty if `read` accepts it.

    Example:
        >>> from luce import models
        >>> for obstacle in obstacles(models.build("cnn", classes=10, input_shape=(1, 8, 8))):
        ...     print(obstacle)
        `stages.0.0` is MaxPool2d, and a maximum over spikes is not a sum; use average pooling
    """
    return _read(network)[1]


def _read(network: nn.Module) -> tuple[Chain | None, list[Obstacle]]:
    pieces, problems = _pieces(network)
    steps: list[list[tuple[str, nn.Module]]] = [[]]
    for path, piece in pieces:
        if isinstance(piece, nn.ReLU):
            steps.append([])
        else:
            steps[-1].append((path, piece))
    layers = []
    if not problems:
        for number, step in enumerate(steps):
            layers.append(_layer(step, last=number == len(steps) - 1, problems=problems))
        if not problems and len(steps) == 1:
            problems.append(Obstacle("", "it has no ReLU, so it has no neurons that spike"))
    if problems:
        return None, problems
    return Chain([layer for layer in layers if layer is not None]).eval(), []


def _pieces(network: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[Obstacle]]:
    """Trace the network; return its modules in order with their paths, and the obstacles."""
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # tracing fails in many ways, depending on the forward pass
        reason = " ".join(str(error).split())[:160]
        return [], [Obstacle("", f"its forward pass cannot be traced ({type(error).__name__}: {reason})")]
    pieces: list[tuple[str, nn.Module]] = []
    problems: list[Obstacle] = []
    branches: list[Obstacle] = []  # reported only if there is no obstacle where the branches join
    (start, *others) = [node for node in graph.nodes if node.op == "placeholder"]
    previous = start
    for node in graph.nodes:
        if node in (start, *others):
            continue
        if node.op == "output":
            if node.all_input_nodes != [previous] or not isinstance(node.args[0], fx.Node):
                problems.append(Obstacle("", "it does not return the output of its last layer"))
            continue
        path = node.target if node.op == "call_module" else _module_path(node)
        if node.all_input_nodes not in ([], [previous]):
            branches.append(Obstacle(path, "starts a branch; spikes run along a chain"))
        if len(node.all_input_nodes) > 1:
            problems.append(
                Obstacle(path, "joins several paths, as a residual block does; spikes run along a chain")
            )
        elif node.op == "call_module":
            module = network.get_submodule(node.target)
            if _is_modified(module):
                problems.append(Obstacle(path, "has hooks or computed weights; remove them"))
            elif isinstance(module, (*WEIGHTED, *POOLS, *NORMS, nn.ReLU, nn.Flatten)):
                pieces.append((path, module))
            elif not isinstance(module, IDENTITIES):
                problems.append(Obstacle(path, _refusal(module)))
        elif (piece := _function(node)) is not None:
            pieces.append((path, piece))
        else:
            name = getattr(node.target, "__name__", node.target)
            problems.append(Obstacle(path, f"calls {name}, which has no spiking counterpart"))
        previous = node
    return pieces, problems or branches


def _is_modified(module: Any) -> bool:
    """Whether hooks or parametrisations, such as pruning or weight normalisation, change a module."""
    computed = parametrize.is_parametrized(module) and binary_parts(module) is None
    return bool(computed or module._forward_pre_hooks or module._forward_hooks)


def _module_path(node: fx.Node) -> str:
    """Return the path of the module whose forward pass calls the function."""
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
    """Return a function or method as a module; None if it does not convert."""
    if node.target not in FUNCTIONS:
        return None
    function = FUNCTIONS[node.target]
    return nn.ReLU() if function is None else Call(function, *node.args[1:], **node.kwargs)


def _refusal(module: nn.Module) -> str:
    name = type(module).__name__
    if "MaxPool" in name:
        return f"is {name}, and a maximum over spikes is not a sum; use average pooling"
    if "Norm" in name:
        return f"is {name}, whose statistics depend on the input; use batch normalisation or none"
    if "activation" in inspect.getmodule(type(module)).__name__:  # type: ignore[union-attr]
        return f"is {name}, and the rate of a spiking neuron is a ReLU; use ReLU"
    return f"is {name}, which has no spiking counterpart"


def _layer(step: Iterable[tuple[str, nn.Module]], *, last: bool, problems: list[Obstacle]) -> Layer | None:
    """Return the layer between two activations; if there is none, add an obstacle and return None."""
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    layer: Layer | None = None
    for path, module in step:
        if isinstance(module, WEIGHTED):
            if layer is not None:
                problems.append(Obstacle(path, f"follows `{layer.path}` without a ReLU between them"))
                return None
            layer = _weighted(path, module)
        elif isinstance(module, NORMS):
            if layer is None or after:
                problems.append(
                    Obstacle(
                        path, f"is {type(module).__name__} that does not directly follow a layer with weights"
                    )
                )
                return None
            if module.running_var is None:
                problems.append(Obstacle(path, f"is {type(module).__name__} without running statistics"))
                return None
            _fold(layer, module)
        elif layer is None:
            before.append(module)
        elif isinstance(module, POOLS) or last or getattr(module, "function", None) in AVERAGES:
            after.append(module)
        else:
            problems.append(Obstacle(path, "stands between a layer and its ReLU; move it after the ReLU"))
            return None
    if layer is None:
        where = "after its last ReLU" if last else "between two activations"
        problems.append(Obstacle("", f"it has no layer with weights {where}"))
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
    """Fold batch normalisation, as in evaluation mode, into the layer before it."""
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
