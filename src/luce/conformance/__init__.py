"""The conformance battery: laws of distillation losses, applied to any loss.

`check` tests a callable against the laws; ``luce check MODULE:CALLABLE`` does so from the command line.
"""

from __future__ import annotations

from .adapters import ADAPTERS, Adapter, Loss, load_loss
from .law import LAWS, Law
from .laws import GROUPS
from .verdict import Verdict, check

__all__ = ["ADAPTERS", "GROUPS", "LAWS", "Adapter", "Law", "Loss", "Verdict", "check", "load_loss"]
