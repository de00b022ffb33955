"""From texts to token ids, and the doors that let texts in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import TensorDataset

from luce import data
from luce.data import Tokenizer, text
from luce.errors import MissingExtra, UserError

transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
datasets = pytest.importorskip("datasets", reason="needs the extra [text]")

PAD, UNK, CLS, SEP, MASK, WHEAT, CORN, FALLS, RISES = range(9)
LABELS = datasets.ClassLabel(names=["grain", "money", "crude"])
NEWS = {"text": ["wheat falls", "corn rises", "bank loan", "rate"], "label": [0, 0, 1, 1]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Puts rows where `load_dataset` finds them, as both splits."""

    def put(columns=NEWS, **features):
        kinds = {"text": datasets.Value("string"), "label": LABELS, **features}
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        made = datasets.DatasetDict({"train": rows, "test": rows})
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config, cache_dir: made)

    return put


def plain_tokenizer(**settings):
    """One that adds no token of its own."""
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "wheat": 2}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **settings)


# Token ids --------------------------------------------------------------------------------------------------


def test_texts_are_padded_to_one_length(bert_folder: Path) -> None:
    tokenizer = Tokenizer(bert_folder, max_length=5)
    assert (tokenizer.size, tokenizer.padding) == (15, PAD)
    ids = tokenizer(["Wheat falls", "", "corn quickly rises"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [CLS, WHEAT, FALLS, SEP, PAD],
        [CLS, SEP, PAD, PAD, PAD],
        [CLS, CORN, UNK, RISES, SEP],
    ]


def test_a_longer_text_is_cut_and_we_are_told(bert_folder: Path) -> None:
    tokenizer = Tokenizer(bert_folder, max_length=4)
    with pytest.warns(UserWarning, match=r"1 of 3 texts are longer than .*, 4 tokens, and are truncated"):
        ids = tokenizer(["wheat falls", "wheat falls corn rises", "corn"])
    assert ids[1].tolist() == [CLS, WHEAT, FALLS, SEP]


def test_a_tokenizer_in_python_cuts_no_text_unheard() -> None:
    bytes_of = transformers.ByT5Tokenizer()  # has no `encodings`; a token for each letter and one for the end
    with pytest.warns(UserWarning, match=r"2 of 4 texts are longer than `max_length`, 5 tokens"):
        ids = Tokenizer(bytes_of, max_length=5)(["rise", "wheat", "oil", "wheat falls"])
    assert (ids != bytes_of.pad_token_id).sum(1).tolist() == [5, 5, 4, 5]


def test_many_texts_are_read_in_pieces(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, texts = Tokenizer(bert_folder, max_length=4), ["wheat", "corn falls", "rises", "oil"] * 3
    whole = tokenizer(iter(texts))
    monkeypatch.setattr(text, "CHUNK", 5)
    assert torch.equal(tokenizer(texts), whole)
    with pytest.warns(UserWarning, match="2 of 14 texts"):
        tokenizer(["oil oil oil", *texts, "oil oil oil"])


def test_no_texts_are_no_rows(bert_folder: Path) -> None:
    assert Tokenizer(bert_folder, max_length=7)([]).shape == (0, 7)


def test_a_tokenizer_that_is_loaded_already() -> None:
    assert Tokenizer(plain_tokenizer(pad_token="[PAD]"), 3)(["wheat corn"]).tolist() == [[2, 1, 0]]


def test_what_is_no_text(bert_folder: Path) -> None:
    tokenizer = Tokenizer(bert_folder, max_length=4)
    with pytest.raises(UserError, match="expected texts, got NoneType as text 1"):
        tokenizer(["wheat", None])
    with pytest.raises(UserError, match="expected a list of texts, got a single string"):
        tokenizer("wheat falls")
    with pytest.raises(UserError, match="expected texts, got list as text 0"):
        tokenizer([["wheat", "corn"]])
    with pytest.raises(UserError, match="a token in every text, text 1 has none"):
        Tokenizer(plain_tokenizer(pad_token="[PAD]"), 3)(["wheat", " "])


def test_what_is_no_tokenizer(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"on the hub or in a local folder, got `.*` \("):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"on the hub or in a local folder, got `.*` \("):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match="a tokenizer with a padding token"):
        Tokenizer(plain_tokenizer())
    for length in (0, -1, 2, 33, 8.0, "8", True):  # the tokenizer adds two itself
        with pytest.raises(UserError, match=rf"`max_length` in 3 \.\. 32 for `.*`, got {length!r}"):
            Tokenizer(bert_folder, max_length=length)
    with pytest.raises(UserError, match=r"`max_length` in 1 \.\. .*, got 0"):
        Tokenizer(plain_tokenizer(pad_token="[PAD]"), max_length=0)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "T5", "DebertaV2"])
