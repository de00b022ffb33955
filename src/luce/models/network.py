"""The frame that all native networks share, and the few pieces they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..errors import UserError


class Network(nn.Module):
    """A classifier in five named parts: ``stem``, ``stages``, ``neck``, ``pool`` and ``head``.

    Convolutions start from He's normal distribution over their outputs, with zero biases; batch
    normalisation starts as the identity, the head as PyTorch's default.

    Args:
        stem: From the input ``(N, *input_shape)`` to the first features.
        stages: In order; each is addressed as ``stages.0``, ``stages.1``, ...
        features: Width ``D`` of what ``pool`` returns.
        classes: Width of the logits.
        neck: Between the last stage and the pooling; the identity unless given.
        pool: To ``(N, D)``; the global average over the map unless given.
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
    """Convolution that keeps the size of the map at stride 1, batch normalisation and, if asked, a ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    layers: list[nn.Module] = [convolution, nn.BatchNorm2d(outputs)]
    if relu:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


Block = Callable[[int, int, int], nn.Module]
"""Makes one block from its input channels, output channels and stride."""


def chain(block: Block, inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    """``depth`` blocks in a row, of which the first changes the width and the resolution."""
    return nn.Sequential(
        block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(depth - 1))
    )


def chains(
    block: Block, widths: Sequence[int], depths: Sequence[int], strides: Sequence[int]
) -> list[nn.Sequential]:
    """One chain of blocks per stage; ``widths`` begins with the width of the stem."""
    return [
        chain(block, inputs, outputs, depth, stride)
        for (inputs, outputs), depth, stride in zip(pairwise(widths), depths, strides, strict=True)
    ]


def image_channels(input_shape: Sequence[int], *, least: int = 1) -> int:
    """The channels of a ``(channels, height, width)`` shape, both sides of which are at least ``least``.

    Raises:
        UserError: If the shape is another, or the image too small.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise UserError(
            f"expected `input_shape` as (channels, height, width) of at least {least}x{least} pixels, "
            f"got {tuple(input_shape)}"
        )
    return input_shape[0]


def positive_integers(name: str, values: Sequence[int], *, may_be_empty: bool = False) -> tuple[int, ...]:
    """``values`` as a tuple.

    Raises:
        UserError: If they are anything but positive integers, or there are none and there should be.
    """
    expected = isinstance(values, Sequence) and all(type(value) is int and value > 0 for value in values)
    if not expected or not (values or may_be_empty):
        kind = "a list" if may_be_empty else "a non-empty list"
        raise UserError(f"expected `{name}` as {kind} of positive integers, got {values!r}")
    return tuple(values)


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, trainable or frozen; one that is shared counts once.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def logits_of(output: object) -> Tensor:
    """The logits in what a model returned: the tensor itself, or the ``logits`` of an output object.

    Raises:
        TypeError: If ``output`` is neither.

    >>> from types import SimpleNamespace
    >>> from torch import zeros
    >>> logits_of(SimpleNamespace(logits=zeros(2, 10))).shape
    torch.Size([2, 10])
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "expected the model to return its logits as a Tensor, or an object that holds them as `.logits`, "
            f"got {type(output).__name__}; wrap the model so that it returns one of these"
        )
    return logits
