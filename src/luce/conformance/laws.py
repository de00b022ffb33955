"""All laws by name, each stated once, and the groups in which they are claimed."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import unknown_name
from . import always, claimed  # noqa: F401  which declare their laws, in this order
from .law import LAWS

# Several claims at once, by what a loss is.
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
GROUPS["all"] = tuple(name for name, one in LAWS.items() if one.claimed)


def law_names(names: Collection[str]) -> frozenset[str]:
    """The laws of these names.

    Raises:
        UserError: If one is none.
    """
    for name in names:
        if name not in LAWS:
            raise unknown_name("law", name, LAWS)
    return frozenset(names)


def claimed_laws(names: Collection[str]) -> frozenset[str]:
    """The laws of these names and groups of names.

    Raises:
        UserError: If one is neither a group nor a law to claim; those for every loss need no claim.
    """
    found: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in GROUPS["all"]:
            raise unknown_name("claim", name, [*GROUPS, *GROUPS["all"]])
        found.update(GROUPS.get(name, (name,)))
    return frozenset(found)
