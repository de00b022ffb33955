"""Files of weights, good and bad."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from luce import models
from luce.errors import UserError
from luce.training import checkpoint


def network() -> nn.Module:
    return models.build("cnn", classes=3, input_shape=(1, 8, 8), widths=[2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_go_to_a_file_and_back(suffix: str, tmp_path: Path) -> None:
    source, target, path = network(), network(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    checkpoint.load_weights(target, path)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "args": {"lr": 0.1}},
        lambda weights: {f"module.{name}": value for name, value in weights.items()},
        lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    ],
)
def test_wrappings_of_other_tools_are_taken_off(wrap: Any, tmp_path: Path) -> None:
    source = network()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    checkpoint.load_weights(network(), tmp_path / "weights.pt")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("by_torch", [False, True])
def test_what_a_pickle_holds_is_not_executed(wrapped: bool, by_torch: bool, tmp_path: Path) -> None:
    bomb: Any = Bomb(tmp_path / "exploded")
    content = {"state_dict": network().state_dict(), "extra": bomb} if wrapped else bomb
    if by_torch:
        torch.save(content, tmp_path / "weights.pt")
    else:
        (tmp_path / "weights.pt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"weights\.pt .*holds more than tensors"):
        checkpoint.load_weights(network(), tmp_path / "weights.pt")
    assert not (tmp_path / "exploded").exists()
    if by_torch:
        torch.load(tmp_path / "weights.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "weights.pt").read_bytes())
    assert (tmp_path / "exploded").exists()  # the bomb was no dud


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="save its state_dict as safetensors"):
        checkpoint.read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 3}, {1: torch.zeros(2)}, torch.zeros(3), {"model": {"a": 1}}]
)
def test_files_of_other_things(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"expected .*weights\.pt to hold tensors by name"):
        checkpoint.read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut short", "folder"])
def test_files_that_cannot_be_read(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network().state_dict(), path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"not weights at all", "cut short": whole[:200]}[damage])
    with pytest.raises(UserError, match=rf"weights\{suffix}") as caught:
        checkpoint.load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network(tmp_path: Path) -> None:
    def complaint(weights: dict[str, torch.Tensor]) -> str:
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=r"w\.safetensors does not fit the network") as caught:
            checkpoint.load_weights(network(), tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    weights = network().state_dict()
    head = next(name for name in weights if name.startswith("head") and name.endswith("weight"))
    assert head in complaint({name: value for name, value in weights.items() if name != head})
    assert "stranger" in complaint({**weights, "stranger": torch.zeros(1)})
    assert head in complaint({**weights, head: torch.zeros(9, 2)})


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
    with pytest.raises(UserError, match=r"expected .* to be a finished run with an exported student"):
        checkpoint.load_student(tmp_path)
    with pytest.raises(UserError, match=r"expected .* to be a finished run"):
        checkpoint.load_student(tmp_path / "nowhere")


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
    assert names == ["luce.pt", "random_states_0.pkl", "random_states_1.pkl"]
