"""Text classifiers of Hugging Face: padding, small ones from large ones, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from luce import models
from luce.data import Tokenizer
from luce.errors import UserError
from luce.models import Classifier, mask_padding
from luce.models.classes import class_names
from luce.models.hooks import Features
from luce.models.loaders import FreshWeights
from luce.models.text import check_tokens

transformers = pytest.importorskip("transformers", reason="needs the extra [text]")

TOKENS, LENGTH = 12, 10
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
RANGE = {"initializer_range": 0.3}  # far from 0, so that what is looked at shows in the logits
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SMALL, **RANGE, vocab_size=TOKENS, pad_token_id=0),
    "roberta": lambda: transformers.RobertaConfig(
        **SMALL, **RANGE, vocab_size=TOKENS, pad_token_id=1, max_position_embeddings=LENGTH + 2
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=TOKENS, dim=16, n_layers=2, n_heads=2, hidden_dim=16, pad_token_id=0, **RANGE
    ),
    "deberta": lambda: transformers.DebertaV2Config(
        **SMALL, **RANGE, vocab_size=TOKENS, pad_token_id=0, relative_attention=True
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, pad_token_id=11, **RANGE
    ),
}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_labels = 3
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return models.logits_of(model(ids))


# Padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_does_not_change_logits(kind: str) -> None:
    model = mask_padding(network(kind))
    padding = model.config.pad_token_id
    words = [token for token in range(TOKENS) if token != padding]

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.sampled_from(words), min_size=1, max_size=6), st.integers(1, LENGTH - 6))
    def law(text: list[int], more: int) -> None:
        padded = torch.tensor([text + [padding] * more])
        torch.testing.assert_close(
            logits(model, padded), logits(model, torch.tensor([text])), rtol=1e-4, atol=1e-4
        )

    law()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "deberta"])  # gpt2 never looks ahead
def test_without_the_mask_it_does(kind: str) -> None:
    model = network(kind)
    padding = model.config.pad_token_id
    short, long = torch.tensor([[5, 7]]), torch.tensor([[5, 7, padding, padding]])
    assert (logits(model, short) - logits(model, long)).abs().max() > 1e-2


def test_texts_of_several_lengths_in_one_batch() -> None:
    model = mask_padding(network("bert"))
    texts = [[3], [4, 5, 6, 7], [8, 9]]
    batch = torch.tensor([text + [0] * (6 - len(text)) for text in texts])
    alone = torch.cat([logits(model, torch.tensor([text])) for text in texts])
    torch.testing.assert_close(logits(model, batch), alone, rtol=1e-4, atol=1e-4)


def test_a_mask_of_the_callers_own_is_left_alone() -> None:
    model, plain = mask_padding(network("bert")), network("bert")
    ids, mask = torch.tensor([[5, 7, 0, 3]]), torch.tensor([[1, 0, 1, 1]])
    with torch.no_grad():
        given_ = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(model(**given_).logits, plain(**given_).logits)
        assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
        assert torch.equal(model(ids, mask).logits, plain(ids, mask).logits)


def test_however_it_is_called() -> None:
    model = mask_padding(network("bert"))
    ids, padded = torch.tensor([[5, 7]]), torch.tensor([[5, 7, 0, 0]])
    expected = logits(model, ids)
    with torch.no_grad():
        words = model.bert.embeddings.word_embeddings(ids)
        answers = [
            model(input_ids=padded),
            model(padded, attention_mask=None),
            model(padded, token_type_ids=torch.zeros_like(padded)),
            model(inputs_embeds=words),
            mask_padding(model)(padded),
            torch.compile(model, backend="eager", fullgraph=True)(padded),
        ]
    for answer in answers:
        torch.testing.assert_close(answer.logits, expected, rtol=1e-4, atol=1e-4)


def test_who_reads_padding_as_text_is_told(recwarn) -> None:
    masked, image = mask_padding(network("bert")), transformers.CLIPConfig()
    image.vision_config.update({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    for model in (masked, torch.compile(masked), transformers.CLIPForImageClassification(image)):
        Classifier(model)
    assert warnings_of(recwarn) == []
    with pytest.warns(UserWarning, match=r"BertFor.* reads padding as text; .*luce\.models\.mask_padding"):
        Classifier(network("bert"))


def test_copies_look_past_padding_too() -> None:
    model = mask_padding(network("bert"))
    ids, padded = torch.tensor([[5, 7]]), torch.tensor([[5, 7, 0, 0]])
    expected = logits(model, ids)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model), Classifier(model)
    for other in copies:
        torch.testing.assert_close(logits(other, padded), expected, rtol=1e-4, atol=1e-4)
    weights = dict(model.named_parameters())
    answer = torch.func.functional_call(model, weights, (padded,)).logits
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        (torch.zeros(2, 3), r"torch\.float32 of shape \(2, 3\)"),
        (torch.zeros(2, 1, 8, dtype=torch.int64), r"torch\.int64 of shape \(2, 1, 8\)"),
        ([1, 2], "list"),
    ],
)
def test_what_are_no_token_ids(inputs: object, got: str) -> None:
    with pytest.raises(UserError, match=rf"token ids of shape \(N, T\) for BertFor.*, got {got}"):
        mask_padding(network("bert"))(inputs)


def test_a_network_must_name_its_padding(tmp_path: Path) -> None:
    model = network("gpt2")
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    for broken in (model, nn.Linear(2, 2)):
        with pytest.raises(UserError, match=f"in the config of {type(broken).__name__}, got none"):
            mask_padding(broken)
    with pytest.raises(UserError, match="set `pad_token_id`"):
        models.build(f"hf:{tmp_path}", classes=3)
    built = models.build(f"hf:{tmp_path}", classes=3, pad_token_id=11)
    expected = logits(built, torch.tensor([[5, 7]]))
    torch.testing.assert_close(logits(built, torch.tensor([[5, 7, 11]])), expected, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_is_anothers() -> None:
    model = network("roberta")
    check_tokens(model, size=TOKENS, padding=1)
    check_tokens(model, size=TOKENS - 2, padding=1)
    check_tokens(nn.Linear(2, 2), size=TOKENS, padding=0)  # tells nothing of tokens
    characters = nn.Identity()
    characters.config = transformers.CanineConfig(pad_token_id=0)
    check_tokens(characters, size=1114112, padding=0)
    with pytest.raises(UserError, match="a network with padding token 1"):
        check_tokens(characters, size=1114112, padding=1)
    with pytest.raises(UserError, match="at least the 13 tokens of the tokenizer, got 12"):
        check_tokens(model, size=13, padding=1)
    with pytest.raises(UserError, match=r"a network with padding token 0, as in the tokenizer, got 1"):
        check_tokens(model, size=TOKENS, padding=0)


# By name ----------------------------------------------------------------------------------------------------


def warnings_of(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_the_first_layers_of_a_checkpoint(bert_folder: Path, recwarn, capfd, caplog) -> None:
    whole, first = (
        models.build(f"hf:{bert_folder}", classes=3, **options) for options in ({}, {"num_hidden_layers": 1})
    )
    # What becomes of layers that are not asked for is nobody's concern, and what is kept is not fresh.
    assert warnings_of(recwarn) == []
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])
    ours, theirs = first.state_dict(), whole.state_dict()
    assert ours.keys() == {name for name in theirs if "encoder.layer.1." not in name}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert models.count_parameters(first) < models.count_parameters(whole)


def test_only_the_head_is_fresh_for_other_classes(bert_folder: Path) -> None:
    with pytest.warns(
        FreshWeights, match=r"does not fill classifier\.bias, classifier\.weight for 5 classes;"
    ):
        models.build(f"hf:{bert_folder}", classes=5, num_hidden_layers=1)


def test_a_trained_head_states_its_classes(bert_folder: Path, tmp_path: Path) -> None:
    names = {"0": "crude", "1": "grain", "2": "money"}
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
    assert class_names(models.build(f"hf:{folder}", classes=3)) == ("crude", "grain", "money")
    assert class_names(models.build(f"hf:{bert_folder}", classes=3)) == ("LABEL_0", "LABEL_1", "LABEL_2")
    told = models.build(f"hf:{bert_folder}", classes=3, id2label={0: "x", 1: "y", 2: "z"})
    assert class_names(told) == ("x", "y", "z")
    with pytest.warns(FreshWeights):  # layers below the head
        assert class_names(models.build(f"hf:{folder}", classes=3, num_hidden_layers=3)) is not None
    with pytest.warns(FreshWeights):
        assert class_names(models.build(f"hf:{folder}", classes=5)) is None
    weights = models.build(f"hf:{folder}", classes=3).bert.state_dict()
    save_file({f"bert.{name}": value for name, value in weights.items()}, folder / "model.safetensors")
    with pytest.warns(FreshWeights):  # a checkpoint without a head, as before its first training
        assert class_names(models.build(f"hf:{folder}", classes=3)) is None
    assert class_names(models.build(f"hf:{folder}", classes=3, pretrained=False)) is None


def test_a_long_list_of_fresh_weights_is_cut_short(bert_folder: Path) -> None:
    with pytest.warns(FreshWeights, match=r" and 8 more for 3 classes") as heard:
        models.build(f"hf:{bert_folder}", classes=3, num_hidden_layers=3)  # a layer has 16 tensors
    assert str(heard[0].message).count("bert.encoder.layer.2.") == 8


def test_from_scratch(bert_folder: Path, tmp_path: Path, recwarn) -> None:
    shutil.copy(bert_folder / "config.json", tmp_path)
    name, scratch = f"hf:{tmp_path}", {"pretrained": False}
    torch.manual_seed(1)
    model = models.build(name, classes=5, num_hidden_layers=1, **scratch)
    assert warnings_of(recwarn) == []
    assert logits(model.eval(), torch.tensor([[5, 7]])).shape == (1, 5)
    torch.manual_seed(1)
    again = models.build(name, classes=5, num_hidden_layers=1, **scratch)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    torch.manual_seed(2)
    other = models.build(name, classes=5, num_hidden_layers=1, **scratch)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))
    short, long = torch.tensor([[5, 7]]), torch.tensor([[5, 7, 0, 0]])
    torch.testing.assert_close(logits(model, long), logits(model, short), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"cannot be built with these options: .*'flavour'"):
        models.build(name, classes=5, flavour="mild", **scratch)
    with pytest.raises(UserError, match=r"cannot be built with these options: .*model\.safetensors"):
        models.build(name, classes=5)


@pytest.mark.parametrize("options", [{}, {"pretrained": False}])
def test_weights_of_16_bits_are_read_as_float32(options: dict, bert_folder: Path, tmp_path: Path) -> None:
    transformers.BertForSequenceClassification.from_pretrained(bert_folder).bfloat16().save_pretrained(
        tmp_path
    )
    model = models.build(f"hf:{tmp_path}", classes=3, **options)
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    if not options:
        whole = models.build(f"hf:{bert_folder}", classes=3).state_dict()
        assert all(torch.equal(model.state_dict()[name], whole[name].bfloat16().float()) for name in whole)


@pytest.mark.parametrize("option", ["dtype", "num_labels", "torch_dtype", "trust_remote_code"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_what_is_settled_is_no_option(option: str, pretrained: bool, bert_folder: Path) -> None:
    with pytest.raises(UserError, match=f"has no option `{option}`: Luce sets float32 weights"):
        models.build(f"hf:{bert_folder}", classes=3, pretrained=pretrained, **{option: 1})


def test_the_code_of_a_checkpoint_is_not_run(bert_folder: Path, tmp_path: Path, monkeypatch) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    folder = shutil.copytree(bert_folder, tmp_path / "theirs")
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, classes in (
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForSequenceClassification": "code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
    ):
        described = json.loads((folder / name).read_text())
        unknown = {"model_type": "theirs", "tokenizer_class": "Theirs", "auto_map": classes}
        (folder / name).write_text(json.dumps({**described, **unknown}))
    with pytest.raises(UserError, match="contains custom code"):
        models.build(f"hf:{folder}", classes=3)
    with pytest.raises(UserError, match="contains custom code"):
        Tokenizer(folder)
    assert (asked, (tmp_path / "ran").exists()) == ([], False)


@pytest.mark.parametrize(
    "options", [{"num_hidden_layers": "two"}, {"hidden_dropout_prob": "some"}, {"weights_only": False}]
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_an_option_that_is_none_or_of_the_wrong_type(
    options: dict, pretrained: bool, bert_folder: Path
) -> None:
    with pytest.raises(UserError, match="cannot be built with these options: "):
        models.build(f"hf:{bert_folder}", classes=3, pretrained=pretrained, **options)


class Attack:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("it was unpickled",)


def test_a_damaged_checkpoint_and_one_that_would_run_code(bert_folder: Path, tmp_path: Path) -> None:
    shutil.copy(bert_folder / "config.json", tmp_path)
    weights = models.build(f"hf:{bert_folder}", classes=3).state_dict()
    torch.save({**weights, "attack": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be built with these options: ") as refused:
        models.build(f"hf:{tmp_path}", classes=3)
    assert "\n" not in str(refused.value)
    (tmp_path / "model.safetensors").write_bytes((bert_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be built with these options: "):
        models.build(f"hf:{tmp_path}", classes=3)


def test_names_of_weights_and_modules_are_the_networks_own(bert_folder: Path) -> None:
    model = models.build(f"hf:{bert_folder}", classes=3)
    plain = transformers.BertForSequenceClassification.from_pretrained(bert_folder)
    assert type(model) is type(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    paths = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.-1", "bert.pooler"]
    with Features(Classifier(model), paths) as features, features.capture() as seen:
        model(torch.tensor([[2, 5, 7, 3, 0]]))
    assert [tuple(seen[path].shape) for path in paths] == [(1, 5, 32), (1, 5, 32), (1, 5, 32), (1, 32)]


def test_transformers_may_speak_again(bert_folder: Path) -> None:
    logging = transformers.logging
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    models.build(f"hf:{bert_folder}", classes=3)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)
