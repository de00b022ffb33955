"""Heads whose logits have mean zero, for which KD and logit matching have the same limit.

The gradients of cross-entropy and of KD have mean zero over the classes, so the mean row ``W.mean(0)`` and
the mean bias of a linear head get no gradient. SGD, with or without momentum, keeps both; weight decay
without momentum shrinks them by ``1 - lr * weight_decay`` per step. Adam and other optimizers that scale
parameters individually change them. A head with zero means gives logits with mean zero for every input, and
SGD preserves this.

With any other head the mean logit of a row changes during training: the mean row stays, but the features that
it is multiplied with do not. Only a head that starts at zero avoids this. (Centre the teacher's logits or its
head as well.)

References:
    Chen et al., Exploring the Connection between Knowledge Distillation and Logits Matching, arXiv
    2109.06458, state that equal means at the start suffice; the argument for deep networks is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError


def equal_mean_head(features: int, classes: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear classifier with PyTorch's initialisation, centred so that its logits have mean 0.

    Args:
        features: Number of input features.
        classes: Number of classes.
        bias: Whether the layer has a bias.
    Example:
        >>> head = equal_mean_head(4, 3)
        >>> bool(head(torch.randn(5, 4)).mean(-1).abs().max() < 1e-6)
        True
    """
    head = nn.Linear(features, classes, bias=bias)
    center_head_(head)
    return head


@torch.no_grad()
def center_head_(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Subtract the mean over the classes from a head, in place; its probabilities do not change.

    Args:
        head: Linear layer with a weight of shape ``(C, D)``.
    Returns:
        The mean row ``(D,)`` and the mean bias ``()``, None without a bias. Adding them to every class
        restores the head.
    Raises:
        UserError: If ``head`` is not a linear layer.
    Example:
        >>> head = nn.Linear(2, 3)
        >>> row, bias = center_head_(head)
        >>> row.shape, bias.shape
        (torch.Size([2]), torch.Size([]))
    """
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"expected `head` to be a torch.nn.Linear, got {type(head).__name__}; the networks of Luce have "
            "theirs at `.head`"
        )
    row = head.weight.mean(0)
    head.weight.sub_(row)
    if head.bias is None:
        return row, None
    bias = head.bias.mean()
    head.bias.sub_(bias)
    return row, bias