def test_a_folder_with_a_network_alone(kind: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"expected a tokenizer"):
        Tokenizer(tmp_path)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"`transformers` could not be imported .*'luce\[text\]'"):
        Tokenizer("some/tokenizer")


# Doors ------------------------------------------------------------------------------------------------------


def test_a_column_of_texts(hub, bert_folder: Path) -> None:
    hub()
    it = data.load("hf:some/news", tokenizer=str(bert_folder), max_length=6)
    assert it.classes == ("grain", "money", "crude")
    assert it.input_shape == (6,)
    assert it.train[0][0].dtype == it.test.batch(torch.tensor([1]))[0].dtype == torch.int64
    assert it.train[0][0].tolist() == [CLS, WHEAT, FALLS, SEP, PAD, PAD]
    assert it.train.targets.tolist() == [0, 0, 1, 1]
    assert (it.mean, it.std) == ((0.0,), (1.0,))
    assert it.tokenizer is not None
    assert it.tokenizer(["wheat falls"]).tolist() == [it.train[0][0].tolist()]


@pytest.mark.parametrize("options", [{}, {"input_column": "text"}])
def test_texts_need_a_tokenizer(hub, options: dict[str, str]) -> None:
    hub()
    with pytest.raises(UserError, match="a `tokenizer` for the texts in column `text`"):
        data.load("hf:some/news", **options)


def test_which_column(hub, bert_folder: Path) -> None:
    numbers = {"numbers": [[1.0, 2.0]] * 4}
    hub({**NEWS, **numbers}, numbers=datasets.Sequence(datasets.Value("float32")))
    assert data.load("hf:some/set").input_shape == (2,)
    with pytest.raises(UserError, match="a `tokenizer` for the texts in column `text`"):
        data.load("hf:some/set", input_column="text")
    tokenizer = {"tokenizer": str(bert_folder), "max_length": 5}
    assert data.load("hf:some/set", **tokenizer).input_shape == (5,)
    with pytest.raises(UserError, match="a column of texts for `tokenizer`, `numbers` holds other values"):
        data.load("hf:some/set", input_column="numbers", **tokenizer)
    hub({**NEWS, "title": ["oil"] * 4}, title=datasets.Value("large_string"))
    with pytest.raises(UserError, match="`input_column`: 2 columns fit; name one of text, title"):
        data.load("hf:some/set", **tokenizer)
    titles = data.load("hf:some/set", input_column="title", **tokenizer)
    assert len(set(map(tuple, titles.train.inputs.tolist()))) == 1


def test_a_missing_text_and_a_tokenizer_that_is_none(hub, bert_folder: Path, tmp_path: Path) -> None:
    hub({"text": ["wheat", None], "label": [0, 1]})
    with pytest.raises(UserError, match="expected texts, got NoneType as text 1"):
        data.load("hf:some/news", tokenizer=str(bert_folder), max_length=8)
    with pytest.raises(UserError, match="in a local folder, got"):
        data.load("hf:some/news", tokenizer=str(tmp_path))


@pytest.mark.parametrize("with_test", [False, True])
def test_texts_of_ones_own(with_test: bool, bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def news(max_length: int) -> data.Data:
        tokenizer = Tokenizer(bert_folder, max_length)
        rows = TensorDataset(tokenizer(NEWS["text"] * 3), torch.tensor(NEWS["label"] * 3))
        return data.from_datasets(rows, rows if with_test else None, tokenizer=tokenizer)

    module = ModuleType("own")
    module.news = news  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own", module)
    it = data.load("python:own.news", max_length=8)
    assert it.input_shape == (8,)
    assert it.tokenizer is not None
    assert (it.tokenizer.max_length, it.mean, it.std) == (8, (0.0,), (1.0,))
    assert data.load("sklearn:iris").tokenizer is None
