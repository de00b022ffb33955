"""The losses as modules: each stores and checks its options once and calls its function."""

from .crd import *
from .curriculum import *
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
from .reviewkd import *
from .reweighted import *
from .sampled import *
from .simkd import *
from .weighted_sum import *

__all__ = [name for name in dir() if name[0].isupper()]
