"""The base class of all native networks, and shared building blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..errors import UserError


class Network(nn.Module):
    """A classifier in five named parts: ``stem``, ``stages``, ``neck``, ``pool`` and ``head``.

    Convolutions are initialised by He's normal distribution (fan out) with zero biases, batch normalisation
    as the identity, the head by PyTorch's default.

    Args:
        stem: From the input ``(N, *input_shape)`` to the first features.
        stages: Stages in order, addressed as ``stages.0``, ``stages.1``, ...
        features: Width ``D`` of the output of ``pool``.
        classes: Number of classes.
        neck: Layers between the last stage and the pooling; None for the identity.
        pool: Pooling to ``(N, D)``; None for the global average over the map.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        features: int,
        classes: int,
        neck: nn.Module | None = None,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.neck = nn.Identity() if neck is None else neck
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if pool is None else pool
        self.head = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.neck(self.stages(self.stem(x)))))
        return logits


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """Return a convolution (same size at stride 1), batch normalisation and, with ``relu``, a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    layers: list[nn.Module] = [convolution, nn.BatchNorm2d(outputs)]
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


Block = Callable[[int, int, int], nn.Module]
"""Builds a block from input channels, output channels and stride."""


def chain(block: Block, inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    """Return ``depth`` blocks in sequence; the first changes width and resolution."""
    return nn.Sequential(
        block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(depth - 1))
    )


def chains(
    block: Block, widths: Sequence[int], depths: Sequence[int], strides: Sequence[int]
) -> list[nn.Sequential]:
    """Return one chain of blocks per stage; ``widths`` begins with the width of the stem."""
    return [
        chain(block, inputs, outputs, depth, stride)
        for (inputs, outputs), depth, stride in zip(pairwise(widths), depths, strides, strict=True)
    ]


def image_channels(input_shape: Sequence[int], *, least: int = 1) -> int:
    """Return the channels of a ``(channels, height, width)`` shape with sides of at least ``least``.

    Raises:
        UserError: If it is not such a shape, or the image is too small.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise UserError(
            f"expected `input_shape` as (channels, height, width) of at least {least}x{least} pixels, "
            f"got {tuple(input_shape)}"
        )
    return input_shape[0]


def positive_integers(name: str, values: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """Check that ``values`` are positive integers, and return them as a tuple.

    Raises:
        UserError: If they are not, or ``values`` is empty and must not be.
    """
    expected = isinstance(values, Sequence) and all(type(value) is int and value > 0 for value in values)
    if not expected or not (values or may_be_empty):
        kind = "a list" if may_be_empty else "a non-empty list"
        raise UserError(f"expected `{name}` as {kind} of positive integers, got {values!r}")
    return tuple(values)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen; a shared parameter counts once.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def logits_of(output: object) -> Tensor:
    """Return the logits of a model's output: the tensor itself, or the ``logits`` of an output object.

    Raises:
        UserError: If ``output`` is neither.

    >>> from types import SimpleNamespace
    >>> from torch import zeros
    >>> logits_of(SimpleNamespace(logits=zeros(2, 10))).shape
    torch.Size([2, 10])
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise UserError(
            "expected the model to return its logits as a Tensor, or an object with `.logits`, "
            f"got {type(output).__name__}; wrap the model so that it returns one of these"
        )
    return logits
