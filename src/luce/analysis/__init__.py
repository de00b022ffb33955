"""Analyses of a teacher, a temperature and a loss.

`diagnose` splits the knowledge of a teacher beyond the labels into levels, `limits` compares KD with logit
matching over temperatures, and `landscape` evaluates a loss over a plane of student logits. They take
tensors; the commands ``luce diagnose`` and ``luce landscape`` load networks and data.
"""

from .diagnose import diagnose
from .findings import Finding, findings
from .knowledge import Diagnosis, Knowledge, Pull, Terms
from .landscape import Landscape, landscape
from .limits import AtTemperature, Limits, limits

__all__ = [
    "AtTemperature",
    "Diagnosis",
    "Finding",
    "Knowledge",
    "Landscape",
    "Limits",
    "Pull",
    "Terms",
    "diagnose",
    "findings",
    "landscape",
    "limits",
]
