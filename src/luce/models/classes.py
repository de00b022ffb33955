"""The classes of a trained network and those of data, matched by their names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .. import log
from ..errors import UserError, listed

Match: TypeAlias = Literal["name", "position"]
"""How classes are matched: by name, or the first with the first and so on."""

POSITION = "set `match_classes: position`"
"""How recipes and commands ask for classes to be matched by position."""
LONGEST = 24
"""Characters of a name in a message."""


def align(
    own: Sequence[str] | int,
    wanted: Sequence[str],
    *,
    source: str,
    data: str,
    match: Match = "name",
    way: str = POSITION,
) -> Tensor | None:
    """Find the order in which the logits of a network are those of the data's classes.

    Names count as equal if they are so up to case, spaces, ``_`` and ``-``, and the form of Unicode. Names
    that only number the classes, such as ``LABEL_0``, or ``0`` beside other names, are no names: the order of
    the classes is then assumed to be the same, with a message.

    Args:
        own: Names of the network's classes in the order of its logits; their number if they have no names.
        wanted: Names of the data's classes.
        source: Where the network is from, for messages.
        data: Name of the data, likewise.
        match: ``"position"`` to compare no names.
        way: How a user asks for that, for messages.
    Returns:
        ``order`` with the data's logits in ``logits[:, order]``; None where both are the same.
    Raises:
        UserError: If the classes differ in number, or in names that are compared.
    Example:
        >>> align(["cat", "hot dog"], ["Hot_Dog", "Cat"], source="runs/teacher", data="pets")
        tensor([1, 0])
    """
    names = None if isinstance(own, int) else [str(name) for name in own]
    count = own if isinstance(own, int) else len(own)
    if count != len(wanted):
        raise UserError(
            f"expected a network for the {len(wanted)} classes of `{data}`, got one for {count} from {source}"
            + (
                ", which has these and others; train it for these alone"
                if names is not None and {*map(_plain, wanted)} < {*map(_plain, names)}
                else ""
            )
        )
    if match == "position":
        return None
    if names is None:
        assume(source, data, way)
        return None
    for spell in (str, _plain):
        there, here = [spell(name) for name in names], [spell(name) for name in wanted]
        if there == here:
            return None
        places = {name: place for place, name in enumerate(there)}
        if len(places) == len(names) and places.keys() == {*here}:
            log.info(
                f"{source} numbers the classes of `{data}` differently: its logits are reordered by name"
            )
            return torch.tensor([places[name] for name in here])
    unnamed = any(_count_up(side, r"(?:label|class) ?") for side in (names, wanted))
    if unnamed or _count_up(names) != _count_up(wanted):
        assume(source, data, way)
        return None
    raise UserError(
        f"expected a network for the classes of `{data}`, got {_difference(names, wanted)} from {source}; "
        f"name them alike, or {way} if both number the same classes in the same order"
    )


def class_names(network: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a network's classes that it states as ``class_names``; None if it does not.

    A network ``hf:NAME`` states those of its checkpoint, if that has a trained head.
    """
    names = getattr(network, "class_names", None)
    return None if names is None else tuple(map(str, names))


def assume(source: str, data: str, way: str = POSITION) -> None:
    """State that the classes of a network without names are taken to be in the order of the data."""
    log.info(
        f"the classes of {source} and of `{data}` cannot be compared by name: the same order is assumed "
        f"({way} to confirm it)"
    )


def _plain(name: str) -> str:
    """Return a name without what tools spell differently."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _count_up(names: Sequence[str], before: str = "") -> bool:
    """Whether names are rising numbers, after this text."""
    found = [re.fullmatch(rf"{before}(\d{{1,9}})", _plain(name)) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return len(numbers) == len(names) and numbers == sorted({*numbers})


def _difference(own: Sequence[str], wanted: Sequence[str]) -> str:
    """Describe how two lists of names differ that cannot be matched."""
    there, here = {*map(_plain, own)}, {*map(_plain, wanted)}
    if there == here:
        return (
            f"{listed(name for name, count in Counter(map(_plain, own)).items() if count > 1)} more than once"
        )
    others = listed(f"`{name[:LONGEST]}`" for name in own if _plain(name) not in here)
    lacking = listed(f"`{name[:LONGEST]}`" for name in wanted if _plain(name) not in there)
    return f"{others or 'none'} in place of {lacking or 'none'}"
