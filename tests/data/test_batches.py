from __future__ import annotations

import os
import re
import signal
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import Dataset, TensorDataset, get_worker_info

from luce import stops
from luce.data import EpochSampler, Examples, InMemory, loader
from luce.data.sources import Source
from luce.errors import MissingExtra, UserError

SIZE = 23


@pytest.fixture
def examples() -> Examples:
    return Examples(TensorDataset(torch.arange(float(SIZE))[:, None], torch.arange(SIZE) % 2), range(SIZE))


def order(batches) -> list[int]:
    return torch.cat([batch["index"] for batch in batches]).tolist()


def test_without_a_seed_rows_come_in_order(examples):
    batches = list(loader(examples, batch_size=10, seed=None))
    assert [len(batch["target"]) for batch in batches] == [10, 10, 3]
    assert order(batches) == list(range(SIZE))
    assert torch.cat([batch["input"] for batch in batches]).squeeze(1).tolist() == list(range(SIZE))
    assert len(list(loader(examples, batch_size=10, seed=None, drop_last=True))) == 2


def test_order_is_a_function_of_seed_and_epoch(examples):
    def epoch(seed, number):
        batches = loader(examples, batch_size=10, seed=seed)
        batches.sampler.set_epoch(number)
        torch.rand(3)  # the global generator has no say
        return order(batches)

    assert sorted(epoch(0, 0)) == list(range(SIZE))
    assert epoch(5, 7) == epoch(5, 7)
    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_the_order_of_a_resumed_epoch_does_not_depend_on_earlier_ones():
    resumed, running = EpochSampler(SIZE, seed=1), EpochSampler(SIZE, seed=1)
    orders = []
    for epoch in range(3):
        running.set_epoch(epoch)
        orders.append(list(running))
    resumed.set_epoch(2)
    assert list(resumed) == orders[2] != orders[1]


def test_set_epoch_arrives_through_accelerate(examples):
    plain = loader(examples, batch_size=10, seed=4)
    prepared = Accelerator(cpu=True).prepare(loader(examples, batch_size=10, seed=4))
    for epoch in (0, 3, 1):
        plain.sampler.set_epoch(epoch)
        prepared.set_epoch(epoch)
        assert order(prepared) == order(plain)


def test_processes_share_an_epoch(examples):
    plain = loader(examples, batch_size=4, seed=4)
    plain.sampler.set_epoch(2)
    batches = [batch["index"].tolist() for batch in plain]
    for rank in range(2):
        shard = prepare_data_loader(
            loader(examples, batch_size=4, seed=4), num_processes=2, process_index=rank, even_batches=False
        )
        shard.set_epoch(2)
        assert [batch["index"].tolist() for batch in shard] == batches[rank::2]


def test_augmentation_sees_whole_batches_and_follows_the_global_generator(examples):
    shapes = []

    def noise(inputs):
        shapes.append(tuple(inputs.shape))
        return inputs + torch.rand_like(inputs)

    batches = loader(examples, batch_size=10, seed=0, augment=noise)
    state = torch.get_rng_state()
    first = [batch["input"] for batch in batches]
    assert shapes == [(10, 1), (10, 1), (3, 1)]
    torch.set_rng_state(state)
    assert all(a.equal(b["input"]) for a, b in zip(first, batches, strict=True))
    assert not all(a.equal(b["input"]) for a, b in zip(first, batches, strict=True))


def test_a_strong_view_is_another_draw_of_the_augmentation_with_more_on_top(examples):
    def noise(inputs):
        return inputs + torch.rand_like(inputs)

    batches = loader(examples, batch_size=10, seed=0, augment=noise, strong_augment=torch.neg)
    state = torch.get_rng_state()
    views = list(batches)
    for batch in views:
        plain = batch["index"][:, None].float()
        drawn = batch["input"] - plain, -batch["strong"] - plain
        assert all(((x >= 0) & (x < 1)).all() for x in drawn)
        assert not torch.equal(*drawn)
    torch.set_rng_state(state)
    again = list(batches)
    assert all(a["strong"].equal(b["strong"]) for a, b in zip(views, again, strict=True))
    (alone, *_) = loader(examples, batch_size=10, seed=0, strong_augment=torch.neg)
    assert alone["strong"].equal(-alone["input"])
    (single, *_) = loader(examples, batch_size=10, seed=0)
    assert "strong" not in single


