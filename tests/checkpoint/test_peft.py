"""PEFT's adapters in and out, against the real package: the same logits, the same bits, and what cannot be is named."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from families import FAMILIES, random_tokens, saved_model, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from litfreeze.checkpoint.convert.peft_config import settings_for
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_peft
from litfreeze.errors import UsageError
from litfreeze.lora import LoRA, is_lora, linear_layers, model_parameters
from litfreeze.scripts.convert import from_hf, from_peft, to_peft

# PEFT warns of tied heads, of Conv1D and of its own defaults; what comes out is what these tests look at
pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TIED = LLAMA | {"tie_word_embeddings": True}
NEOX = LLAMA | {"model_type": "gpt_neox", "num_attention_heads": 2, "num_key_value_heads": None}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


# --- PEFT's side -----------------------------------------------------------------------------------------------------


def linear_names(model):
    """The last words of the names of every linear layer that PEFT could adapt."""
    linear = (torch.nn.Linear, Conv1D)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    # Beside experts PEFT takes the names of an MLP for theirs
    mlp = {"gate_proj", "up_proj", "down_proj"} if hasattr(model.config, "num_experts_per_tok") else set()
    return sorted(names - mlp)


@torch.no_grad()
def trained_by_peft(base, folder, seed=0, **fields):
    """Saves a PEFT adapter over the Hugging Face directory `base` as if it had trained: whatever trains is random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, **fields}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
        elif parameter.requires_grad:
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def peft_logits(base, folder, tokens):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()(tokens).logits


