"""Heads whose logits have mean zero: the start from which KD and logit matching go the same way.

The gradient of cross-entropy and of KD has mean zero over the classes, so that a linear head's mean row
``W.mean(0)`` and mean bias get none. SGD keeps both as they are, with momentum too; weight decay shrinks them
by ``1 - lr * weight_decay`` a step without momentum. Adam and others that scale each parameter by itself do
not keep them. A head whose means are 0 has logits of mean 0 for every input, and under SGD it stays so.

An ordinary head behind a network that learns is another matter: its mean row is kept as well, but the
features it is multiplied with are not, and so the mean logit of a row wanders. Only a head that starts at 0
keeps it still. (Centre the teacher's logits, too, or its head.)

References:
    Chen et al., Exploring the Connection between Knowledge Distillation and Logits Matching, arXiv
    2109.06458, state that equal means at the start are enough; the proof for networks above is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError


def equal_mean_head(features: int, classes: int, *, bias: bool = True) -> nn.Linear:
    """A linear classifier, started as PyTorch does and then centred: its logits have mean 0.

    Args:
        features: Width of the input.
        classes: Width of the logits.
        bias: Whether it has a bias.
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
    """Take the mean over the classes out of a head, in place. Its probabilities stay as they were.

    Args:
        head: From features to logits, weight of shape ``(C, D)``.
    Returns:
        What was taken out: the mean row ``(D,)``, and the mean bias ``()``, None without a bias. Adding them
        to every class gives the old head back.
    Raises:
        UserError: If it is no linear layer.
    Example:
        >>> head = nn.Linear(2, 3)
        >>> row, bias = center_head_(head)
        >>> row.shape, bias.shape
        (torch.Size([2]), torch.Size([]))
    """
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"expected `head` to be a torch.nn.Linear, got {type(head).__name__}; the networks of Luce have "
            "theirs under `.head`"
        )
    row = head.weight.mean(0)
    head.weight.sub_(row)
    if head.bias is None:
        return row, None
    bias = head.bias.mean()
    head.bias.sub_(bias)
    return row, bias
