"""The names of the laws, and groups of laws to claim together."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import unknown_name
from . import always, claimed  # noqa: F401  importing registers the laws, in this order
from .law import LAWS

GROUPS: dict[str, tuple[str, ...]] = {
    "divergence": (
        "shift_invariant",
        "class_order",
        "vanishing_classes",
        "micro_batches",
        "non_negative",
        "zero_at_equality",
    ),
    "masking": ("ignored_rows", "ignored_nan", "all_ignored"),
    "ranking": (
        "shift_invariant",
        "class_order",
        "micro_batches",
        "non_negative",
        "settled_choice",
        "log_tail",
    ),
}
"""Claims for kinds of losses, by name."""
GROUPS["all"] = tuple(name for name, one in LAWS.items() if one.claimed)


def law_names(names: Collection[str]) -> frozenset[str]:
    """Return the names as a set.

    Raises:
        UserError: If a name is no law.
    """
    for name in names:
        if name not in LAWS:
            raise unknown_name("law", name, LAWS)
    return frozenset(names)


def claimed_laws(names: Collection[str]) -> frozenset[str]:
    """Return the laws that these names of laws and groups stand for.

    Raises:
        UserError: If a name is neither a group nor a law to claim. Laws for every loss need no claim.
    """
    names_claimed: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in GROUPS["all"]:
            raise unknown_name("claim", name, [*GROUPS, *GROUPS["all"]])
        names_claimed.update(GROUPS.get(name, (name,)))
    return frozenset(names_claimed)
