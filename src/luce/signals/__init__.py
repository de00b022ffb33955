"""Teacher signals and where they come from: live networks, remembered answers, and black boxes."""

from .blackbox import BlackBox, BudgetError, LocalBlackBox, logits_from, tell
from .remote import RemoteTeacher
from .signal import DenseSignal, Kind, Signal
from .sources import LearningTeacher, LiveTeacher, RememberedTeacher, Teacher
from .transport import RemoteError

__all__ = [
    "BlackBox",
    "BudgetError",
    "DenseSignal",
    "Kind",
    "LearningTeacher",
    "LiveTeacher",
    "LocalBlackBox",
    "RememberedTeacher",
    "RemoteError",
    "RemoteTeacher",
    "Signal",
    "Teacher",
    "logits_from",
    "tell",
]
