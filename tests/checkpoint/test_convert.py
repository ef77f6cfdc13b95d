"""Hugging Face directories in and out: what goes in comes out to the bit, and what is wrong with one is named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import FAMILIES, random_tokens, saved_model, write_json
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.tensors import same_bits
from litfreeze.errors import UsageError
from litfreeze.scripts.convert import from_hf, to_hf
from litfreeze.tokenizer import TOKENIZER_FILES

MEMORY_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoint_memory.py"

# How weights are stored: pattern of the file names, size of a shard
FORMS = {
    "safetensors": ("model{suffix}.safetensors", "1GB"),
    "sharded safetensors": ("model{suffix}.safetensors", "4KB"),
    "bin": ("pytorch_model{suffix}.bin", "1GB"),
    "sharded bin": ("pytorch_model{suffix}.bin", "4KB"),
}
DTYPES = {
    "float32": lambda name: torch.float32,
    "bfloat16": lambda name: torch.bfloat16,
    "float16": lambda name: torch.float16,
    "bfloat16, norms float32": lambda name: torch.float32 if "norm" in name or "ln_" in name else torch.bfloat16,
}


def read_weights(folder):
    """Every tensor in the safetensors and .bin files of a folder, by the libraries that made these formats."""
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= safetensors.torch.load_file(file)
    for file in folder.glob("*.bin"):
        weights |= torch.load(file, weights_only=True)
    return weights


def store(weights, folder, form="safetensors"):
    """Puts `weights` in place of those in `folder`."""
    for file in (*folder.glob("*.safetensors*"), *folder.glob("*.bin*")):
        file.unlink()
    pattern, shard = FORMS[form]
    save_torch_state_dict(
        weights, folder, filename_pattern=pattern, max_shard_size=shard, safe_serialization="safetensors" in pattern
    )


def assert_same_weights(found, expected):
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    assert [name for name in expected if not same_bits(found[name], expected[name], expected[name].dtype)] == []


def add_tokenizer(folder, tokenizer_dir):
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)


def there_and_back(source):
    """The directories that `source` becomes: ours, and Hugging Face's again."""
    ours, theirs = source.parent / f"{source.name}-ours", source.parent / f"{source.name}-theirs"
    return from_hf(source, ours), to_hf(ours, theirs)


@torch.no_grad()
def transformers_logits(folder, tokens):
    return AutoModelForCausalLM.from_pretrained(folder)(tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data(), form=st.sampled_from(list(FORMS)), dtype=st.sampled_from(list(DTYPES)))
@torch.no_grad()
def test_there_and_back_is_the_same_to_the_bit(family, data, form, dtype, tokenizer_dir):
    fields = data.draw(FAMILIES[family])
    fields["torch_dtype"] = dtype.split(",")[0]
    tokens = random_tokens(fields["vocab_size"], batch=1, length=9)
    with saved_model(fields) as (path, _):
        source = path / "source"
        source.mkdir()
        add_tokenizer(source, tokenizer_dir)
        shutil.copyfile(path / "config.json", source / "config.json")
        store({n: t.to(DTYPES[dtype](n)) for n, t in read_weights(path).items()}, source, form)
        ours, theirs = there_and_back(source)

        assert_same_weights(read_weights(theirs), read_weights(source))
        assert json.loads((theirs / "config.json").read_text("utf-8")) == fields
        for name in TOKENIZER_FILES:
            for folder in (ours, theirs):
                assert (folder / name).exists() == (tokenizer_dir / name).exists()
                if (folder / name).exists():
                    assert (folder / name).read_bytes() == (tokenizer_dir / name).read_bytes()
        assert torch.equal(transformers_logits(theirs, tokens), transformers_logits(source, tokens))

        opened, direct = open_checkpoint(ours), open_checkpoint(source)
        assert opened.layout() == direct.layout() and opened.weights_hash == direct.weights_hash
        assert all(same_bits(opened.read(name), direct.read(name), direct.dtype(name)) for name in opened.layout())


# --- the same weights as others spell them ---------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
NEOX = {**LLAMA, "model_type": "gpt_neox"}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
UNTIED = {"tie_word_embeddings": False}
TRIANGLE = torch.ones(1, 1, 32, 32).tril().to(torch.uint8)


@pytest.fixture
def make_source(tmp_path, tokenizer_dir):
    """make_source(fields): a Hugging Face directory of a random model, tokenizer included."""

    def make(fields):
        path = tmp_path / "source"
        with saved_model(fields) as (saved, _):
            shutil.copytree(saved, path)
        (path / "generation_config.json").unlink()
        add_tokenizer(path, tokenizer_dir)
        return path

    return make


def without_prefix(weights):
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}


