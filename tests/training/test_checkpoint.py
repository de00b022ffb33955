"""Checkpoints and exported students."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from luce.errors import UserError
from luce.training import checkpoint


def test_exported_weights_are_plain_copies(tmp_path: Path) -> None:
    tied = nn.Linear(4, 4)
    weights = {"a": tied.weight, "b": tied.weight, "c": tied.weight.T, "d": tied.weight[:, 1]}
    checkpoint.export(tmp_path / "w.safetensors", weights)
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    "description",
    ["", "[]", "{}", '{"model": "mlp"}', "\xff", '{"model": "mlp", "classes": null, "options": {}}'],
)
def test_folders_without_an_exported_student(description: str, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_bytes(description.encode("latin-1"))
    with pytest.raises(UserError, match=r"finished run with an exported student|student\.json is damaged"):
        checkpoint.load_student(tmp_path)
    with pytest.raises(UserError, match=r"expected .* to be a finished run"):
        checkpoint.load_student(tmp_path / "nowhere")


def test_a_copy_with_a_name_of_the_user_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-4.bak", "checkpoint-x", "checkpoint-3 (copy)"):
        (tmp_path / name).mkdir()
    checkpoint.clear(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-4.bak", "checkpoint-x", "checkpoint-3 (copy)"}


def test_a_checkpoint_gets_its_name_when_every_process_has_written_its_part(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)

    class Process:
        def __init__(self, number: int) -> None:
            self.number, self.is_main_process = number, number == 0
            self.failure: Exception | None = None

        def wait_for_everyone(self) -> None:
            barrier.wait(timeout=60)

        def save_state(self, folder: str) -> None:
            Path(folder).mkdir(exist_ok=True)
            if not self.is_main_process:
                time.sleep(0.1)  # the main process has long written its own
            (Path(folder) / f"random_states_{self.number}.pkl").write_bytes(b"")

        def save(self) -> None:
            try:
                checkpoint.save(tmp_path, self, 1, {})  # type: ignore[arg-type]
            except Exception as error:
                self.failure = error
                barrier.abort()

    processes = [Process(number) for number in range(2)]
    threads = [threading.Thread(target=process.save) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.failure for process in processes] == [None, None]
    names = sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir())
    assert names == ["digests.json", "luce.pt", "random_states_0.pkl", "random_states_1.pkl"]
