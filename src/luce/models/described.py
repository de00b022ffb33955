"""Networks that a file describes: a run folder, or a packed file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files
from ..errors import UserError
from ..trust import Trusted, refuse_code, trusts, untrusted
from .registry import build

Options = Mapping[str, Any]

FRESH: dict[str, dict[str, Any]] = {
    "timm": {"pretrained": False},
    "torchvision": {"weights": None},
    "hf": {"pretrained": False},
}
"""Sources outside Luce that a file may name, with the options under which they load no weights."""


def check_description(name: str, options: Options, source: Path, trusted: Trusted) -> None:
    """Refuse a network in a file if building it could run code of others, or read files that options name.

    Luce's own networks may have any options. Those of timm, torchvision and transformers must be part of the
    library, or for ``hf:`` a config, and their options numbers: a text could be a path or an address.

    Args:
        name: As for `luce.models.build`.
        options: Likewise.
        source: The file, for the error.
        trusted: Names that may be built whatever they are; see `luce.trust.Trusted`.
    Raises:
        UserError: If the network is not trusted.
    """
    refuse_code(name, source, trusted)
    library, colon, model = _innermost(name).partition(":")
    if not colon or trusts(trusted, name):
        return
    if library not in FRESH or (library == "timm" and ":" in model):
        raise untrusted(source, f"`{name}`, which may run code")
    for option, value in options.items():
        # Names of torchvision's own weights, such as IMAGENET1K_V2, are no paths.
        word = library == "torchvision" and isinstance(value, str) and value.isidentifier()
        if not word and not _numbers(value):
            raise untrusted(source, f"the option `{option}: {value}` of `{name}`, which may read other files")


def empty(name: str, options: Options, *, classes: int, input_shape: Sequence[int]) -> nn.Module:
    """Build a network whose weights will all be replaced, without loading pretrained ones.

    Raises:
        UserError: As `luce.models.build` does.
    """
    library = _innermost(name).partition(":")[0]
    fresh = {key: value for key, value in FRESH.get(library, {}).items() if key in options or library == "hf"}
    return build(name, classes=classes, input_shape=input_shape, **{**options, **fresh})


def check_size(name: str, options: Options, *, classes: int, input_shape: Sequence[int], file: Path) -> None:
    """Refuse a network of Luce's own with more numbers than its file can hold, before memory is taken for it.

    Args:
        name: As for `luce.models.build`; other libraries' networks pass.
        options: Likewise.
        classes: Likewise.
        input_shape: Likewise.
        file: Holds the weights, of at least one bit each.
    Raises:
        UserError: If the file is too small, or the network cannot be built.
    """
    if ":" in _innermost(name):
        return
    try:
        with torch.device("meta"):
            network = empty(name, options, classes=classes, input_shape=input_shape)
    except (RuntimeError, OverflowError, TypeError) as error:  # more numbers than an address can count
        raise UserError(f"`{name}` cannot be built as described ({files.reason(error)})") from error
    numbers, size = sum(tensor.numel() for tensor in network.state_dict().values()), file.stat().st_size
    if numbers > 8 * size:
        raise UserError(f"expected a network that {file} can hold, got {numbers} numbers for {size} bytes")


def _innermost(name: str) -> str:
    """The network inside ``binary:`` and ``simkd:``."""
    while name.startswith(("binary:", "simkd:")):
        name = name.partition(":")[2]
    return name


def _numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_numbers, value))
    return value is None or isinstance(value, bool | int | float)
