"""llama.cpp's families and ours: the metadata they are told by, and which of its tensors holds which of ours, and how.

The names of tensors are the gguf package's, which maps Hugging Face's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.convert.gguf_file import gguf
from litfreeze.checkpoint.convert.hf import Plain, Stacked, links
from litfreeze.config import Config

# --- how one GGUF tensor holds one or more of ours --------------------------------------------------------------------


class Interleaved:
    """Rows of q or k whose rotary pairs stand side by side, head by head. Ours stand half a head apart."""

    def __init__(self, n_head: int) -> None:
        self.n_head = n_head

    def split(self, tensor: Tensor) -> list[Tensor]:
        pairs = tensor.view(self.n_head, -1, 2, *tensor.shape[1:])  # (H, D / 2, 2, …)
        return [pairs.transpose(1, 2).reshape(tensor.shape)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        halves = parts[0].reshape(self.n_head, 2, -1, *parts[0].shape[1:])  # (H, 2, D / 2, …)
        return halves.transpose(1, 2).reshape(parts[0].shape)


class PlusOne:
    """Gemma's norms multiply with 1 + weight, and llama.cpp keeps that sum. In float32, both ways.

    The sum rounds a weight w to a multiple of 2^-24 or, from 0 on, of 2^-23 (larger ones to as much of themselves). In
    bfloat16 only |w| < 2^-16 can change by that, in float16 only |w| < 2^-13. What the model multiplies with never
    does: for every float32 w between ±2^23, 1 + ((1 + w) - 1) is 1 + w, to the bit."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.float() - 1]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].float() + 1


class OneByOne:
    """The matrices of all experts, one behind the other: (E, …)."""

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unbind()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts))


# --- the families: GGUF's key -> config.json's field and Config's -----------------------------------------------------

