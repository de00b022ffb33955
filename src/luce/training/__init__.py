"""The training loop, its checkpoints and metrics."""

from .engine import Fit, fit
from .session import TrainingError
from .settings import TrainingOptions

__all__ = ["Fit", "TrainingError", "TrainingOptions", "fit"]
