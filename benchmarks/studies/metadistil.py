"""Time and memory of a step of MetaDistil against a step of KD.

    python -m benchmarks.studies.metadistil [THREADS]

The steps take turns, forward, backward and the optimizer's, on the same batch; the quiz is one batch of as
many rows. Times are medians of the process's CPU time, which other processes disturb little; a sixteenth of a
comparison by the guard is added to each step of MetaDistil. Ratios are taken within a round.
Memory is how far the resident set of a fresh process rises from before its networks are built, at its highest
in three steps: weights, gradients and states of the optimizers included, on Linux only.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import RETURN_BLOCKS, risen
from luce import CrossEntropyLoss, KDLoss, WeightedSum, models
from luce.methods import LogitMethod, MetaDistil
from luce.methods.metadistil import LOOK_EVERY
from luce.models.network import logits_of
from luce.signals import LiveTeacher

KD = {"task": (0.1, CrossEntropyLoss()), "kd": (0.9, KDLoss(temperature=4.0))}
ROUNDS = 7
CLASSES = 100


class Text(nn.Module):
    """A BERT of random weights on ids of tokens."""

    def __init__(self, layers: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
        config = BertConfig(vocab_size=1000, num_hidden_layers=layers, num_labels=CLASSES, **sizes)
        self.body = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return logits_of(self.body(input_ids=ids))


def image(name: str) -> nn.Module:
    return models.build(name, classes=CLASSES, input_shape=(3, 32, 32))


def mlp(width: int) -> nn.Module:
    return models.build("mlp", classes=CLASSES, input_shape=(3, 32, 32), hidden=[width, width])


@dataclass(frozen=True)
class Pair:
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    rows: int
    text: bool = False

    def batch(self, rows: int) -> dict[str, Tensor]:
        inputs = torch.randint(1000, (rows, 64)) if self.text else torch.rand(rows, 3, 32, 32)
        return {"input": inputs, "target": torch.randint(CLASSES, (rows,))}


PAIRS = {
    "resnet8 of resnet20": Pair(lambda: image("resnet8"), lambda: image("resnet20"), 32),
    "resnet8 of resnet8": Pair(lambda: image("resnet8"), lambda: image("resnet8"), 32),
    "resnet20 of resnet8": Pair(lambda: image("resnet20"), lambda: image("resnet8"), 32),
    "mlp 512 of mlp 1024": Pair(lambda: mlp(512), lambda: mlp(1024), 128),
    "BERT 2 layers of 4": Pair(lambda: Text(2), lambda: Text(4), 16, text=True),
    "BERT 2 layers of 2": Pair(lambda: Text(2), lambda: Text(2), 16, text=True),
}


class Step:
    """A training step by plain KD or by MetaDistil."""

    def __init__(self, pair: Pair, rows: float | None) -> None:
        """Build a step; `rows` is MetaDistil's option, None for plain KD."""
        self.student, self.teacher = pair.student().train(), LiveTeacher(pair.teacher())
        self.plain = LogitMethod(WeightedSum(KD))
        self.method: MetaDistil | None = None
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        if rows is not None:
            self.method = MetaDistil(self.plain, rows=rows, max_drop=1.0)
            self.method.build(self.student, self.teacher, pair.batch(2), {})
            self.quiz = [pair.batch(pair.rows)]

    def __call__(self, batch: dict[str, Tensor]) -> None:
        if self.method is None:
            terms = self.plain.step(self.student, batch, self.teacher.signal(batch))
        else:
            self.method.record["rounds"] = 2.0  # no comparison in this one
            self.method.before_round(self.student, [batch], self.quiz, 0.05)
            terms = self.method.step(self.student, batch, None)
        terms["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


VARIANTS = {"KD": None, "MetaDistil": 1.0, "MetaDistil, rows=0.5": 0.5}


def seconds(pair: Pair) -> dict[str, list[float]]:
    steps = {name: Step(pair, rows) for name, rows in VARIANTS.items()}
    batch = pair.batch(pair.rows)
    for step in steps.values():
        step(batch)
    seconds_of: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(ROUNDS):
        for name in order:
            step = steps[name]
            begin = time.process_time()
            step(batch)
            seconds_of[name].append(time.process_time() - begin)
            if step.method is not None:
                begin = time.process_time()
                step.method._compare([step.method._part(batch) for batch in step.quiz])
                seconds_of[name][-1] += (time.process_time() - begin) / LOOK_EVERY
        order.reverse()
    return seconds_of


def peak(pair: Pair, rows: float | None) -> int:
    """Return the peak in bytes, in a process that has only loaded its libraries."""
    Step(pair, rows)(pair.batch(2))
    batch = pair.batch(pair.rows)

    def work() -> None:
        step = Step(pair, rows)
        for _ in range(3):
            step(batch)

    return risen(work)


def in_a_fresh_process(pair: str, variant: str, threads: int) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.studies.metadistil", str(threads), pair, variant],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **RETURN_BLOCKS},
    )
    return int(done.stdout)


def main(threads: str = "1", pair: str | None = None, variant: str | None = None) -> None:
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    if pair is not None and variant is not None:
        print(peak(PAIRS[pair], VARIANTS[variant]))
        return
    print(
        f"torch {torch.__version__}, {threads} thread(s), load {os.getloadavg()[0]:.1f}, medians of {ROUNDS}"
    )
    for name, networks in PAIRS.items():
        time_of = seconds(networks)
        memory = {each: in_a_fresh_process(name, each, int(threads)) for each in VARIANTS}
        for each in itertools.islice(VARIANTS, 1, None):
            ratio = median(b / a for a, b in zip(time_of["KD"], time_of[each], strict=True))
            row: dict[str, Any] = {
                "pair": name,
                "rows": networks.rows,
                "variant": each,
                "KD, ms": round(1e3 * median(time_of["KD"]), 1),
                "ms": round(1e3 * median(time_of[each]), 1),
                "times": round(ratio, 2),
                "KD, MB": round(memory["KD"] / 1e6),
                "MB": round(memory[each] / 1e6),
                "memory times": round(memory[each] / memory["KD"], 2),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