SIZES = {
    "block_count": ("num_hidden_layers", "n_layer"),
    "context_length": ("max_position_embeddings", "block_size"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "intermediate_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
}
LLAMA = {
    **SIZES,
    "attention.head_count_kv": ("num_key_value_heads", "n_query_groups"),
    "attention.key_length": ("head_dim", "head_size"),
    "attention.value_length": ("head_dim", "head_size"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
}
GEMMA3 = {**LLAMA, "final_logit_softcapping": ("final_logit_softcapping", "final_softcap")}
GEMMA2 = {**GEMMA3, "attn_logit_softcapping": ("attn_logit_softcapping", "attention_softcap")}
MIXTRAL = {
    **LLAMA,
    "expert_count": ("num_local_experts", "n_expert"),
    "expert_used_count": ("num_experts_per_tok", "n_expert_per_token"),
}
QWEN3_MOE = {
    **LLAMA,
    "expert_count": ("num_experts", "n_expert"),
    "expert_used_count": ("num_experts_per_tok", "n_expert_per_token"),
    "expert_feed_forward_length": ("moe_intermediate_size", "moe_intermediate_size"),
    "expert_weights_norm": ("norm_topk_prob", "norm_topk_prob"),
}
GPT_NEOX = {
    **SIZES,
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_eps"),
    "use_parallel_residual": ("use_parallel_residual", "parallel_residual"),
}
GPT2 = {
    "block_count": ("n_layer", "n_layer"),
    "context_length": ("n_positions", "block_size"),
    "embedding_length": ("n_embd", "n_embd"),
    "feed_forward_length": ("n_inner", "intermediate_size"),
    "attention.head_count": ("n_head", "n_head"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_eps"),
}
# A file may leave them out
OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_weights_norm",
)


@dataclass(frozen=True)
class Windows:
    """How llama.cpp has sliding windows: in every block but each `period`-th, of `size` if the file does not say (None:
    of none). It reads Phi-3's, and then leaves them aside: `used` is False."""

    size: Optional[int] = None
    period: int = 0
    used: bool = True


@dataclass(frozen=True)
class Family:
    """How llama.cpp calls a family, and what its models are like there."""

    arch: str  # general.architecture
    keys: Mapping[str, tuple[str, str]]
    architecture: str  # config.json's
    hf: Mapping[str, Any]  # what config.json has besides
    always: Mapping[str, Any]  # what llama.cpp takes for granted: fields of Config
    scalings: tuple[str, ...] = ("plain", "linear", "yarn")
    interleaved: bool = False
    wide_heads: bool = True  # whether heads may have another size than the width divided by their number
    windows: Optional[Windows] = None  # None: it has none
    uneven: int = 0  # models of so many blocks have scores divided by the root of width / heads, not of the head size
    bent: bool = False  # whether scores and logits always stay within softcaps
    told: Mapping[str, str] = field(default_factory=dict)  # an activation that llama.cpp computes differently

    def score_size(self, n_layer: int, n_embd: int, n_head: int, head_size: int) -> int:
        """Scores are divided by the root of this: config.json's query_pre_attn_scalar."""
        return n_embd // n_head if n_layer == self.uneven else head_size


SILU = {"activation": "silu"}
UNBIASED = {"qkv_bias": False, "o_bias": False}
GELU = {"gelu": "llama.cpp approximates GELU by tanh: logits differ a little."}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
FAMILIES = {
    "llama": Family(
        "llama", LLAMA, "LlamaForCausalLM", {}, SILU, ("plain", "linear", "llama3", "yarn"), interleaved=True
    ),
    "mistral": Family("llama", LLAMA, "MistralForCausalLM", {}, SILU, interleaved=True),
    "mixtral": Family(
        "llama", MIXTRAL, "MixtralForCausalLM", {}, SILU, ("plain", "linear", "llama3", "yarn"), interleaved=True
    ),
    "qwen2": Family("qwen2", LLAMA, "Qwen2ForCausalLM", {}, SILU, wide_heads=False),
    "qwen3": Family("qwen3", LLAMA, "Qwen3ForCausalLM", {}, {**SILU, **UNBIASED}),
    "qwen3_moe": Family(
        "qwen3moe",
        QWEN3_MOE,
        "Qwen3MoeForCausalLM",
        {"norm_topk_prob": True},
        {**SILU, **UNBIASED, "norm_topk_prob": True, "dense_blocks": ()},
    ),
    "olmo2": Family(
        "olmo2", LLAMA, "Olmo2ForCausalLM", {}, {**SILU, **UNBIASED, "tie_embeddings": False}, wide_heads=False
    ),
    "phi3": Family(
        "phi3", LLAMA, "Phi3ForCausalLM", {}, SILU, ("plain", "longrope"), wide_heads=False, windows=Windows(used=False)
    ),
    "gemma2": Family(
        "gemma2",
        GEMMA2,
        "Gemma2ForCausalLM",
        GEMMA,
        {"activation": "gelu_tanh", **UNBIASED, "tie_embeddings": True},
        ("plain", "linear"),
        windows=Windows(4096, 2),
        uneven=46,
        bent=True,
    ),
    "gemma3_text": Family(
        "gemma3",
        GEMMA3,
        "Gemma3ForCausalLM",
        GEMMA,
        {"activation": "gelu_tanh", **UNBIASED},
        ("plain", "linear"),
        windows=Windows(None, 6),
        uneven=62,
    ),
    "gpt_neox": Family(
        "gptneox",
        GPT_NEOX,
        "GPTNeoXForCausalLM",
        {"hidden_act": "gelu"},
        {"activation": "gelu", "qkv_bias": True, "tie_embeddings": False},
        ("plain", "linear"),
        told=GELU,
    ),
    "gpt2": Family(
        "gpt2", GPT2, "GPT2LMHeadModel", {"activation_function": "gelu_new"}, {"activation": "gelu_tanh"}, ()
    ),
}
ARCHS = {family.arch: model_type for model_type, family in reversed(FAMILIES.items())}


# --- the table of tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One GGUF tensor and the tensors of ours that it holds."""

    name: str
    ours: tuple[str, ...]
    layout: Plain | Stacked | Interleaved | PlusOne | OneByOne


def gguf_links(config: Config, model_type: str, ours: Mapping[str, Any]) -> list[Link]:
    """The table for a model whose own parameters are `ours` (name to anything), in the model's order."""
    family = FAMILIES[model_type]
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    heads = {"q_proj": config.n_head, "k_proj": config.n_query_groups} if family.interleaved else {}
    rows = [n * config.head_size for n in (config.n_head, config.n_query_groups, config.n_query_groups)]
    stacked = {3: rows, 2: [config.intermediate_size] * 2}  # q, k and v; an MLP's gate and what it lets through
    found: dict[str, Link] = {}
    for link in links(config, model_type, ours):
        of_all = re.sub(r"experts\.\d+\.", "experts.", link.hf)
        name, module = names.get_name(of_all, (".weight", ".bias")), link.ours[0].split(".")[-2]
        parts, layout = link.ours, Plain()
        if of_all != link.hf:
            parts, layout = (*(found[name].ours if name in found else ()), *parts), OneByOne()
        elif len(parts) > 1:
            layout = Stacked(stacked[len(parts)], transposed=False)
        elif module in heads:
            layout = Interleaved(heads[module])
        elif config.norm == "rmsnorm_plus_one" and "norm" in module:
            layout = PlusOne()
        found[name] = Link(name, parts, layout)
    return list(found.values())
