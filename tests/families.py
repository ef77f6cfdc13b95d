"""Small random models of every supported family: their config.json as drawn by hypothesis, and transformers' own model.

`FAMILIES` is the list that the parity and the converter tests run over: a new family is one line in it."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCK_SIZE = 64

Fields = dict[str, Any]  # of a config.json


# --- positions, in both spellings ------------------------------------------------------------------------------------

FACTORS = st.sampled_from([0.5, 2.0, 3.5, 8.0])
ORIGINAL = {"original_max_position_embeddings": st.sampled_from([8, 16, 64])}

SCALINGS: dict[str, dict[str, st.SearchStrategy]] = {
    "default": {},
    "linear": {"factor": FACTORS},
    "llama3": {
        "factor": FACTORS,
        **ORIGINAL,
        "low_freq_factor": st.sampled_from([1.0, 0.5]),
        "high_freq_factor": st.sampled_from([4.0, 2.5]),
    },
    "yarn": {"factor": FACTORS, **ORIGINAL},
}
YARN_OPTIONS = {
    "beta_fast": st.sampled_from([32.0, 2]),
    "beta_slow": st.sampled_from([1.0, 0.25]),
    "attention_factor": st.sampled_from([0.8, 1.3]),
    "truncate": st.booleans(),
}
MSCALES = {"mscale": st.sampled_from([0.7, 1.0]), "mscale_all_dim": st.sampled_from([0.4, 1.0])}


@st.composite
def rope(
    draw, kinds=("default", "linear", "llama3", "yarn"), theta_key="rope_theta", shares=None, share_key=None
) -> Fields:
    """The rotary fields as transformers 4 (rope_theta, rope_scaling) or transformers 5 (rope_parameters) has them."""
    kind = draw(st.sampled_from(kinds))
    scaling = draw(st.fixed_dictionaries(SCALINGS[kind], optional=YARN_OPTIONS if kind == "yarn" else {}))
    if kind == "yarn" and draw(st.booleans()):
        scaling |= draw(st.fixed_dictionaries(MSCALES))
    theta = draw(st.sampled_from([10000.0, 20, 1e6]))
    share = {share_key: draw(shares)} if share_key else {}
    if draw(st.booleans()):
        partial = {"partial_rotary_factor": share[share_key]} if share_key else {}
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling, **partial}}
    if kind == "default":
        return {theta_key: theta, **share, **draw(st.sampled_from([{}, {"rope_scaling": None}]))}
    return {theta_key: theta, **share, "rope_scaling": {draw(st.sampled_from(["type", "rope_type"])): kind, **scaling}}


# --- config.json, family by family -----------------------------------------------------------------------------------


@st.composite
def llama_like(draw, model_type: str, positions: st.SearchStrategy, **more: st.SearchStrategy) -> Fields:
    """Llama, Mistral and Qwen: MHA, GQA or MQA, a head size of its own or none, tied or not."""
    n_head = draw(st.sampled_from([2, 3, 4]))
    n_groups = draw(st.sampled_from([groups for groups in (1, 2, n_head) if n_head % groups == 0]))
    head_size = draw(st.sampled_from([4, 10, 16]))
    fields = {
        "model_type": model_type,
        "vocab_size": draw(st.sampled_from([61, 96])),
        "hidden_size": n_head * draw(st.sampled_from([8, 10])),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": n_head,
        "num_key_value_heads": n_groups,
        "max_position_embeddings": BLOCK_SIZE,
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        **draw(st.sampled_from([{}, {"head_dim": head_size}])),
        **{key: draw(strategy) for key, strategy in more.items()},
    }
    return fields | draw(positions)


BIASES = {"attention_bias": st.booleans(), "mlp_bias": st.booleans()}
SOMETIMES_SHORT = st.sampled_from([None, 1, 3, 7, 4096])


@st.composite
def qwen(draw, model_type: str, **more: st.SearchStrategy) -> Fields:
    """Windows in all blocks, in the upper ones or where `layer_types` says; Qwen3's head size is always told, since
    its default does not follow from the width."""
    fields = draw(llama_like(model_type, rope(), **more))
    if model_type == "qwen3":
        fields.setdefault("head_dim", 8)
    kinds = st.sampled_from(["full_attention", "sliding_attention"])
    n_layer = fields["num_hidden_layers"]
    windowed = {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 12))}
    windows = [
        {},
        {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
        {**windowed, "max_window_layers": draw(st.integers(0, n_layer))},
        {**windowed, "layer_types": draw(st.lists(kinds, min_size=n_layer, max_size=n_layer))},
    ]
    return fields | draw(st.sampled_from(windows))


@st.composite
def gpt_neox(draw, parallel: bool) -> Fields:
    n_head = draw(st.sampled_from([2, 3]))
    return {
        "model_type": "gpt_neox",
        "vocab_size": draw(st.sampled_from([61, 96])),
        "hidden_size": n_head * draw(st.sampled_from([8, 16])),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": n_head,
        "max_position_embeddings": BLOCK_SIZE,
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_fast", "relu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "use_parallel_residual": parallel,
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    } | draw(rope(("default", "linear"), "rotary_emb_base", st.sampled_from([0.25, 0.5, 1.0]), "rotary_pct"))


@st.composite
def gpt2(draw) -> Fields:
    n_head = draw(st.sampled_from([2, 3]))
    return {
        "model_type": "gpt2",
        "vocab_size": draw(st.sampled_from([61, 96])),
        "n_embd": n_head * draw(st.sampled_from([5, 8])),
        "n_inner": draw(st.sampled_from([None, 24])),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_head,
        "n_positions": BLOCK_SIZE,
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def gemma(draw, model_type: str) -> Fields:
    """Windows by a count, or where `layer_types` says; other positions in blocks that have one (Gemma 3)."""
    n_head = draw(st.sampled_from([2, 4]))
    n_layer = draw(st.integers(1, 4))
    kinds = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=n_layer, max_size=n_layer)
    fields = {
        "model_type": model_type,
        "vocab_size": draw(st.sampled_from([61, 96])),
        "hidden_size": n_head * draw(st.sampled_from([8, 10])),
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "head_dim": draw(st.sampled_from([4, 10])),
        "max_position_embeddings": BLOCK_SIZE,
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "silu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "query_pre_attn_scalar": draw(st.sampled_from([8, 20])),
        "sliding_window": draw(st.integers(1, 12)),
        "tie_word_embeddings": draw(st.booleans()),
        "final_logit_softcapping": draw(st.sampled_from([None, 10.0, 30.0])),
        **draw(st.sampled_from([{}, {"layer_types": draw(kinds)}])),
    }
    if model_type == "gemma2":
        return fields | {"attn_logit_softcapping": draw(st.sampled_from([None, 1.0, 50.0]))} | draw(rope(("default",)))
    fields |= draw(st.sampled_from([{}, {"sliding_window_pattern": draw(st.integers(1, 4))}]))
    local, wide = draw(st.sampled_from([10000.0, 30.0])), draw(st.sampled_from([1e6, 500.0]))
    stretched = draw(st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}]))
    if draw(st.booleans()):
        kinds = {"full_attention": {**stretched, "rope_theta": wide}}
        return fields | {
            "rope_parameters": kinds | {"sliding_attention": {"rope_type": "default", "rope_theta": local}}
        }
    scaling = {} if stretched["rope_type"] == "default" else {"rope_scaling": stretched}
    return fields | {"rope_theta": wide, "rope_local_base_freq": local} | scaling


@st.composite
def phi3(draw) -> Fields:
    """Projections that are one tensor, a part of each head that turns, and factors for short and long texts. Texts are
    short here: the long factors are for what litfreeze does not take."""
    fields = draw(llama_like("phi3", st.just({}), sliding_window=SOMETIMES_SHORT))
    fields.pop("head_dim", None)  # transformers takes it from the width
    n_head = fields["num_attention_heads"]
    fields |= {"hidden_size": n_head * 8, "pad_token_id": None}
    share = draw(st.sampled_from([1.0, 0.5]))
    factors = st.lists(st.sampled_from([1.0, 1.25, 3.0]), min_size=int(4 * share), max_size=int(4 * share))
    longrope = {"short_factor": draw(factors), "long_factor": draw(factors)}
    if draw(st.booleans()):
        fields |= {
            "rope_scaling": {draw(st.sampled_from(["type", "rope_type"])): "longrope", **longrope},
            "original_max_position_embeddings": BLOCK_SIZE,
            "max_position_embeddings": draw(st.sampled_from([BLOCK_SIZE, 4 * BLOCK_SIZE])),
        }
    return fields | {"rope_theta": 10000.0, "partial_rotary_factor": share}


@st.composite
def experts(draw, model_type: str) -> Fields:
    fields = draw(llama_like(model_type, rope(("default", "llama3"))))
    count = draw(st.sampled_from([2, 5]))
    fields["num_experts_per_tok"] = draw(st.integers(1, count))
    # transformers' kernel wants rows of whole 16 bytes
    fields["hidden_size"] = fields["num_attention_heads"] * 8
    fields["intermediate_size"] = draw(st.sampled_from([8, 24]))
    if model_type == "mixtral":
        return fields | {"num_local_experts": count, "sliding_window": draw(SOMETIMES_SHORT)}
    n_layer = fields["num_hidden_layers"]
    windowed = {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 12))}
    return fields | {
        "num_experts": count,
        "moe_intermediate_size": draw(st.sampled_from([8, 16])),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.sampled_from([1, 2])),
        "mlp_only_layers": sorted(draw(st.sets(st.integers(0, n_layer - 1), max_size=1))),
        "attention_bias": draw(st.booleans()),
        **draw(st.sampled_from([{}, windowed, {"max_window_layers": 1, "use_sliding_window": False}])),
    }


FAMILIES: dict[str, st.SearchStrategy[Fields]] = {
    "llama": llama_like("llama", rope(("default", "linear", "yarn")), **BIASES),
    "llama 3.1": llama_like("llama", rope(("llama3",))),
    "mistral": llama_like("mistral", rope(), sliding_window=SOMETIMES_SHORT),
    "qwen2": qwen("qwen2"),
    "qwen3": qwen("qwen3", attention_bias=st.booleans()),
    "olmo2": llama_like("olmo2", rope(("default", "linear", "yarn")), attention_bias=st.booleans()),
    "phi3": phi3(),
    "gemma2": gemma("gemma2"),
    "gemma3_text": gemma("gemma3_text"),
    "mixtral": experts("mixtral"),
    "qwen3_moe": experts("qwen3_moe"),
    "gpt_neox, parallel": gpt_neox(parallel=True),
    "gpt_neox, sequential": gpt_neox(parallel=False),
    "gpt2": gpt2(),
}


def for_llama_cpp(fields: Fields) -> Fields:
    """`fields` with what llama.cpp leaves no choice in, and the demo's vocabulary with some rows of padding."""
    model_type = fields["model_type"]
    fields = fields | {"vocab_size": 1536 + fields["vocab_size"] % 2 * 3}
    if model_type == "gpt2":
        return fields | {"activation_function": "gelu_new"}
    if model_type == "gpt_neox":
        return fields | {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False}
    if model_type.startswith("gemma"):
        fields |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": fields["head_dim"]}
        if fields.pop("layer_types", None):  # any, drawn; here by a period that is neither family's own
            kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(4)]
            fields["layer_types"] = kinds[: fields["num_hidden_layers"]]
        if model_type == "gemma2":
            fields["tie_word_embeddings"] = True
            fields |= {"attn_logit_softcapping": fields["attn_logit_softcapping"] or 2.0}
            fields |= {"final_logit_softcapping": fields["final_logit_softcapping"] or 5.0}
        return fields
    fields["hidden_act"] = "silu"
    if model_type in ("qwen2", "olmo2"):
        fields.pop("head_dim", None)
    if model_type in ("qwen3", "qwen3_moe", "olmo2"):
        fields["attention_bias"] = False
    if model_type == "olmo2":
        fields["tie_word_embeddings"] = False
    if model_type == "qwen3_moe":
        fields |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return fields


# --- transformers' model of a drawn config ---------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


@torch.no_grad()
def reference_model(folder: Path, fields: Fields, seed: int = 0) -> PreTrainedModel:
    """transformers' model of `fields`, read from a config.json in `folder`. Its weights are far from an
    initialisation, biases and norms included, so that whatever is left out shows."""
    write_json(folder / "config.json", fields)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.2, generator=generator)
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter += 1  # a norm
    return model


@contextmanager
def saved_model(fields: Fields, seed: int = 0, spelled_anew: bool = False) -> Iterator[tuple[Path, PreTrainedModel]]:
    """A Hugging Face directory (no tokenizer) of a random model of `fields`, and the model. config.json holds `fields`
    as they are or, `spelled_anew`, as the installed transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = reference_model(path, fields, seed)
        model.save_pretrained(path)
        if not spelled_anew:
            write_json(path / "config.json", fields)
        yield path, model


def random_tokens(vocab_size: int, batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
