"""The conformance battery: laws of distillation losses, for anybody's loss.

`check` puts a callable to them; ``luce check module:callable`` does it from the command line.
"""

from __future__ import annotations

from .adapters import ADAPTERS, Adapter, Loss, find
from .law import LAWS, Law
from .laws import GROUPS
from .verdict import Verdict, check

__all__ = ["ADAPTERS", "GROUPS", "LAWS", "Adapter", "Law", "Loss", "Verdict", "check", "find"]
