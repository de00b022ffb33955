"""A small student of magika, a black box that names the type of a file from its bytes, with a score.

    pip install magika 'luce'
    python examples/magika_student.py [FOLDER ...]

Nothing is labelled: the student learns from magika's answers about the files of the folders (Python's
standard library unless given). The test is its agreement with magika on held-out files.
"""

from __future__ import annotations

import copy
import random
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from magika import Magika
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import luce
from luce.signals import BlackBox, CachedTeacher
from luce.signals.blackbox import FLOOR
from luce.signals.teachers import Batch

LENGTH, PADDING = 1024, 256
"""Bytes read from each file, and the id, outside the range of a byte, that fills up shorter files."""
PER_SUFFIX = 200
"""Most files of each suffix."""


class MagikaTeacher(BlackBox):
    """Answers with the best class of each row and its score: ``topk`` with one class."""

    answers, top_k, budget, floor, queries = "topk", 1, None, FLOOR, 0

    def __init__(self) -> None:
        self.magika = Magika()
        self.names = sorted(map(str, self.magika.get_model_content_types()))
        self.classes = len(self.names)

    def query(self, inputs: Tensor) -> Tensor:
        self.check_budget(len(inputs))
        results = [self.magika.identify_bytes(bytes(row[row != PADDING].tolist())) for row in inputs]
        self.queries += len(results)
        return torch.tensor([[self.names.index(str(one.dl.label)), one.score] for one in results])

    def price(self, batches: Iterable[Batch]) -> int:
        return sum(len(batch["input"]) for batch in batches)

    def account(self, name: str) -> MagikaTeacher:
        other = copy.copy(self)
        other.queries = 0
        return other

    def to(self, device: torch.device) -> None:
        """Do nothing: magika runs on the CPU."""


class Bytes(nn.Module):
    """Convolutions over embedded bytes, then the mean and the largest value of each channel."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(PADDING + 1, 16)
        self.body = nn.Sequential(
            nn.Conv1d(16, width, 8, stride=4), nn.ReLU(), nn.Conv1d(width, width, 4, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(self.embed(inputs).transpose(1, 2))
        return self.head(torch.cat([features.mean(-1), features.amax(-1)], dim=1))


def read(folders: Iterable[Path]) -> Tensor:
    """Read the beginnings of files, at most `PER_SUFFIX` of each suffix, each content once."""
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    random.Random(0).shuffle(paths)
    of_suffix: dict[str, int] = {}
    rows: dict[bytes, None] = {}
    for path in paths:
        of_suffix[path.suffix] = of_suffix.get(path.suffix, 0) + 1
        if of_suffix[path.suffix] <= PER_SUFFIX:
            with path.open("rb") as file:
                rows[file.read(LENGTH)] = None
    return torch.tensor([list(row) + [PADDING] * (LENGTH - len(row)) for row in rows])


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]] or [Path(sysconfig.get_path("stdlib"))]
    rows, teacher = read(folders), MagikaTeacher()
    held_out = len(rows) // 5
    answers = CachedTeacher.of(
        teacher,
        ({"input": rows[index], "index": index} for index in torch.arange(len(rows)).split(256)),
        rows=len(rows),
    )
    test, train = rows[:held_out], rows[held_out:]
    choice = answers.logits.argmax(-1)
    print(f"magika classified {teacher.queries} files: {len(choice.unique())} types")

    torch.manual_seed(0)
    student = Bytes(teacher.classes)
    answers.logits = answers.logits[held_out:]
    unlabelled = torch.full((len(train),), luce.UNLABELLED)
    luce.distill(
        student,
        answers,
        TensorDataset(train, unlabelled),
        loss=luce.KDLoss(),
        epochs=8,
        batch_size=64,
        lr=3e-3,
    )
    with torch.no_grad():
        agreement = (student.eval()(test).argmax(-1) == choice[:held_out]).float().mean().item()
    most = (choice[:held_out] == choice[held_out:].mode().values).float().mean().item()
    size = sum(parameter.numel() for parameter in student.parameters())
    print(
        f"the student of {size:,} parameters agrees with it on {agreement:.1%} of {held_out} held-out files;"
    )
    print(f"always answering the most frequent type agrees on {most:.1%}")


if __name__ == "__main__":
    main()
