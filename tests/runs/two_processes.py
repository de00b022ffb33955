"""Trainings that `test_two_processes.py` runs in one launch of two processes, one after the other.

The launch takes most of the time: imports of two interpreters and their meeting.
"""

from __future__ import annotations

import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from luce import CRDLoss, CrossEntropyLoss, FitNetLoss, IEKDLoss, KDLoss, VIDLoss
from luce.cli import main
from luce.data import Examples, loader
from luce.errors import UserError
from luce.methods import FeatureMethod, LogitMethod
from luce.models import Classifier
from luce.signals import LiveTeacher
from luce.training import TrainingOptions, fit, metrics
from luce.training.setup import new_accelerator

FEATURES = ("task,vid", "vid", "task,crd,hint,iekd,norm")
"""Terms of the trainings on features; ``norm`` adds batch normalisation to both networks."""


def network(seed: int, width: int, terms: str) -> Classifier:
    torch.manual_seed(seed)
    convolution, rest = nn.Conv2d(1, width, 3), nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    norm = nn.BatchNorm2d(width) if "norm" in terms else nn.Identity()
    first, head = nn.Sequential(convolution, norm, nn.Tanh()), nn.Linear(4 * width, 4)
    parts = {"map": first, "pool": rest, "head": head}
    return Classifier(nn.Sequential(OrderedDict(parts)))


def train_on_features(terms: str, batch_size: int, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """Train with these terms and return what method and student have learned."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(64, 1, 6, 6), torch.arange(64) % 4)
    losses = {
        "vid": (1.0, VIDLoss(), ["map"], ["map"]),
        "hint": (1.0, FitNetLoss(), ["map"], ["map"]),
        "crd": (0.8, CRDLoss(width=8, negatives=6), ["pool"], ["pool"]),
        "iekd": (1.0, IEKDLoss(split="random", epochs=1), ["map"], ["map"]),
    }
    names = terms.split(",")
    method = FeatureMethod(
        CrossEntropyLoss() if "task" in names else None,
        {name: losses[name] for name in names if name in losses},
    )
    student, teacher = network(1, 3, terms), LiveTeacher(network(2, 5, terms))
    torch.manual_seed(rank)  # the processes have drawn different numbers so far
    options = TrainingOptions(epochs=2, batch_size=batch_size, lr=0.01, optimizer="sgd", cpu=True)
    fit(student, method, Examples(data, range(64)), teacher=teacher, options=options)
    return {"method": method.state_dict(), "student": student.state_dict()}


class WithAuxiliary(nn.Module):
    """A student with a second head that no loss sees; only every other step uses it if it `alternates`."""

    def __init__(self, alternates: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head, self.auxiliary = nn.Linear(6, 4), nn.Linear(6, 4)
        self.alternates, self.passes = alternates, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        extra: torch.Tensor = self.auxiliary(inputs)
        if not self.training:
            return self.head(inputs) + (extra if self.alternates else 0)
        self.passes += 1
        return self.head(inputs) + (extra if self.alternates and self.passes % 2 else 0)


def train_with_auxiliary(batch_size: int, *, alternates: bool = False) -> dict[str, torch.Tensor] | str:
    """Train with KD and return the student's weights, or the message of an error."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 6), torch.arange(32) % 4)
    student, teacher = WithAuxiliary(alternates), LiveTeacher(Classifier(nn.Linear(6, 4)))
    options = TrainingOptions(epochs=2, batch_size=batch_size, lr=0.1, optimizer="sgd", cpu=True)
    try:
        method = LogitMethod(KDLoss())
        fit(Classifier(student), method, Examples(data, range(32)), teacher=teacher, options=options)
    except UserError as error:
        return str(error)
    return student.state_dict()


def figures_of_labelled_rows() -> dict[str, float]:
    """Measure a network on rows of which some have no label; their number is no multiple of the batches'."""
    torch.manual_seed(4)
    network, inputs, targets = nn.Linear(6, 4), torch.randn(33, 6), torch.arange(33) % 4
    targets[::3], targets[1::7] = -1, -100
    accelerator = new_accelerator(TrainingOptions(cpu=True))
    batches = loader(Examples(TensorDataset(inputs, targets), range(33)), batch_size=4, seed=None)
    logits, _, found = metrics.collect(network, accelerator.prepare(batches), accelerator)
    return metrics.brief(logits, found)


def work(folder: Path) -> None:
    """Run every recipe of a folder through the command line, and every training on features."""
    os.chdir(folder)
    rank = int(os.environ["RANK"])
    for path in sorted(Path().glob("*.yaml")):
        command = "distill" if "teacher:" in path.read_text(encoding="utf-8") else "train"
        status = main([command, path.name, "--out", path.stem])
        Path(f"{path.stem}-{rank}.json").write_text(json.dumps(status), encoding="utf-8")
    for number, terms in enumerate(FEATURES):
        torch.save(train_on_features(terms, 8, rank), f"features-{number}-{rank}.pt")
    both = [train_with_auxiliary(8), train_with_auxiliary(8, alternates=True)]
    torch.save(both, f"auxiliary-{rank}.pt")
    Path(f"figures-{rank}.json").write_text(json.dumps(figures_of_labelled_rows()), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
