"""Logits in compact forms: a head with its inputs, and the top K of a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _check_tensor(name: str, value: object, floating: bool = True) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected `{name}` to be a torch.Tensor, got {type(value).__name__}")
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.is_floating_point() if floating else integers):
        wanted = "a floating" if floating else "an integer"
        raise TypeError(f"expected `{name}` of {wanted} dtype, got {value.dtype}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], why: str) -> None:
    if value.shape != shape:
        raise ValueError(f"expected `{name}` of shape {shape} {why}, got {tuple(value.shape)}")


@dataclass(frozen=True, eq=False)
class LinearLogits:
    r"""Hidden states and the head that maps them to logits, not yet multiplied.

    .. math:: z = \mathrm{cap}\big(\mathrm{scale} \cdot (x W^\top + b)\big),
        \quad \mathrm{cap}(z) = c \tanh(z / c)

    Args:
        hidden: The head's inputs, ``(N, H)``, ``(B, T, H)`` or with any other dimensions before the last.
        weight: The head's weight, ``(V, H)``, as in `torch.nn.Linear` and `torch.nn.Embedding`; of the hidden
            states' dtype, unless autocast is on.
        bias: The head's bias, ``(V,)``, or None.
        scale: Factor of the logits, positive; for a model that divides its logits, 1 over the divisor.
        softcap: *c*, positive; None for no cap.
        vocab_size: Number of classes, if the head is padded to more: only the first rows of the weight are
            used, and the others have no probability and no gradient.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> head = torch.nn.Linear(16, 128)
        >>> LinearLogits(torch.randn(2, 5, 16), head.weight, head.bias, vocab_size=100).shape
        torch.Size([2, 5, 100])
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        _check_tensor("hidden", self.hidden)
        _check_tensor("weight", self.weight)
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            raise ValueError(f"expected `weight` of shape (V, H), not empty, got {tuple(self.weight.shape)}")
        rows, width = self.weight.shape
        if self.hidden.ndim == 0 or self.hidden.shape[-1] != width:
            raise ValueError(
                f"expected `hidden` of shape (..., {width}), as `weight` has {width} columns, "
                f"got {tuple(self.hidden.shape)}"
            )
        tensors = {"weight": self.weight}
        if self.bias is not None:
            _check_tensor("bias", self.bias)
            _check_shape("bias", self.bias, (rows,), "with one entry for each row of `weight`")
            tensors["bias"] = self.bias
        for name, tensor in tensors.items():
            if tensor.device != self.hidden.device:
                raise ValueError(
                    f"expected `{name}` on {self.hidden.device} like `hidden`, got {tensor.device}"
                )
        for name, number in (("scale", self.scale), ("softcap", self.softcap)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"expected `{name}` to be a finite number above 0, got {number!r}")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= rows:
            raise ValueError(
                f"expected `vocab_size` between 1 and the {rows} rows of `weight`, got {self.vocab_size!r}"
            )

    @property
    def classes(self) -> int:
        """The number of classes, without padding."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.classes))

    def flat(self) -> LinearLogits:
        """Return the same logits as rows, ``(N, H)``."""
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def shaped(self, products: Tensor) -> Tensor:
        """Return the logits for the head's products, which include the bias."""
        logits = products if self.scale == 1 else products * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def logits(self) -> Tensor:
        """Return all logits at once, ``(..., V)``, which the losses on `LinearLogits` avoid.

        Example:
            >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
            >>> LinearLogits(hidden, weight, scale=0.5).logits()
            tensor([[0.5000, 3.0000]])
        """
        products = self.hidden @ self.weight[: self.classes].T
        return self.shaped(products if self.bias is None else products + self.bias[: self.classes])


@dataclass(frozen=True, eq=False)
class TopKLogits:
    r"""A teacher's logits of a few classes of each row, and the log-sum-exp of all others.

    Args:
        ids: The classes, ``(..., K)``, in any order, each at most once in a row.
        logits: The teacher's logits of these classes, or its log-probabilities, same shape.
        rest: ``(...)``, the logarithm of the sum of exponentials of the other classes' logits, over the
            temperature: :math:`\log \sum_{i \notin ids} e^{t_i / T}`. ``-inf`` where nothing is left.
        temperature: *T* of `rest`, which cannot be converted to another temperature.
    Raises:
        ValueError: On a wrong shape or value.
        TypeError: On a wrong dtype.
    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.1, -1.0]])
        >>> kept = TopKLogits.of(logits, 2)
        >>> kept.ids, kept.logits, kept.rest  # log(e**0.1 + e**-1)
        (tensor([[0, 1]]), tensor([[2., 1.]]), tensor([0.3873]))
        >>> TopKLogits.of(logits, 2, torch.tensor([3])).ids  # the label and the best other
        tensor([[0, 3]])
    """

    ids: Tensor
    logits: Tensor
    rest: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_tensor("ids", self.ids, floating=False)
        _check_tensor("logits", self.logits)
        _check_tensor("rest", self.rest)
        if self.ids.ndim == 0 or self.ids.shape[-1] == 0:
            raise ValueError(f"expected `ids` of shape (..., K), K at least 1, got {tuple(self.ids.shape)}")
        _check_shape("logits", self.logits, tuple(self.ids.shape), "like `ids`")
        _check_shape("rest", self.rest, tuple(self.ids.shape[:-1]), "like `ids` without its last dimension")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"expected `temperature` to be a finite number above 0, got {self.temperature!r}"
            )

    @classmethod
    def of(
        cls, logits: Tensor, k: int, target: Tensor | None = None, *, temperature: float = 1.0
    ) -> TopKLogits:
        """Keep the `k` highest logits of each row, the lower class index first among equals.

        Args:
            logits: The teacher's, ``(..., V)``.
            k: Number of classes to keep, at most V.
            target: ``(...)``, the rows' labels, negative for none. A label that is not among the highest
                takes the last place: `luce.linear_pld_loss` then equals `luce.pld_loss` with ``top_k=k``.
            temperature: The temperature of the losses that will use them.
        Raises:
            ValueError: If there are fewer than `k` classes.
        """
        _check_tensor("logits", logits)
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"expected `k` between 1 and the {logits.shape[-1]} classes, got {k!r}")
        logits = logits.detach()
        # Cloned: a view of the first k would keep all V indices in memory.
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k].clone()
        if target is not None:
            label = target.unsqueeze(-1)
            lacking = (label >= 0) & (ids != label).all(-1, keepdim=True)
            ids = torch.cat([ids[..., :-1], torch.where(lacking, label, ids[..., -1:])], dim=-1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rest = (wide.scatter(-1, ids, -torch.inf) / temperature).logsumexp(-1)
        return cls(ids, logits.gather(-1, ids), rest, temperature)

    def flat(self) -> TopKLogits:
        """The same as rows, ``(N, K)``."""
        k = self.ids.shape[-1]
        return replace(
            self, ids=self.ids.reshape(-1, k), logits=self.logits.reshape(-1, k), rest=self.rest.reshape(-1)
        )

    def rows(self, which: slice | Tensor) -> TopKLogits:
        """Return a selection of rows of what `flat` returned."""
        return replace(self, ids=self.ids[which], logits=self.logits[which], rest=self.rest[which])
