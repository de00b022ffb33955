"""Teacher signals and where they come from: live networks and remembered answers."""

from .signal import DenseSignal, Signal
from .sources import LiveTeacher, RememberedTeacher, Teacher

__all__ = ["DenseSignal", "LiveTeacher", "RememberedTeacher", "Signal", "Teacher"]
