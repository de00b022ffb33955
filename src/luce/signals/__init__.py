"""Teacher signals and where they come from: live networks, remembered answers, and black boxes."""

from .blackbox import BlackBox, BudgetError, LocalBlackBox, logits_from, tell
from .signal import DenseSignal, Kind, Signal
from .sources import LearningTeacher, LiveTeacher, RememberedTeacher, Teacher

__all__ = [
    "BlackBox",
    "BudgetError",
    "DenseSignal",
    "Kind",
    "LearningTeacher",
    "LiveTeacher",
    "LocalBlackBox",
    "RememberedTeacher",
    "Signal",
    "Teacher",
    "logits_from",
    "tell",
]
