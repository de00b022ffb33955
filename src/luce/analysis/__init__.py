"""Theory to run on one's own teacher: what it knows, where a temperature stands, how a loss is shaped.

`diagnose` splits what a teacher says beyond the labels into levels, `limits` compares KD with logit matching
over temperatures, and `landscape` looks at a loss over a plane of logits. They take tensors; the commands
``luce diagnose`` and ``luce landscape`` find the networks and the data.
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