def with_old_buffers(weights):
    """Masks and tables that releases of transformers before 4.30 wrote."""
    first = next(name for name in weights if ".0." in name)
    block = first[: first.index(".0.") + 3]
    attention = {"model.layers.0.": "self_attn", "gpt_neox.layers.0.": "attention", "transformer.h.0.": "attn"}[block]
    if attention == "self_attn":
        return weights | {f"{block}{attention}.rotary_emb.inv_freq": torch.ones(4)}
    return weights | {f"{block}{attention}.bias": TRIANGLE, f"{block}{attention}.masked_bias": torch.tensor(-1e9)}


def with_tied_head(weights, name, embedding):
    return weights | {name: weights[embedding].clone()}


def renamed(weights, old, new):
    return {(new if name == old else name): tensor for name, tensor in weights.items()}


SPELLINGS = {
    "gpt2, names without the model's": (GPT2, without_prefix),
    "gpt2, buffers": (GPT2, with_old_buffers),
    "gpt2, old names and buffers": (GPT2, lambda w: without_prefix(with_old_buffers(w))),
    "gpt2, the tied head stored too": (GPT2, lambda w: with_tied_head(w, "lm_head.weight", "transformer.wte.weight")),
    "llama, buffers": (LLAMA, with_old_buffers),
    "llama, the tied head stored too": (
        LLAMA,
        lambda w: with_tied_head(w, "lm_head.weight", "model.embed_tokens.weight"),
    ),
    "neox, buffers": (NEOX, with_old_buffers),
    "neox, the tied head stored too": (
        NEOX,
        lambda w: with_tied_head(w, "embed_out.weight", "gpt_neox.embed_in.weight"),
    ),
    "neox, the head named lm_head": (NEOX | UNTIED, lambda w: renamed(w, "embed_out.weight", "lm_head.weight")),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_other_spellings_of_the_same_weights_give_the_same_checkpoint(spelling, form, make_source):
    fields, respell = SPELLINGS[spelling]
    source = make_source(fields)
    weights = read_weights(source)
    respelled = {name: tensor.contiguous() for name, tensor in respell(weights).items()}
    assert respelled.keys() != weights.keys()
    if form == "safetensors":
        shutil.rmtree(source / "model.safetensors", ignore_errors=True)
        safetensors.torch.save_file(respelled, source / "model.safetensors")
    else:
        (source / "model.safetensors").unlink()
        torch.save(respelled, source / "pytorch_model.bin")
    _, theirs = there_and_back(source)
    assert_same_weights(read_weights(theirs), weights)


def test_an_untied_head_is_saved_and_config_says_so(make_source, tmp_path):
    """What training an untied copy of a tied head exports: transformers loads two matrices."""
    from litfreeze.checkpoint.write import write_checkpoint

    base = open_checkpoint(make_source(LLAMA)).untied()
    head = base.read("head.weight") + 1

    def read(name):
        return head if name == "head.weight" else base.read(name)

    write_checkpoint(tmp_path / "ours", base.hf_config, base.layout(), read, {"kind": "full"}, base.path)
    theirs = to_hf(tmp_path / "ours", tmp_path / "theirs")
    assert json.loads((theirs / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(theirs)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, base.read("embed.weight"))


# --- refusals: named, in one line, before anything is written --------------------------------------------------------


def change_weights(change):
    def apply(path):
        weights = read_weights(path)
        change(weights)
        store(weights, path)

    return apply


def change_config(**changes):
    def apply(path):
        fields = json.loads((path / "config.json").read_text("utf-8"))
        write_json(path / "config.json", fields | changes)

    return apply


def truncate(form):
    def apply(path):
        store(read_weights(path), path, form)
        file = max((*path.glob("model*.safetensors"), *path.glob("*.bin")), key=lambda file: file.name)
        file.write_bytes(file.read_bytes()[:-100])

    return apply


def index(file_name):
    def apply(path):
        names = list(read_weights(path))
        shutil.move(path / "model.safetensors", path.parent / "outside.safetensors")
        write_json(path / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, file_name)})

    return apply


class MakesAFile:
    def __reduce__(self):
        return os.mkdir, ("out",)


def hostile_pickle(path):
    weights = read_weights(path)
    (path / "model.safetensors").unlink()
    torch.save(weights | {"model.norm.weight": MakesAFile()}, path / "pytorch_model.bin")


UP = "model.layers.1.mlp.up_proj.weight"

