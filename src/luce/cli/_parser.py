"""A parser for the commands whose options are their own and no recipe's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from ..errors import UserError


class Parser(argparse.ArgumentParser):
    """Refuses as Luce does: one sentence, exit status 2."""

    def __init__(self, command: str, **settings: str) -> None:
        super().__init__(
            prog=f"luce {command}",
            add_help=False,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help tells more")


def numbers(text: str) -> list[float]:
    """``1,2.5,-3`` or ``[1, 2.5, -3]``."""
    try:
        return [float(word) for word in text.strip("[] ").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 2,0.5,-1, got {text!r}") from None
