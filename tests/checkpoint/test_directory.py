"""A checkpoint directory: opened, checked, loaded, and written whole or not at all."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from families import write_json
from transformers import AutoModelForCausalLM

from litfreeze.checkpoint.checkpoint import weights_hash
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.tensors import same_bits, sha256
from litfreeze.checkpoint.write import write_checkpoint
from litfreeze.errors import UsageError
from litfreeze.scripts.convert import to_hf
from litfreeze.scripts.init import setup as init

FIELDS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def checkpoint_dir(tmp_path, tokenizer_dir, capsys):
    """A litfreeze checkpoint of random weights."""
    write_json(tmp_path / "config.json", FIELDS)
    return init(tokenizer_dir, tmp_path / "checkpoint", config_file=tmp_path / "config.json")


def rewrite(checkpoint_dir, change):
    file = checkpoint_dir / "litfreeze.safetensors"
    weights = safetensors.torch.load_file(file)
    change(weights)
    safetensors.torch.save_file(weights, file)


def edit_json(path, **changes):
    write_json(path, json.loads(path.read_text("utf-8")) | changes)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_directory_says_what_it_is(checkpoint_dir):
    checkpoint = open_checkpoint(str(checkpoint_dir))
    assert checkpoint.manifest["kind"] == "init"
    assert checkpoint.config.n_layer == 2
    assert checkpoint.prompt is None
    assert checkpoint.tokenizer().encode("naïve café") == [3, 4]
    weights = safetensors.torch.load_file(checkpoint_dir / "litfreeze.safetensors")
    assert checkpoint.manifest["tensors"] == {name: sha256(weight, weight.dtype) for name, weight in weights.items()}
    assert checkpoint.layout() == {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}


UP = "blocks.1.mlp.up_proj.weight"

REFUSALS = {
    "no directory": (shutil.rmtree, ["is no directory", "ORG/NAME"]),
    "a file": (lambda path: (shutil.rmtree(path), path.touch()), ["is no directory"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["has no config.json"]),
    "broken config": (lambda path: (path / "config.json").write_text("{", "utf-8"), ["config.json", "as JSON"]),
    "broken manifest": (lambda path: (path / "litfreeze.json").write_text("[]", "utf-8"), ["litfreeze.json", "object"]),
    "no hash on record": (
        lambda path: edit_json(path / "litfreeze.json", weights_hash=None),
        ["litfreeze.json has no hashes"],
    ),
    "format of the future": (
        lambda path: edit_json(path / "litfreeze.json", format=2),
        ["litfreeze.json has format 2; this litfreeze reads 1"],
    ),
    "no weights": (lambda path: (path / "litfreeze.safetensors").unlink(), ["no weights: looked for litfreeze."]),
    "truncated weights": (
        lambda path: (path / "litfreeze.safetensors").write_bytes((path / "litfreeze.safetensors").read_bytes()[:-9]),
        ["litfreeze.safetensors is truncated"],
    ),
    "missing tensor": (lambda path: rewrite(path, lambda w: w.pop(UP)), [f"{UP} is missing"]),
    "extra tensor": (
        lambda path: rewrite(path, lambda w: w.update(extra=torch.ones(1))),
        ["litfreeze.safetensors: tensor extra has no place"],
    ),
    "misshapen tensor": (
        lambda path: rewrite(path, lambda w: w.update({UP: torch.ones(3)})),
        ["litfreeze.safetensors", f"{UP} has shape [3]; config.json asks for [24, 16]"],
    ),
    "another config": (
        lambda path: edit_json(path / "config.json", num_hidden_layers=3),
        ["blocks.2.norm_1.weight is missing"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_with_a_directory_is_named(case, checkpoint_dir):
    damage, told = REFUSALS[case]
    damage(checkpoint_dir)
    with pytest.raises(UsageError) as refusal:
        open_checkpoint(checkpoint_dir)
    message = str(refusal.value)
    assert str(checkpoint_dir) in message
    assert [words for words in told if words not in message] == []
    assert "\n" not in message


def test_the_folder_of_a_run_points_to_the_checkpoint_in_it(checkpoint_dir, tmp_path):
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError) as refusal:
        open_checkpoint(tmp_path)
    assert f"Did you mean {checkpoint_dir}?" in str(refusal.value)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_every_weight_gets_the_dtype_it_is_given(checkpoint_dir):
    checkpoint = open_checkpoint(checkpoint_dir)
    model = load_model(checkpoint, lambda name: torch.bfloat16 if name.startswith("blocks.0.") else torch.float32)
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.bfloat16 if name.startswith("blocks.0.") else torch.float32)
        assert same_bits(weight, checkpoint.read(name), weight.dtype)
    assert not model.training


def test_untying_gives_the_head_a_copy_of_the_embedding(checkpoint_dir):
    edit_json(checkpoint_dir / "config.json", tie_word_embeddings=True)
    rewrite(checkpoint_dir, lambda weights: weights.pop("head.weight"))
    tied = open_checkpoint(checkpoint_dir)
    assert load_model(tied, tied.dtype).head.weight is not None
    untied = tied.untied()
    assert set(untied.layout()) - set(tied.layout()) == {"head.weight"}
    assert untied.hf_config["tie_word_embeddings"] is False
    model = load_model(untied, untied.dtype)
    assert torch.equal(model.head.weight, model.embed.weight)
    with torch.no_grad():
        model.head.weight.zero_()
    assert model.embed.weight.abs().sum() > 0
    with pytest.raises(UsageError, match="there is nothing to untie"):
        untied.untied()


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(interruption, checkpoint_dir, tmp_path):
    base = open_checkpoint(checkpoint_dir)

    def read(name):
        if name == UP:
            raise interruption
        return base.read(name)

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(interruption):
        write_checkpoint(tmp_path / "out", base.hf_config, base.layout(), read, {}, base.path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_copy_is_the_same_checkpoint_and_texts_survive(checkpoint_dir, tmp_path):
    base = open_checkpoint(checkpoint_dir)
    fields = {**base.hf_config, "_name_or_path": "naïve 你好"}
    manifest = {"kind": "full", "prompt": {"style": "chat_template", "arguments": {"system": "naïve"}}}
    written = write_checkpoint(tmp_path / "out", fields, base.layout(), base.read, manifest, base.path)
    copy = open_checkpoint(tmp_path / "out")
    assert copy.manifest == written
    assert copy.hf_config == fields
    assert copy.prompt == manifest["prompt"]
    assert copy.weights_hash == base.weights_hash
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (checkpoint_dir / "tokenizer.json").read_bytes()


def test_the_hash_of_all_weights_sees_names_dtypes_shapes_and_contents_and_not_their_order():
    layout = {"a": (torch.float32, (2, 3)), "b": (torch.float32, (6,))}
    hashes = {"a": "1", "b": "2"}
    whole = weights_hash(layout, hashes)
    assert weights_hash(dict(reversed(layout.items())), hashes) == whole
    others = [
        weights_hash(layout, {"a": "2", "b": "1"}),
        weights_hash({**layout, "a": (torch.int32, (2, 3))}, hashes),
        weights_hash({**layout, "a": (torch.float32, (3, 2))}, hashes),
        weights_hash({"c": layout["a"], "b": layout["b"]}, {"c": "1", "b": "2"}),
        weights_hash({"a": layout["a"]}, hashes),
    ]
    assert len({whole, *others}) == 6


# --- litfreeze init --------------------------------------------------------------------------------------------------


def test_random_weights_are_what_transformers_loads_from_the_export(checkpoint_dir, tmp_path):
    checkpoint = open_checkpoint(checkpoint_dir)
    model = load_model(checkpoint, checkpoint.dtype)
    theirs = AutoModelForCausalLM.from_pretrained(to_hf(checkpoint_dir, tmp_path / "theirs"))
    assert theirs.dtype == torch.float32, "the config told another dtype than the weights have"
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-5


def test_a_preset_takes_the_size_of_the_tokenizer(tokenizer_dir, tmp_path):
    checkpoint = open_checkpoint(init(tokenizer_dir, tmp_path / "out", preset="demo", seed=3))
    assert checkpoint.config.n_layer == 12
    assert checkpoint.config.vocab_size == checkpoint.tokenizer().vocab_size == 5
    assert (checkpoint.hf_config["bos_token_id"], checkpoint.hf_config["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"preset": "demo", "config_file": "config.json"}, "keep one of them"),
        ({"preset": "demos"}, "Did you mean 'demo'"),
        ({"config_file": "gone.json"}, "gone.json does not exist"),
        ({"config_file": "small.json"}, "5 tokens do not fit a vocab_size of 4"),
        ({"config_file": "config.json", "tokenizer_dir": "."}, "No tokenizer in"),
    ],
)
def test_what_init_cannot_do_is_told_before_anything_is_written(arguments, told, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "config.json", FIELDS)
    write_json(tmp_path / "small.json", FIELDS | {"vocab_size": 4})
    with pytest.raises(UsageError, match=told):
        init(**({"tokenizer_dir": tokenizer_dir, "out_dir": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()