REFUSALS = {
    "missing tensor": (change_weights(lambda w: w.pop(UP)), ["source", f"{UP} is missing"]),
    "extra tensor": (
        change_weights(lambda w: w.update({"model.layers.0.mlp.up_proj.bias": torch.ones(24)})),
        ["model.safetensors", "model.layers.0.mlp.up_proj.bias has no place in a llama model"],
    ),
    "a block too many": (
        change_weights(lambda w: w.update({UP.replace(".1.", ".2."): torch.ones(24, 16)})),
        ["model.safetensors", "model.layers.2.mlp.up_proj.weight has no place"],
    ),
    "misshapen tensor": (
        change_weights(lambda w: w.update({UP: torch.ones(16, 24)})),
        ["model.safetensors", f"{UP} has shape [16, 24]; config.json asks for [24, 16]"],
    ),
    "a tied head of its own": (
        change_weights(lambda w: w.update({"lm_head.weight": torch.ones(61, 16)})),
        ["model.safetensors", "lm_head.weight differs from it", '"tie_word_embeddings": false'],
    ),
    "quantised weights": (
        change_weights(lambda w: w.update({UP: torch.ones(24, 16, dtype=torch.int8)})),
        ["model.safetensors", f"{UP} is stored as torch.int8"],
    ),
    "truncated safetensors": (truncate("safetensors"), ["model.safetensors", "truncated"]),
    "truncated shard": (truncate("sharded safetensors"), ["model-0000", "truncated"]),
    "truncated bin": (truncate("bin"), ["pytorch_model.bin", "truncated"]),
    "truncated bin shard": (truncate("sharded bin"), ["pytorch_model-0000", "truncated"]),
    "hostile pickle": (hostile_pickle, ["pytorch_model.bin", "more than plain tensors"]),
    "index outside": (index("../outside.safetensors"), ["model.safetensors.index.json", "outside its directory"]),
    "index of a missing file": (index("gone.safetensors"), ["gone.safetensors", "does not exist"]),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ["source", "has no weights"]),
    "no config": (lambda path: (path / "config.json").unlink(), ["source", "no config.json"]),
    "broken config": (lambda path: (path / "config.json").write_text("{", "utf-8"), ["config.json", "as JSON"]),
    "unknown architecture": (change_config(model_type="mamba"), ["config.json", "model_type 'mamba'"]),
    "unknown activation": (change_config(hidden_act="snake"), ["config.json", "hidden_act 'snake'"]),
    "unknown positions": (change_config(rope_scaling={"type": "ntk"}), ["config.json", "rope_type 'ntk'"]),
    "unknown field": (change_config(residual_scale=2), ["config.json", "residual_scale=2"]),
    "quantisation": (change_config(quantization_config={"bits": 4}), ["config.json", "quantization_config"]),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), ["source", "No tokenizer"]),
    "broken tokenizer": (lambda path: (path / "tokenizer.json").write_text("{", "utf-8"), ["tokenizer.json"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_named_and_nothing_is_written(case, make_source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the hostile pickle would leave its mark
    damage, told = REFUSALS[case]
    source = make_source(LLAMA)
    damage(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as refusal:
        from_hf(source, tmp_path / "out")
    message = str(refusal.value)
    assert str(source) in message
    assert [words for words in told if words not in message] == []
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [from_hf, to_hf])
def test_a_result_is_never_written_over_something(command, make_source, tmp_path):
    source = make_source(LLAMA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(UsageError, match="out is not empty"):
        command(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_litfreeze_checkpoint_is_not_converted_again(make_source, tmp_path):
    ours, _ = there_and_back(make_source(LLAMA))
    with pytest.raises(UsageError, match="already is a litfreeze checkpoint"):
        from_hf(ours, tmp_path / "out")


def test_an_export_without_its_tokenizer_is_refused(make_source, tmp_path):
    ours, _ = there_and_back(make_source(LLAMA))
    (ours / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="No tokenizer in"):
        to_hf(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- a real model, and a large one -----------------------------------------------------------------------------------


def test_smollm2_there_and_back(smollm2, tmp_path):
    ours, theirs = from_hf(smollm2, tmp_path / "ours"), to_hf(tmp_path / "ours", tmp_path / "theirs")
    assert_same_weights(read_weights(theirs), read_weights(smollm2))
    for name in {*TOKENIZER_FILES} & {file.name for file in smollm2.iterdir()}:
        assert (theirs / name).read_bytes() == (smollm2 / name).read_bytes()
    assert json.loads((theirs / "config.json").read_text("utf-8")) == json.loads(
        (smollm2 / "config.json").read_text("utf-8")
    )
    tokens = random_tokens(49152, batch=1, length=8)
    assert torch.equal(transformers_logits(theirs, tokens), transformers_logits(smollm2, tokens))
    with torch.no_grad():
        logits = [load_model(open_checkpoint(path), lambda _: torch.float32)(tokens) for path in (ours, smollm2)]
    assert torch.equal(*logits)


def test_memory_does_not_grow_with_the_model():
    """0.2 GB in tensors of at most 34 MB; the benchmark itself fails where the peak is too high."""
    command = [sys.executable, MEMORY_BENCHMARK, "--gigabytes", "0.2", "--width", "512", "--allowance", "150"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
