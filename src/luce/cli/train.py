"""``luce train``: a run without a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from . import distill


def main(words: Sequence[str]) -> None:
    distill.main(words, command="train")
