"""Distillation losses as pure functions of tensors: all that the families list in their `__all__`."""

from .divergence import *
from .embeddings import *
from .iekd import *
from .linear import *
from .lipschitz import *
from .listwise import *
from .maps import *
from .matching import *
from .multilevel import *
from .normalized import *
from .pairwise import *
from .partial import *
from .relation import *
from .reweighted import *
from .sampled import *

__all__ = [name for name in dir() if name.endswith("_loss")]
