"""Classifiers and transformers' …ForSequenceClassification: opened, written, and the same step of training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import BLOCK_SIZE, FAMILIES, random_tokens, saved_model, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification

from litfreeze.checkpoint.classifier import as_classifier
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.merge import fold, write_merged
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.trained import write_trained
from litfreeze.checkpoint.write import write_hf
from litfreeze.config import Config
from litfreeze.data.batches import build_batch
from litfreeze.data.classes import as_sample
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.freeze.words import plan_from_words
from litfreeze.generate.classes import likeliest, probabilities
from litfreeze.lora import LoRA, fresh_tensors, linear_layers
from litfreeze.scripts.convert import from_hf
from litfreeze.train.loss import NextToken

LABELS = ("no", "perhaps", "yes")
PAD = 2
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def texts_of(vocab_size: int, seed: int) -> list[list[int]]:
    """Texts of several lengths without the pad, one of a single token."""
    tokens = random_tokens(vocab_size - PAD - 1, 4, BLOCK_SIZE // 2, seed) + PAD + 1
    return [row[:length].tolist() for row, length in zip(tokens, (9, 1, 30, 4), strict=True)]


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(text) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def write_tokenizer(tokenizer_dir: Path, path: Path) -> None:
    for file in tokenizer_dir.iterdir():
        shutil.copyfile(file, path / file.name)


def both(fields, seed: int, tokenizer_dir: Path, out: Path):
    """A random model of `fields` as our classifier, and as transformers reads what we write of it."""
    with saved_model({**fields, "pad_token_id": PAD}, seed) as (path, _):
        write_tokenizer(tokenizer_dir, path)
        classifier = as_classifier(open_checkpoint(path), LABELS, seed)
        write_hf(out, classifier)
        ours = load_model(classifier, lambda _: torch.float32)
    return ours, AutoModelForSequenceClassification.from_pretrained(out).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read_it_is_transformers_own(tmp_path_factory, tokenizer_dir, family):
    @settings(max_examples=3)
    @given(FAMILIES[family], st.integers(0, 2**16))
    def check(fields, seed):
        out = tmp_path_factory.mktemp("hf")
        ours, theirs = both(fields, seed, tokenizer_dir, out / "ours")
        assert theirs.config.id2label == dict(enumerate(LABELS))
        texts = texts_of(fields["vocab_size"], seed)
        with torch.no_grad():
            logits = theirs(**padded(texts)).logits
            for text, expected in zip(texts, logits, strict=True):
                torch.testing.assert_close(ours(torch.tensor([text]))[0, -1], expected, **CLOSE)
            torch.testing.assert_close(probabilities(ours, texts), logits.softmax(-1), **CLOSE)

        # As transformers writes it, it is read again, and converted
        theirs.save_pretrained(out / "theirs")
        write_tokenizer(tokenizer_dir, out / "theirs")
        from_hf(out / "theirs", out / "back")
        for place in ("theirs", "back"):
            again = open_checkpoint(out / place)
            assert again.config.labels == LABELS and not again.config.tie_embeddings
            model = load_model(again, lambda _: torch.float32)
            for name, weight in ours.named_parameters():
                assert torch.equal(weight, dict(model.named_parameters())[name])

    check()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox, parallel"])
def test_a_step_of_training_is_transformers_own(tmp_path_factory, tokenizer_dir, family):
    """Loss and gradients of a padded batch there, and of a packed or a padded one here."""

    @settings(max_examples=4)
    @given(FAMILIES[family], st.integers(0, 2**16))
    def check(fields, seed):
        out = tmp_path_factory.mktemp("hf")
        ours, theirs = both(fields, seed, tokenizer_dir, out / "ours")
        ours.requires_grad_()
        texts, classes = texts_of(fields["vocab_size"], seed), [2, 0, 1, 2]
        found = theirs(**padded(texts), labels=torch.tensor(classes))
        found.loss.backward()
        samples = [as_sample(text, label, "") for text, label in zip(texts, classes, strict=True)]
        hf_head = theirs.score.weight.grad
        hf_block = sum(p.grad.square().sum() for n, p in theirs.named_parameters() if "0." in n)
        for packed in (True, False):
            ours.zero_grad()
            scored = NextToken(ours).eval()(build_batch(samples, [0, 1, 2, 3], packed))
            (scored.loss / 4).backward()
            torch.testing.assert_close(scored.loss / 4, found.loss, **CLOSE)
            torch.testing.assert_close(ours.head.weight.grad, hf_head, rtol=1e-4, atol=1e-5)
            block = sum(p.grad.square().sum() for n, p in ours.named_parameters() if n.startswith("blocks.0."))
            torch.testing.assert_close(block, hf_block, rtol=1e-3, atol=1e-5)
            right = [(c, int(row.argmax())) for c, row in zip(classes, found.logits, strict=True)]
            assert scored.confusion.tolist() == [[right.count((i, j)) for j in range(3)] for i in range(3)]
            assert scored.right == sum(a == b for a, b in right) and scored.records == 4

    check()


def test_two_classes_without_names_are_as_in_transformers(tmp_path):
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "hf")
    assert "id2label" not in json.loads((tmp_path / "hf/config.json").read_text())
    assert open_checkpoint(tmp_path / "hf").config.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"id2label": {"0": "a"}}, "must name two or more classes"),
        ({"id2label": {"0": "a", "2": "b"}}, "without a gap"),
        ({"id2label": {"0": "a", "1": "a"}}, "a text of its own"),
        ({"id2label": {"0": "a", "1": 1}}, "a text of its own"),
        ({"id2label": ["a", "b"]}, "must name two or more classes"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels is not the number of classes"),
        ({"problem_type": "regression"}, "problem_type 'regression' is not supported"),
        ({"problem_type": "multi_label_classification"}, "is not supported; single_label_classification is"),
        ({"architectures": ["LlamaForTokenClassification"]}, "neither a causal language model nor its classifier"),
    ],
)
def test_a_classifier_that_is_none_of_ours_is_refused(fields, told):
    demo = json.loads((MODEL_DIR / "config.json").read_text())
    with pytest.raises(UsageError, match=r"config\.json: ") as error:
        Config.from_hf({**demo, "architectures": ["LlamaForSequenceClassification"], **fields})
    assert told in str(error.value)


def test_the_rest_of_the_model_stays_what_it_was():
    base = open_checkpoint(MODEL_DIR)
    one, same, other = (as_classifier(base, LABELS, seed) for seed in (1, 1, 2))
    assert base.config.tie_embeddings and not one.config.tie_embeddings and one.config.n_outputs == 3
    assert one.weights_hash == same.weights_hash != other.weights_hash and one.weights_hash != base.weights_hash
    assert one.base is base and one.replaced == ["head.weight"]
    head = one.read("head.weight")
    assert head.shape == (3, 128) and 0.01 < head.float().std() < 0.03 and head.dtype == torch.bfloat16
    assert set(one.layout()) == {*base.layout(), "head.weight"}
    assert all(torch.equal(one.read(name), base.read(name)) for name in base.layout())
    assert one.hf_config["pad_token_id"] == 0 and base.hf_config.get("pad_token_id") is None
    model = load_model(one, lambda _: torch.float32)
    assert likeliest(torch.tensor([0.2, 0.3, 0.5]), LABELS, 2)[0] == ("yes", 0.5)
    assert probabilities(model, [[5], [6] * 400, [7]] * 20).sum(1) == pytest.approx(1)
    assert probabilities(model, []).shape == (0, 3)


def train_by_hand(checkpoint, out_dir: Path, whole: bool, layers: str = "11", **save):
    plan = plan_from_words(checkpoint.config, layers)
    model = load_model(checkpoint, lambda _: torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in plan.trained:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    proof = write_trained(
        out_dir, checkpoint, dict(model.named_parameters()), plan, {"kind": "full", "prompt": None}, whole, **save
    )
    assert not proof.frozen_that_changed and not proof.trained_that_did_not
    return proof


def test_over_a_language_model_it_is_the_whole_in_less_room(tmp_path):
    base = Path(shutil.copytree(MODEL_DIR, tmp_path / "base"))
    begun = as_classifier(open_checkpoint(base), LABELS, 1)
    proof = train_by_hand(begun, tmp_path / "whole", True)
    train_by_hand(begun, tmp_path / "delta", False)
    whole, delta = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "delta")
    assert "head.weight" in delta.tensors and proof.trained == 1 + len([n for n in whole.layout() if ".11." in n])
    assert delta.weights_hash == whole.weights_hash and delta.layout() == whole.layout()
    assert delta.config == whole.config and delta.config.labels == LABELS and not delta.base.config.labels
    write_merged(tmp_path / "again", fold([delta]))
    assert open_checkpoint(tmp_path / "again").weights_hash == whole.weights_hash
    # What goes on stands on the same base
    train_by_hand(delta, tmp_path / "second", False, "3")
    second = open_checkpoint(tmp_path / "second")
    assert second.base.path.resolve() == base.resolve()
    assert {name.split(".")[1] for name in second.tensors} == {"weight", "3", "11"}
    assert torch.equal(second.read("blocks.11.mlp.up_proj.weight"), delta.read("blocks.11.mlp.up_proj.weight"))


def test_over_a_base_without_its_head_it_is_damaged(tmp_path):
    base = Path(shutil.copytree(MODEL_DIR, tmp_path / "base"))
    train_by_hand(as_classifier(open_checkpoint(base), LABELS, 1), tmp_path / "delta", False)
    labels = json.loads((tmp_path / "delta/config.json").read_text())
    write_json(tmp_path / "delta/config.json", {**labels, "id2label": {"0": "x", "1": "y"}, "label2id": {}})
    with pytest.raises(UsageError, match=r"head.weight has shape \[3, 128\]; config.json asks for \[2, 128\]"):
        open_checkpoint(tmp_path / "delta")


def test_classifiers_are_merged_only_with_their_like(tmp_path):
    base = open_checkpoint(MODEL_DIR)
    first, second, strange = (
        as_classifier(base, labels, seed) for labels, seed in ((LABELS, 1), (LABELS, 2), (("a", "b"), 1))
    )
    heads = [one.read("head.weight").float() for one in (first, second)]
    mean = fold([first, second], [0.5, 0.5], dtype=torch.float32)
    torch.testing.assert_close(mean.read("head.weight"), (heads[0] + heads[1]) / 2)
    for other in (strange, base):
        with pytest.raises(UsageError, match="cannot be merged"):
            fold([first, replace(other, base=first.base) if other is base else other], [0.5, 0.5])


def test_an_adapter_stays_unless_it_is_on_the_head():
    base = open_checkpoint(MODEL_DIR)
    for module in ("blocks.0.attn.q_proj", "head"):
        lora = LoRA({module: 2}, {module: 4.0})
        adapter = base.with_lora(lora, fresh_tensors(lora, linear_layers(base.config), base.read, 1))
        if module == "head":
            with pytest.raises(UsageError, match="adapts the head, which a classifier does not keep"):
                as_classifier(adapter, LABELS, 1)
        else:
            classifier = as_classifier(adapter, LABELS, 1)
            assert classifier.lora == lora and set(classifier.tensors) == {*adapter.tensors, "head.weight"}
            assert classifier.base is base