@pytest.mark.parametrize("prepare", [False, True])
def test_evaluating_leaves_the_global_generator_alone(examples, prepare):
    batches = loader(examples, batch_size=10, seed=None)
    if prepare:
        batches = Accelerator(cpu=True).prepare(batches)
    state = torch.get_rng_state()
    assert len(order(batches)) == SIZE
    assert torch.get_rng_state().equal(state)


def test_workers_give_the_same_batches(examples):
    ours, theirs = (loader(examples, batch_size=10, seed=3, workers=workers) for workers in (0, 1))
    assert order(ours) == order(theirs)


def test_a_batch_in_memory_is_one_read():
    class Counting(InMemory):
        def read(self, index):
            raise AssertionError("read row by row")

    source = Counting(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.arange(8))
    batches = list(loader(Examples(source, range(8)), batch_size=4, seed=0))
    assert [tuple(batch["input"].shape) for batch in batches] == [(4, 1, 2, 2)] * 2


def test_rows_of_any_dataset_are_stacked():
    class Rows(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.full((2,), float(index)), 0

    (batch,) = loader(Examples(Rows(), range(4)), batch_size=4, seed=None)
    assert batch["input"].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_loader_refuses_sizes_that_give_no_batch(examples):
    with pytest.raises(UserError, match="`batch_size` to be at least 1, got 0"):
        loader(examples, batch_size=0, seed=None)
    with pytest.raises(UserError, match="one batch of 24 with `drop_last`, got 23 examples"):
        loader(examples, batch_size=24, seed=0, drop_last=True)
    with pytest.raises(UserError, match="`seed`"):
        loader(examples, batch_size=4, seed=-1)


class Fails(Dataset):
    """Items that end in errors."""

    targets = torch.zeros(8, dtype=torch.int64)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        if index == 5 and get_worker_info() is not None:
            raise self.error
        return torch.zeros(1), 0


class TwoArguments(Exception):
    """Cannot be pickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class Reads(Source):
    """A source that reads nothing but its error."""

    targets = torch.zeros(8, dtype=torch.int64)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, index: int) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [UserError("expected a: b, got ReaderError: c\nand more"), MissingExtra("install it"), KeyError("k", 1)],
)
def test_an_error_is_the_same_from_any_number_of_processes(error: Exception) -> None:
    for workers in (0, 1):
        with pytest.raises(type(error)) as caught:
            list(loader(Examples(Reads(error), range(8)), batch_size=4, seed=None, workers=workers))
        assert type(caught.value) is type(error)
        assert caught.value.args == error.args
    assert "in read\n    raise self.error" in str(caught.value.__cause__)


def test_an_error_that_cannot_be_made_again_arrives_as_text() -> None:
    with pytest.raises(RuntimeError, match="TwoArguments: ab"):
        list(loader(Examples(Reads(TwoArguments("a", "b")), range(8)), batch_size=4, seed=None, workers=1))


def test_an_error_of_a_dataset_names_the_item_in_any_process() -> None:
    batches = loader(Examples(Fails(ZeroDivisionError("0")), range(8)), batch_size=4, seed=None, workers=1)
    with pytest.raises(UserError, match=r"cannot read item 5 of .* raised ZeroDivisionError: 0$"):
        list(batches)


class Ends(Fails):
    def __getitem__(self, index: int):
        if index == 5 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_reading_process_that_is_killed_is_told_in_a_sentence() -> None:
    batches = loader(Examples(Ends(ValueError()), range(8)), batch_size=4, seed=None, workers=1)
    with pytest.raises(UserError) as caught, stops.noted():
        list(batches)
    assert re.fullmatch(
        "a process that reads data (is killed by signal: Killed|exited unexpectedly), perhaps as memory ran "
        "out; lower `data.workers` or `training.batch_size`, or find an error of the data with "
        "`data.workers: 0`",
        str(caught.value),
    )