@torch.no_grad()
def our_logits(checkpoint, tokens):
    return load_model(checkpoint, lambda name: torch.float32)(tokens)


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def stored(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def assert_same_tensors(found, expected, base):
    """To the bit, but for what PEFT stores besides: the head's weight, which is the base's, and biases twice over."""
    weights = safetensors.torch.load_file(base / "model.safetensors").values()
    besides = [
        name
        for name, tensor in expected.items()
        if re.search(r"(modules_to_save|original_module)\.bias$", name)
        or (name.endswith("lm_head.base_layer.weight") and any(torch.equal(tensor, weight) for weight in weights))
    ]
    assert set(found) == set(expected) - set(besides)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []


def there_and_back(base, folder, **fields):
    """PEFT's adapter opened here and written for PEFT again does the same in all three places. Returns both ends."""
    tokens = random_tokens(61, batch=2, length=9)
    with torch.no_grad():
        expected = trained_by_peft(base, folder / "theirs", **fields)(tokens).logits
    opened = open_checkpoint(folder / "theirs", base)
    assert_close(our_logits(opened, tokens), expected)
    written = write_peft(folder / "again", opened, str(base))
    assert_close(peft_logits(base, folder / "again", tokens), expected)
    assert_same_tensors(stored(folder / "again"), stored(folder / "theirs"), base)
    return opened, written


@st.composite
def peft_settings(draw, names, n_layer):
    some = st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)
    layers = st.none() | st.lists(st.integers(0, n_layer - 1), min_size=1, unique=True)
    ranks = {key: draw(st.sampled_from([1, 3])) for key in draw(st.lists(st.sampled_from(names), max_size=2))}
    alphas = {rf"{n_layer - 1}\..*{key}": 2.5 for key in draw(st.lists(st.sampled_from(names), max_size=2))}
    return {
        "r": draw(st.sampled_from([1, 2, 4])),
        "lora_alpha": draw(st.sampled_from([1, 3, 16])),
        "target_modules": draw(some),
        "layers_to_transform": draw(layers),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(data=st.data())
def test_an_adapter_of_peft_means_the_same_here_and_comes_back_to_the_bit(family, data, tmp_path_factory):
    with saved_model(data.draw(FAMILIES[family])) as (base, model):
        fields = data.draw(peft_settings(linear_names(model), model.config.num_hidden_layers))
        opened, written = there_and_back(base, tmp_path_factory.mktemp("adapter"), **fields)
    assert opened.replaced == []
    assert (opened.lora.rslora, opened.lora.dora) == (fields["use_rslora"], fields["use_dora"])
    assert (written["bias"], written["modules_to_save"]) == ("none", None)


# What PEFT keeps beside an adapter: the base, LoraConfig's fields, whether the head is still tied, what is replaced
BESIDE = {
    "nothing, a tied head adapted": (TIED, {"target_modules": ["q_proj", "lm_head"]}, True, 0),
    "nothing, a head adapted by DoRA": (LLAMA, {"target_modules": ["lm_head"], "use_dora": True}, False, 0),
    "the head": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False, 1),
    "a tied head": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False, 1),
    "a tied embedding": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False, 1),
    "a tied embedding and its head": (
        TIED,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
        2,
    ),
    "a tied embedding, the head adapted": (
        TIED,
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        False,
        1,
    ),
    "norms and an MLP": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "mlp"]}, False, 7),
    "gpt2, Conv1D and positions": (
        GPT2,
        {"target_modules": ["attn.c_proj"], "modules_to_save": ["c_attn", "wpe", "ln_f"]},
        True,
        2 * 6 + 1 + 2,
    ),
    "gpt2, all biases": (GPT2, {"target_modules": ["c_attn"], "bias": "all"}, True, 2 * 8 + 1),
    "neox, a fused projection": (
        NEOX,
        {"target_modules": ["dense"], "modules_to_save": ["query_key_value", "embed_in", "lm_head"]},
        False,
        2 * 6 + 2,
    ),
    "neox, all biases and a norm": (
        NEOX,
        {"target_modules": ["query_key_value", "lm_head"], "bias": "all", "modules_to_save": ["final_layer_norm"]},
        False,
        2 * 8 + 2,
    ),
    "neox, biases of what is adapted": (
        NEOX,
        {"target_modules": ["query_key_value", "dense"], "bias": "lora_only", "use_dora": True},
        False,
        2 * 4,
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_full_weights_beside_an_adapter_go_both_ways(case, tmp_path):
    fields, peft_fields, tied, replaced = BESIDE[case]
    with saved_model(fields) as (base, _):
        opened, written = there_and_back(base, tmp_path, **peft_fields)
        assert opened.config.tie_embeddings == tied
        assert len(opened.replaced) == replaced
        assert written["bias"] == peft_fields.get("bias", "none")
        assert written["fan_in_fan_out"] == (fields is GPT2)


def test_weights_that_peft_keeps_tied_stay_tied(tmp_path):
    """PEFT stores such a tensor twice; here it is one, and PEFT gets one back."""
    with saved_model(TIED) as (base, _):
        saved = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        model = trained_by_peft(base, tmp_path / "theirs", target_modules=["q_proj"], **saved)
        tokens = random_tokens(61, batch=1, length=9)
        with torch.no_grad():
            expected = model(tokens).logits
        opened = open_checkpoint(tmp_path / "theirs", base)
        assert opened.config.tie_embeddings and opened.replaced == ["embed.weight"]
        assert_close(our_logits(opened, tokens), expected)
        write_peft(tmp_path / "again", opened, str(base))
        assert_close(peft_logits(base, tmp_path / "again", tokens), expected)
        head = stored(tmp_path / "theirs").keys() - stored(tmp_path / "again").keys()
        assert head == {"base_model.model.lm_head.weight"}


@pytest.mark.parametrize("form", ["bin", "older names", "bfloat16"])
def test_other_forms_of_the_same_adapter(form, tmp_path):
    with saved_model(NEOX) as (base, _):
        trained_by_peft(base, tmp_path / "theirs", target_modules=["dense", "query_key_value"], use_dora=True)
        tensors = stored(tmp_path / "theirs")
        expected = our_logits(open_checkpoint(tmp_path / "theirs", base), random_tokens(61, 1, 9))
        if form == "older names":
            tensors = {re.sub("(magnitude_vector)$", r"\1.weight", name): tensor for name, tensor in tensors.items()}
        if form == "bfloat16":
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
        if form == "bin":
            torch.save(tensors, tmp_path / "theirs" / "adapter_model.bin")
        else:
            safetensors.torch.save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
        opened = open_checkpoint(tmp_path / "theirs", base)
        assert {opened.dtype(name) for name in opened.tensors} == {next(iter(tensors.values())).dtype}
        found = our_logits(opened, random_tokens(61, 1, 9))
        if form == "bfloat16":
            assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
        else:
            assert_close(found, expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_parts_of_a_fused_projection_train_apart(form, tmp_path):
    with saved_model(GPT2) as (base, _):
        trained_by_peft(base, tmp_path / "theirs", target_modules=["c_attn"])
        if form == "bin":
            torch.save(stored(tmp_path / "theirs"), tmp_path / "theirs" / "adapter_model.bin")
            (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
        opened = open_checkpoint(tmp_path / "theirs", base)
        before = {name: opened.read(name).clone() for name in opened.tensors}
        attention = load_model(opened, opened.dtype).blocks[0].attn
        with torch.no_grad():
            attention.q_proj.lora_A.zero_()
        assert torch.equal(attention.k_proj.lora_A, before["blocks.0.attn.k_proj.lora_A"])
        assert all(torch.equal(opened.read(name), before[name]) for name in before)


# --- our side --------------------------------------------------------------------------------------------------------


def adapted_here(base, lora, replaced=(), seed=0, untied=False):
    """The checkpoint at `base` with random tensors of `lora`, and random weights in place of `replaced`."""
    checkpoint = open_checkpoint(base)
    checkpoint = checkpoint.untied() if untied else checkpoint
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.empty(parameter.shape).normal_(0, 0.3, generator=generator)
        for name, parameter in model_parameters(checkpoint.config, lora).items()
        if is_lora(name) or name in replaced
    }
    return checkpoint.with_lora(lora, tensors)


@st.composite
def our_lora(draw, names):
    """Any layers, each with a rank and an alpha of its own."""
    ranks = {name: draw(st.sampled_from([1, 2, 5])) for name in names if draw(st.booleans())} or {names[0]: 2}
    alphas = {name: draw(st.sampled_from([0.5, 1.0, 2.0, 16.0])) for name in ranks}
    return LoRA(ranks, alphas, 0.0, draw(st.booleans()), draw(st.booleans()))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(data=st.data())
def test_an_adapter_from_here_means_the_same_to_peft(family, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    with saved_model(data.draw(FAMILIES[family])) as (base, _):
        config = open_checkpoint(base).config
        layers = [name for name in linear_layers(config) if not (config.n_expert and ".mlp." in name)]
        lora = data.draw(our_lora(layers))
        checkpoint = adapted_here(base, lora)
        tokens = random_tokens(61, batch=2, length=9)
        expected = our_logits(checkpoint, tokens)
        write_peft(folder / "theirs", checkpoint, str(base))
        assert_close(peft_logits(base, folder / "theirs", tokens), expected)
        assert_close(our_logits(open_checkpoint(folder / "theirs"), tokens), expected)


def lora_on(*names, **fields):
    return LoRA(dict.fromkeys(names, 2), dict.fromkeys(names, 4.0), **fields)


# Full weights beside our own adapters: the base, our adapter, what is replaced, whether the head was untied
MIXED = {
    "under an adapter": (LLAMA, lora_on("blocks.0.attn.q_proj"), ["blocks.0.attn.q_proj.weight"], False),
    "under DoRA, one part of a fused one": (
        NEOX,
        lora_on("blocks.1.attn.k_proj", dora=True),
        ["blocks.1.attn.q_proj.weight", "blocks.1.attn.k_proj.bias"],
        False,
    ),
    "one part of a Conv1D": (GPT2, lora_on("blocks.1.mlp.up_proj"), ["blocks.0.attn.v_proj.weight"], False),
    "biases alone": (
        GPT2,
        lora_on("blocks.0.attn.q_proj"),
        ["blocks.1.norm_1.bias", "blocks.1.attn.k_proj.bias"],
        False,
    ),
    "a whole block": (
        LLAMA,
        lora_on("blocks.0.attn.q_proj", "blocks.0.mlp.up_proj"),
        [f"blocks.1.{m}.weight" for m in ("norm_1", "attn.q_proj", "attn.o_proj", "norm_2", "mlp.down_proj")],
        False,
    ),
    "a tied embedding": (TIED, lora_on("blocks.0.attn.q_proj"), ["embed.weight"], False),
    "a tied embedding under the head's adapter": (TIED, lora_on("head"), ["embed.weight"], False),
    "an untied head": (TIED, lora_on("blocks.0.attn.q_proj"), ["head.weight", "final_norm.weight"], True),
    "an untied head under its adapter": (TIED, lora_on("head"), ["head.weight"], True),
    "an untied embedding": (TIED, lora_on("head"), ["embed.weight"], True),
}


@pytest.mark.parametrize("case", MIXED)
def test_full_weights_beside_our_adapter_mean_the_same_to_peft(case, tmp_path):
    fields, lora, replaced, untied = MIXED[case]
    with saved_model(fields) as (base, _):
        checkpoint = adapted_here(base, lora, replaced, untied=untied)
        tokens = random_tokens(61, batch=2, length=9)
        expected = our_logits(checkpoint, tokens)
        write_peft(tmp_path / "theirs", checkpoint, str(base))
        assert_close(peft_logits(base, tmp_path / "theirs", tokens), expected)
        again = open_checkpoint(tmp_path / "theirs")
        assert_close(our_logits(again, tokens), expected)
        assert again.config.tie_embeddings == checkpoint.config.tie_embeddings
        assert set(replaced) <= set(again.replaced)


QKV = ("blocks.0.attn.q_proj", "blocks.0.attn.k_proj", "blocks.0.attn.v_proj")


def test_the_adapters_of_a_fused_projection_become_one(tmp_path):
    """Ranks add up, and B is zero but for each part's rows and ranks."""
    with saved_model(GPT2) as (base, _):
        lora = LoRA({QKV[0]: 2, QKV[2]: 3}, {QKV[0]: 4.0, QKV[2]: 6.0})
        checkpoint = adapted_here(base, lora)
        written = write_peft(tmp_path / "theirs", checkpoint)
    a, b = (stored(tmp_path / "theirs")[f"base_model.model.transformer.h.0.attn.c_attn.lora_{p}.weight"] for p in "AB")
    assert (written["r"], written["lora_alpha"]) == (5, 10)
    assert torch.equal(a, torch.cat([checkpoint.read(f"{part}.lora_A") for part in (QKV[0], QKV[2])]))
    assert torch.equal(b[:16, :2], checkpoint.read(f"{QKV[0]}.lora_B"))
    assert torch.equal(b[32:, 2:], checkpoint.read(f"{QKV[2]}.lora_B"))
    assert b.count_nonzero() == 16 * 2 + 16 * 3


def test_parts_with_one_a_share_it_whatever_their_scales(tmp_path):
    with saved_model(NEOX) as (base, _):
        lora = LoRA(dict.fromkeys(QKV, 2), {QKV[0]: 4.0, QKV[1]: 4.0, QKV[2]: 1.0})
        checkpoint = adapted_here(base, lora)
        own = {name: checkpoint.read(name) for name in checkpoint.tensors}
        checkpoint = checkpoint.with_lora(lora, own | {f"{part}.lora_A": own[f"{QKV[0]}.lora_A"] for part in QKV})
        assert write_peft(tmp_path / "theirs", checkpoint, str(base))["r"] == 2
        tokens = random_tokens(61, batch=1, length=9)
        assert_close(peft_logits(base, tmp_path / "theirs", tokens), our_logits(checkpoint, tokens))


# --- adapter_config.json ---------------------------------------------------------------------------------------------

WITHIN = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BLOCKS = {f"transformer.h.{i}.{name}": i for i in range(12) for name in WITHIN} | {"lm_head": None}


@st.composite
def chosen_modules(draw):
    """Anything, or the same in some blocks."""
    if draw(st.booleans()):
        return draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=30, unique=True))
    names = draw(st.lists(st.sampled_from(WITHIN), min_size=1, unique=True))
    blocks = draw(st.lists(st.integers(0, 11), min_size=1, unique=True))
    return [f"transformer.h.{i}.{name}" for i in blocks for name in names] + ["lm_head"] * draw(st.booleans())


@given(chosen=chosen_modules(), data=st.data())
def test_peft_reads_the_settings_as_exactly_these_modules_ranks_and_alphas(chosen, data):
    ranks = {module: data.draw(st.sampled_from([4, 8])) for module in chosen}
    alphas = {module: data.draw(st.sampled_from([8.0, 0.1])) for module in chosen}
    config = LoraConfig(**settings_for(ranks, alphas, BLOCKS, 12))
    assert {module for module in BLOCKS if check_target_module_exists(config, module)} == set(chosen)
    for module in chosen:
        rank_key, alpha_key = (get_pattern_key(p, module) for p in (config.rank_pattern, config.alpha_pattern))
        assert config.rank_pattern.get(rank_key, config.r) == ranks[module]
        assert config.alpha_pattern.get(alpha_key, config.lora_alpha) == alphas[module]


@pytest.mark.parametrize(
    ("chosen", "targets", "layers"),
    [
        ([f"transformer.h.{i}.attn.c_attn" for i in range(12)], ["c_attn"], None),
        ([f"transformer.h.{i}.attn.c_proj" for i in range(12)], ["attn.c_proj"], None),
        (["transformer.h.11.attn.c_attn", "transformer.h.1.attn.c_attn", "lm_head"], ["c_attn", "lm_head"], [1, 11]),
        (["lm_head"], ["lm_head"], None),
        (
            ["transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_fc"],
            ["transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_fc"],
            None,
        ),
    ],
)
def test_modules_are_named_shortly_where_blocks_are_alike(chosen, targets, layers):
    written = settings_for(dict.fromkeys(chosen, 8), dict.fromkeys(chosen, 16.0), BLOCKS, 12)
    assert (written["target_modules"], written["layers_to_transform"]) == (targets, layers)
    assert (written["r"], written["lora_alpha"], type(written["lora_alpha"])) == (8, 16, int)
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({}, {})


# --- refusals: named, in one line ------------------------------------------------------------------------------------


def config(**fields):
    def change(path):
        file = path / "adapter_config.json"
        write_json(file, json.loads(file.read_text("utf-8")) | fields)

    return change


def tensors(change):
    def apply(path):
        found = stored(path)
        change(found)
        safetensors.torch.save_file(found, path / "adapter_model.safetensors")

    return apply


def both(*changes):
    return lambda path: [change(path) for change in changes]


def truncated(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


Q = "base_model.model.model.layers.0.self_attn.q_proj"
UNHONOURED = {
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["up_proj.weight"],
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "megatron_config": {"tp": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
    "kasa_config": {"beta": 1},
    "arrow_config": {"top_k": 1},
    "use_bdlora": {"nblocks": 2},
    "of_the_future": "yes",
}

REFUSALS = {
    **{f"{key} set": (config(**{key: value}), ["adapter_config.json", f"{key}="]) for key, value in UNHONOURED.items()},
    **{
        f"begun with {init}": (config(init_lora_weights=init), ["init_lora_weights", init, "leaves the base's weights"])
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "another kind": (config(peft_type="IA3"), ["adapter_config.json", 'peft_type is "IA3"']),
    "no kind": (config(peft_type=None), ["peft_type is null"]),
    "another task": (config(task_type="SEQ_CLS"), ["task_type", "CAUSAL_LM"]),
    "r 0": (config(r=0), ["r is 0; it must be a positive whole number"]),
    "r a word": (config(r="8"), ['r is "8"']),
    "negative alpha": (config(lora_alpha=-16), ["lora_alpha is -16; it must be a positive number"]),
    "negative alpha of one layer": (config(alpha_pattern={"q_proj": -1}), ["alpha_pattern"]),
    "no expression": (config(rank_pattern={"(": 2}), ["rank_pattern", "regular expressions"]),
    "dropout 2": (config(lora_dropout=2), ["lora_dropout is 2; it must be a number from 0 to 1"]),
    "a flag that is none": (config(use_dora="no"), ['use_dora is "no"']),
    "broken settings": (lambda path: (path / "adapter_config.json").write_text("{", "utf-8"), ["as JSON"]),
    "another rank": (config(r=4), ["_proj.lora_A.weight has rank 2; adapter_config.json says 4"]),
    "another rank of one layer": (
        config(rank_pattern={r"0\..*q_proj": 3}),
        [f"{Q}.lora_A.weight has rank 2", "says 3"],
    ),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), ["has no weights", "adapter_model.bin"]),
    "truncated": (truncated, ["adapter_model.safetensors is truncated"]),
    "no A": (tensors(lambda t: t.pop(f"{Q}.lora_A.weight")), [f"{Q}.lora_A.weight is missing"]),
    "no B": (tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), [f"{Q}.lora_B.weight is missing"]),
    "rank 0": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0, 16), f"{Q}.lora_B.weight": torch.ones(16, 0)})),
        [f"{Q}.lora_A.weight has rank 0"],
    ),
    "no magnitude": (config(use_dora=True), ["_proj.lora_magnitude_vector is missing"]),
    "a magnitude without DoRA": (
        tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)})),
        [f"{Q}.lora_magnitude_vector is DoRA's"],
    ),
    "another width": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 32)})),
        [f"{Q}.lora_A.weight has shape [2, 32]; over this base it would be [2, 16]"],
    ),
    "another height": (
        tensors(lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(17, 2)})),
        [f"{Q}.lora_B.weight has shape [17, 2]; over this base it would be [16, 2]"],
    ),
    "a matrix with a dimension more": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16, 1)})),
        [f"{Q}.lora_A.weight has shape [2, 16, 1]"],
    ),
    "a larger vocabulary": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 16)})),
        ["lm_head.weight has shape [64, 16]; over this base it would be [61, 16]"],
    ),
    "a block too many": (
        tensors(lambda t: t.update({Q.replace(".0.", ".2.") + ".lora_A.weight": torch.ones(2, 16)})),
        ["model.layers.2.self_attn.q_proj.lora_A.weight has no place in the base, this llama model"],
    ),
    "another family": (
        tensors(
            lambda t: t.update({"base_model.model.gpt_neox.layers.0.attention.dense.lora_A.weight": torch.ones(2, 16)})
        ),
        ["gpt_neox.layers.0.attention.dense.lora_A.weight has no place"],
    ),
    "a module to save that is not there": (
        config(modules_to_save=["o_proj"]),
        ["model.layers.0.self_attn.o_proj.weight is missing, one of its modules_to_save"],
    ),
    "an adapted embedding": (
        tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 61)})),
        ["adapts the embedding"],
    ),
    "an adapted norm": (
        tensors(lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.ones(2, 16)})),
        ["model.norm.lora_A.weight has no place"],
    ),
    "a bias of the adapter": (
        tensors(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(16)})),
        [f"{Q}.lora_B.bias has no place"],
    ),
    "whole numbers": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)})),
        [f"{Q}.lora_A.weight is stored as torch.int8"],
    ),
    "no adapter": (
        tensors(lambda t: (t.clear(), t.update({"base_model.model.lm_head.weight": torch.ones(61, 16)}))),
        ["holds no adapter"],
    ),
    "no base": (config(base_model_name_or_path="someone/base"), ["is an adapter", "someone/base", "--base_dir"]),
    "no word of its base": (config(base_model_name_or_path=None), ["is an adapter", "None", "--base_dir"]),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tokenizer_dir):
    """A Llama with a tokenizer in `base`, and PEFT's adapter on it in `adapter`."""
    path = tmp_path_factory.mktemp("peft")
    with saved_model(LLAMA) as (saved, _):
        shutil.copytree(saved, path / "base")
    shutil.copytree(tokenizer_dir, path / "base", dirs_exist_ok=True)
    trained_by_peft(path / "base", path / "adapter", target_modules=["q_proj", "up_proj"], lora_alpha=16)
    return path


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_with_an_adapter_is_named(case, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(adapter / "base")  # a base that nobody named must not be found here
    change, told = REFUSALS[case]
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UsageError) as refusal:
        open_checkpoint(tmp_path / "adapter")
    message = str(refusal.value)
    assert str(tmp_path / "adapter") in message
    assert [words for words in told if words not in message] == []
    assert "\n" not in message


