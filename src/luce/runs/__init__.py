"""One function per command: each reads or writes a run folder."""

from .compare import compare
from .distill import distill
from .evaluate import evaluate
from .run import run

__all__ = ["compare", "distill", "evaluate", "run"]
