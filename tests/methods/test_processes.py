"""Methods with gradients of their own in two processes, which one launch starts for all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.xdist_group("two-processes-methods")  # the launch is shared

META_DISTIL = """
import torch, torch.distributed as dist
from luce import KDLoss
from luce.methods import LogitMethod, MetaDistil
from luce.signals import LiveTeacher

rank, world = int(sys.argv[1]), int(sys.argv[2])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
torch.manual_seed(0)
student, teacher = torch.nn.Linear(6, 3).double(), torch.nn.Linear(6, 3).double()
rows, quiz = ([{"input": torch.randn(8, 6).double(), "target": torch.randint(3, (8,))} for _ in range(2)]
              for _ in range(2))
part = slice(rank * 8 // world, (rank + 1) * 8 // world)
mine = [[{name: value[part] for name, value in batch.items()} for batch in kind] for kind in (rows, quiz)]
method = MetaDistil(LogitMethod(KDLoss()), teacher_lr=1.0, batches_per_round=2, clip_norm=None)
method.build(student, LiveTeacher(teacher), rows[0], rows[0])
method.before_round(student, *mine, 0.5)
torch.save([method.teacher.state_dict(), method.record], sys.argv[4])
if world > 1:
    dist.destroy_process_group()  # or its threads may abort the process at its end
"""

MUTUAL = """
import sys
import torch
from torch import distributed, nn
from torch.testing import assert_close
from luce import CrossEntropyLoss, KDLoss, WeightedSum
from luce.methods import LogitMethod, MutualLearning

def train(rank, size):
    torch.manual_seed(1)
    student = nn.Linear(5, 3)
    torch.manual_seed(2 + rank)  # a peer that differs between the processes, until they share it
    loss = WeightedSum({"task": (1.0, CrossEntropyLoss()), "kl": (1.0, KDLoss(temperature=1.0))})
    peer = nn.Linear(5, 3)
    method = MutualLearning(LogitMethod(loss), peer, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    rows = {"input": inputs[rank::size], "target": (torch.arange(8) % 3)[rank::size]}
    method.build(student, None, rows, rows)
    with method.hooks(student, None):
        for _ in range(3):
            method.after_step(student, rows)
    return peer.state_dict()

alone = train(0, 1)
distributed.init_process_group("gloo", init_method=sys.argv[5], rank=int(sys.argv[1]), world_size=2)
together = train(distributed.get_rank(), 2)
assert_close(together, alone)
for tensor in together.values():
    both = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(both, tensor)
    assert torch.equal(*both)
distributed.destroy_process_group()  # or its threads may abort the process at its end
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of two processes that ran both scripts, each process with half of the rows."""
    path = tmp_path_factory.mktemp("processes")
    script = f"import sys\n{META_DISTIL}\n{MUTUAL}"
    running = []
    for rank in range(2):
        files = [path / "meeting", path / f"{rank}-of-2", (path / "second-meeting").as_uri()]
        command = [sys.executable, "-c", script, str(rank), "2", *map(str, files)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    failures = []
    for process in running:
        _, errors = process.communicate(timeout=300)
        failures += [f"status {process.returncode}: {errors}"] if process.returncode else []
    (path / "failures").write_text("\n".join(failures))
    return path


def test_two_processes_teach_as_one_does(folder: Path) -> None:
    exec(META_DISTIL, {"sys": SimpleNamespace(argv=["", "0", "1", "", str(folder / "0-of-1")])})
    alone, *halves = (torch.load(folder / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    for half in halves:
        assert_close(half[0], alone[0], rtol=1e-9, atol=1e-12)
        assert half[1]["drift"] == pytest.approx(alone[1]["drift"], rel=1e-4)
    assert halves[0][1] == halves[1][1]


def test_two_processes_train_one_peer_as_one_does(folder: Path) -> None:
    """The script of mutual learning, the second one, compares both processes with a single one."""
    assert (folder / "failures").read_text() == ""
