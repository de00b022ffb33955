"""Teacher signals and their sources: live networks, cached outputs, and black boxes."""

from .blackbox import BlackBox, BudgetError, LocalBlackBox, answer, logits_from
from .signal import DenseSignal, Kind, Signal
from .teachers import CachedTeacher, LearningTeacher, LiveTeacher, Teacher

__all__ = [
    "BlackBox",
    "BudgetError",
    "CachedTeacher",
    "DenseSignal",
    "Kind",
    "LearningTeacher",
    "LiveTeacher",
    "LocalBlackBox",
    "Signal",
    "Teacher",
    "answer",
    "logits_from",
]
