"""Verdicts as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .adapters import Loss
from .law import LAWS, NOT_CLAIMED
from .laws import claimed_laws
from .verdict import Verdict

if TYPE_CHECKING:
    import rich.console

STYLES = {"held": "green", "broken": "bold red", "not applicable": "dim"}


def counts(verdicts: Sequence[Verdict]) -> str:
    """The number of verdicts of each state, on one line."""
    number = {state: sum(verdict.state == state for verdict in verdicts) for state in STYLES}
    return ", ".join(f"{count} {state}" for state, count in number.items())


def example(verdict: Verdict) -> str:
    """The counter-example on one line."""
    return ", ".join(f"{name}={value}" for name, value in verdict.example.items())


def terminal(verdicts: Sequence[Verdict]) -> rich.console.Group:
    """The table for a terminal; a broken law shows evidence, counter-example and statement."""
    import rich.box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=rich.box.SIMPLE_HEAD, show_edge=False)
    table.add_column("law", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("evidence")
    for verdict in verdicts:
        evidence = Text(verdict.evidence, style="dim" if verdict.state == "not applicable" else "")
        if verdict.state == "broken":
            law = LAWS[verdict.law]
            evidence = Text.assemble(
                verdict.evidence, "\n", (example(verdict), "cyan"), "\n", (law.statement, "dim")
            )
        table.add_row(verdict.law, Text(verdict.state, style=STYLES[verdict.state]), evidence)
    parts: list[rich.console.RenderableType] = [table, Text(), Text(counts(verdicts))]
    if any(verdict.evidence == NOT_CLAIMED for verdict in verdicts):
        hint = (
            "Not claimed: laws that a sound loss need not obey; --claims NAME,... adds those that this loss "
            "should obey."
        )
        parts.append(Text(hint, style="dim"))
    return Group(*parts)


def as_json(loss: Loss, verdicts: Sequence[Verdict], **settings: Any) -> str:
    """Loss, settings, versions and verdicts, as one JSON object."""
    import hypothesis

    from .. import __version__

    content = {
        "loss": str(loss),
        "called_as": loss.adapter.text,
        "claims": sorted(claimed_laws(loss.claims)),
        **settings,
        "versions": {"luce": __version__, "torch": torch.__version__, "hypothesis": hypothesis.__version__},
        "verdicts": [{**vars(verdict), "statement": LAWS[verdict.law].statement} for verdict in verdicts],
    }
    return json.dumps(content, indent=2, default=str) + "\n"
