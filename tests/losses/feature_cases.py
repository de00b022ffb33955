"""Every loss on features, with the shapes and options that the battery holds it to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import luce
from luce.losses import FeatureLoss
from luce.methods import train_by_sgd

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """One loss with options, on features of these shapes without the batch.

    Attributes:
        depends_on_order: Of the rows of a batch.
        zero_at_equality: Without what it learns, of the same features in both networks.
        couples_rows: A batch is no mean over its rows.
    """

    module: type[FeatureLoss]
    student: Shapes
    teacher: Shapes
    options: dict[str, Any] = field(default_factory=dict)
    depends_on_order: bool = False
    couples_rows: bool = False

    def __str__(self) -> str:
        return "-".join([self.module.__name__, *map(str, self.options.values())])

    def build(self) -> FeatureLoss:
        torch.manual_seed(1)
        return self.ready(self.module(**self.options))

    def ready(self, loss: FeatureLoss) -> FeatureLoss:
        """Built, and prepared if it must be."""
        loss.build(self.student, self.teacher)
        if loss.needs_preparation:
            _, teacher = self.batch(8, torch.float32)
            loss.prepare(lambda batch_size, epochs=1, shuffle=False: [teacher] * epochs, train_by_sgd)
        return loss

    def batch(self, rows: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
        random = torch.Generator().manual_seed(rows)
        student, teacher = (
            [torch.randn(rows, *shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]
            for shapes in (self.student, self.teacher)
        )
        return student, teacher


SMALL, LARGE = ((3, 4, 4), (4, 2, 2)), ((5, 4, 4), (2, 3, 2))  # channels differ, and a size
FLOW = ((3, 4, 4), (4, 2, 2)), ((5, 4, 4), (4, 2, 2))
VECTORS = ((5,),), ((4,),)
LAST = ((5, 4, 4),), ((4, 3, 3),)

CASES = (
    Case(luce.ATLoss, SMALL, LARGE),
    Case(luce.ATLoss, SMALL, LARGE, {"p": 3.0}),
    Case(luce.NSTLoss, SMALL, LARGE),
    Case(luce.NSTLoss, SMALL, LARGE, {"form": "linear"}),
    Case(luce.FitNetLoss, ((3, 4, 4), (2, 4, 3)), ((5, 2, 2), (4, 3, 3))),
    Case(luce.FitNetLoss, ((3, 2, 2),), ((5, 4, 4),), {"relu": False}),
    Case(luce.VIDLoss, SMALL, LARGE),
    Case(luce.VIDLoss, SMALL, LARGE, {"initial_variance": 0.5}),
    Case(luce.FSPLoss, *FLOW),
    Case(luce.CWDLoss, SMALL, LARGE),
    Case(luce.CWDLoss, SMALL, LARGE, {"temperature": 4.0}),
    Case(luce.ICKDLoss, SMALL, LARGE),
    Case(luce.OFDLoss, SMALL, LARGE),
    Case(luce.LipschitzLoss, SMALL, LARGE, {"relative": True}),
    Case(luce.LipschitzLoss, SMALL, LARGE, {"connectors": True, "iterations": 3, "algorithm": "power"}),
    Case(luce.LONDONLoss, SMALL, LARGE),
    Case(
        luce.LONDONLoss,
        SMALL,
        LARGE,
        {"lipschitz_weight": 1.0, "relative": True, "iterations": 3, "algorithm": "power"},
    ),
    Case(luce.MGDLoss, SMALL, LARGE),
    Case(luce.MGDLoss, SMALL, LARGE, {"masked": "places", "mask_ratio": 0.5}),
    Case(luce.SPLoss, SMALL, LARGE, couples_rows=True),
    Case(luce.PKTLoss, *VECTORS, couples_rows=True),
    Case(luce.PKTLoss, *VECTORS, {"eps": 1e-3}, couples_rows=True),
    Case(luce.RKDLoss, *VECTORS, couples_rows=True),
    Case(luce.RKDLoss, *VECTORS, {"distance_weight": 0.0, "angle_weight": 2.0}, couples_rows=True),
    Case(luce.RKDLoss, *VECTORS, {"distance_weight": 3.0, "angle_weight": 0.0}, couples_rows=True),
    Case(luce.CCLoss, *VECTORS, couples_rows=True),
    Case(luce.CCLoss, *VECTORS, {"gamma": 1.0, "order": 3}, couples_rows=True),
    Case(luce.CCLoss, *VECTORS, {"form": "consecutive", "dim": 6}, depends_on_order=True, couples_rows=True),
    Case(
        luce.IEKDLoss,
        *LAST,
        {
            "inheritance_weight": 3.0,
            "exploration_weight": 2.0,
            "form": "cosine",
            "split": "random",
            "code_channels": 3,
            "epochs": 2,
            "lr": 0.01,
        },
    ),
    Case(luce.IEKDLoss, *LAST, {"autoencoder": "online", "reconstruction_form": "l2"}),
)
LEARNT = tuple(case for case in CASES if case.module(**case.options).learns)
FREE = tuple(case for case in CASES if case not in LEARNT)
MASKED = luce.MGDLoss