def test_a_tied_base_takes_no_two_weights(tmp_path):
    with saved_model(TIED) as (base, _):
        trained_by_peft(base, tmp_path / "theirs", target_modules=["q_proj"])
        names = ("model.embed_tokens", "lm_head")
        pair = {f"base_model.model.{name}.weight": torch.full((61, 16), float(i)) for i, name in enumerate(names)}
        tensors(lambda found: found.update(pair))(tmp_path / "theirs")
        with pytest.raises(UsageError, match="tied to its embedding, and here they differ"):
            open_checkpoint(tmp_path / "theirs", base)


def test_what_peft_writes_unasked_is_no_reason_to_refuse(adapter):
    """Every field of the installed release, at its default."""
    fields = json.loads((adapter / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert len(fields) > 20
    assert open_checkpoint(adapter / "adapter").lora.alphas["blocks.0.mlp.up_proj"] == 16


# --- the commands ----------------------------------------------------------------------------------------------------


def test_from_peft_and_to_peft(adapter, tmp_path, capsys):
    ours = from_peft(adapter / "adapter", tmp_path / "ours")
    told = capsys.readouterr().out
    assert "LoRA r 2, alpha 16 on 4 layers" in told and str(adapter / "base") in told and "merge_lora" in told
    opened = open_checkpoint(ours)
    assert opened.manifest["kind"] == "lora"
    assert opened.tokenizer().encode("naïve café") == [3, 4]
    direct = open_checkpoint(adapter / "adapter")
    assert opened.lora == direct.lora and opened.weights_hash == direct.weights_hash
    tokens = random_tokens(61, batch=1, length=9)
    assert torch.equal(our_logits(opened, tokens), our_logits(direct, tokens))

    theirs = to_peft(ours, tmp_path / "theirs")
    assert str(adapter / "base") in capsys.readouterr().out
    assert_same_tensors(stored(theirs), stored(adapter / "adapter"), adapter / "base")
    written = json.loads((theirs / "adapter_config.json").read_text("utf-8"))
    assert written["base_model_name_or_path"] == str(adapter / "base")
    assert (theirs / "tokenizer.json").read_bytes() == (adapter / "base" / "tokenizer.json").read_bytes()
    assert not (theirs / "config.json").exists()


def test_the_base_is_called_by_where_it_came_from_or_as_is_said(adapter, tmp_path, capsys):
    converted = from_hf(adapter / "base", tmp_path / "converted")
    ours = from_peft(adapter / "adapter", tmp_path / "ours", base_dir=converted)
    for name, expected in ((None, str(adapter / "base")), ("org/model", "org/model")):
        theirs = to_peft(ours, tmp_path / f"as {name}", base_name=name)
        written = json.loads((theirs / "adapter_config.json").read_text("utf-8"))
        assert written["base_model_name_or_path"] == expected
    manifest = json.loads((converted / "litfreeze.json").read_text("utf-8"))
    write_json(converted / "litfreeze.json", {key: value for key, value in manifest.items() if key != "source"})
    capsys.readouterr()
    to_peft(ours, tmp_path / "theirs")
    assert f"litfreeze convert to_hf --checkpoint_dir {converted}" in capsys.readouterr().out


def test_each_command_takes_its_own_kind_only(adapter, tmp_path):
    ours = from_peft(adapter / "adapter", tmp_path / "ours")
    for command, given_dir, told in (
        (from_hf, adapter / "adapter", "litfreeze convert from_peft"),
        (from_peft, adapter / "base", "is no PEFT adapter"),
        (from_peft, ours, "is no PEFT adapter"),
        (to_peft, adapter / "base", "carries no adapter"),
    ):
        with pytest.raises(UsageError, match=told):
            command(given_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
