"""Teacher signals and where they come from: live networks and remembered answers."""

from .signal import DenseSignal, Kind, Signal
from .sources import LearningTeacher, LiveTeacher, RememberedTeacher, Teacher

__all__ = ["DenseSignal", "Kind", "LearningTeacher", "LiveTeacher", "RememberedTeacher", "Signal", "Teacher"]
