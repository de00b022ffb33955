"""``luce check``: test a loss against the laws of distillation losses."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Test a loss against the laws of distillation losses.

    Hypothesis draws small examples; where a law breaks, the smallest counter-example is shown. The loss is
    imported from the working directory or from the installed packages, which runs its module's code. Some
    laws bind only a loss that claims them: --claims divergence for a KL or Jensen-Shannon divergence, ranking
    for a list-wise loss, masking for a loss that ignores rows labelled -100, all to see which hold.

    The exit status is 0 if no law is broken, 1 if one is, 2 if the command cannot run.
    Needs: pip install 'luce[check]'

      luce check mine:kd_loss --claims divergence,temperature_scaled

    Attributes:
        loss: MODULE:CALLABLE, a function, a module, or a class that builds one.
        adapter: How to call the loss; see below.
        options: Keyword arguments of the function or class, as JSON or as --options.NAME VALUE.
        claims: Laws that the loss claims.
        laws: Run only these laws.
        without: Skip these laws.
        against: MODULE:CALLABLE of another implementation; it receives the options that it accepts.
        dtype: Dtype of the logits.
        examples: Number of examples for each law.
        seed: Another seed draws other examples.
        json: Write the verdicts to this file too.
    """

    loss: str
    adapter: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    laws: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    against: str | None = None
    dtype: Literal["float64", "float32"] = "float64"
    examples: int = 50
    seed: int = 0
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UserError(f"expected `examples` of at least 1, got {self.examples}")


def help_end() -> str:
    """Adapters, laws and groups of claims, for the help."""
    from ..conformance import ADAPTERS, GROUPS, LAWS

    sections = {
        "adapters; auto chooses by the names of the parameters": {n: a.text for n, a in ADAPTERS.items()},
        "laws for every loss": {n: law.statement for n, law in LAWS.items() if not law.claimed},
        "laws for a loss that claims them": {n: law.statement for n, law in LAWS.items() if law.claimed},
        "groups of claims": {n: ", ".join(laws) for n, laws in GROUPS.items() if n != "all"},
    }
    lines = []
    for title, entries in sections.items():
        lines += ["", f"{title}:"]
        for name, text in entries.items():
            lines += textwrap.wrap(f"{name:<20}{text}", 110, initial_indent="  ", subsequent_indent=" " * 22)
    return "\n".join(lines)


def main(options: Options, _: str) -> int:
    """Print the verdicts; return 0 if no law is broken, else 1."""
    import torch
    from rich.console import Console

    from ..conformance import Loss, check, load_loss, report
    from ..files import make_folder, write_text

    if options.json is not None:
        make_folder(options.json.parent)  # refuse a folder that cannot be written to before any work
    loss = Loss.of(load_loss(options.loss), options.adapter, options=options.options, claims=options.claims)
    settings = {name: getattr(options, name) for name in ("laws", "without", "examples", "seed")}
    verdicts = check(
        loss,
        against=load_loss(options.against) if options.against else None,
        dtype=getattr(torch, options.dtype),
        **settings,
    )
    print(f"{loss}, called as {loss.adapter.text}; claims {', '.join(loss.claims) or 'nothing'}\n")
    Console().print(report.terminal(verdicts))
    if options.json is not None:
        settings |= {"against": options.against, "dtype": options.dtype}
        write_text(options.json, report.as_json(loss, verdicts, **settings))
    return int(any(verdict.state == "broken" for verdict in verdicts))
