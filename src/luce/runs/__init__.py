"""One function per command: each reads or writes a run folder."""

from .compare import compare
from .diagnose import DiagnoseOptions, diagnose
from .distill import distill
from .evaluate import evaluate
from .run import run
from .spike import SpikeOptions, spike

__all__ = ["DiagnoseOptions", "SpikeOptions", "compare", "diagnose", "distill", "evaluate", "run", "spike"]
