"""``luce check``: put somebody's loss to the laws."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """Put a loss to the laws of distillation losses, with small examples that hypothesis makes up,
and show the smallest on which a law breaks. The loss is imported from the working directory or from what is
installed, which runs its module's code. Laws that a sound loss may well not obey bind only one that claims
them: --claims divergence for a KL or Jensen-Shannon divergence, ranking for a list-wise loss, masking for
one that leaves out rows labelled -100, all to see what holds. The exit status is 0 if no law is broken, 1 if
one is, 2 if the request is wrong. Needs: pip install 'luce[check]'."""


def _parser() -> argparse.ArgumentParser:
    from ._parser import Parser

    parser = Parser("check", description=DESCRIPTION)
    parser.add_argument(
        "loss", metavar="MODULE:CALLABLE", help="a function, a module, or a class to build one"
    )
    parser.add_argument("--adapter", default="auto", metavar="NAME", help="how it is called; see below")
    parser.add_argument(
        "--options", type=_mapping, metavar="JSON", help="keyword arguments of the function or class"
    )
    parser.add_argument("--claims", type=_names, default=(), metavar="NAMES", help="laws that it claims")
    parser.add_argument("--laws", type=_names, metavar="NAMES", help="only these laws")
    parser.add_argument("--without", type=_names, default=(), metavar="NAMES", help="not these laws")
    parser.add_argument(
        "--against", metavar="MODULE:CALLABLE", help="another implementation; gets --options too"
    )
    parser.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="of the logits: float64"
    )
    parser.add_argument("--examples", type=_count, default=50, metavar="N", help="to try for each law: 50")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="another one draws other examples: 0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there too")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected JSON such as '{{\"temperature\": 4}}', got {text!r}")
    return found


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def _catalogue() -> str:
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


def main(words: Sequence[str]) -> int:
    """0 if no law is broken, else 1."""
    parser = _parser()
    if "--help" in words or "-h" in words:
        parser.print_help()
        print(_catalogue())
        return 0
    request = parser.parse_args(words)

    import torch
    from rich.console import Console

    from ..conformance import Loss, check, load_loss, report
    from ..files import make_folder, write_text

    loss = Loss.of(load_loss(request.loss), request.adapter, options=request.options, claims=request.claims)
    settings = {n: getattr(request, n) for n in ("laws", "without", "examples", "seed")}
    verdicts = check(
        loss,
        against=load_loss(request.against) if request.against else None,
        dtype=getattr(torch, request.dtype),
        **settings,
    )
    print(f"{loss}, called as {loss.adapter.text}; claims {', '.join(loss.claims) or 'nothing'}\n")
    Console().print(report.terminal(verdicts))
    if request.json is not None:
        make_folder(request.json.parent)
        settings |= {"against": request.against, "dtype": request.dtype}
        write_text(request.json, report.as_json(loss, verdicts, **settings))
    return int(any(verdict.state == "broken" for verdict in verdicts))
