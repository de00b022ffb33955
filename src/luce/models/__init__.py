"""Networks by name: small ones from the distillation literature, and loaders for other libraries.

>>> import torch
>>> from luce import models
>>> model = models.build("resnet20", classes=100)
>>> models.logits_of(model(torch.zeros(2, 3, 32, 32))).shape
torch.Size([2, 100])
>>> models.count_parameters(model)
278324

Every native network is a :class:`~luce.models.network.Network` and has the same five parts, whatever its
family. Feature methods address layers by these dotted paths:

=============  ==========================================================================================
``stem``       from the input to the first feature map
``stages.0``   and ``stages.1`` and so on: the blocks between two changes of resolution
``neck``       layers after the last stage; the identity if the family has none
``pool``       to the feature vector ``(N, D)``
``head``       the linear classifier, ``(N, D)`` to ``(N, classes)``
=============  ==========================================================================================

``stages.0.-1.act:input`` is the map before the last activation of a residual stage; :mod:`luce.models.hooks`
documents all paths. ``stem``, the stages and ``pool`` are the list of features that the distillation
literature counts from zero (for example `CRD <https://arxiv.org/abs/1910.10699>`_). No activation works in
place, so captured features stay valid.
"""

from __future__ import annotations

from .classifier import Classifier
from .described import check_description, check_size, empty
from .heads import center_head_, equal_mean_head
from .network import count_parameters, logits_of
from .registry import build, names
from .text import mask_padding

__all__ = [
    "Classifier",
    "build",
    "center_head_",
    "check_description",
    "check_size",
    "count_parameters",
    "empty",
    "equal_mean_head",
    "logits_of",
    "mask_padding",
    "names",
]
