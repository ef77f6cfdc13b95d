"""The shape of one model, read from a Hugging Face `config.json`.

A model's identity is what its config says, never its name. Every field is either honoured, known to leave the
mathematics alone, or refused: a field that is silently dropped would be a wrong model. No heavy import here."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

from litfreeze.errors import UsageError, did_you_mean
from litfreeze.fields import Fields, RoPE
from litfreeze.json_file import read_json


@dataclass(frozen=True)
class Config:
    """Everything `GPT` needs to be built. Sizes in elements, `windows` in tokens (None: the block sees everything)."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_embd: int
    n_head: int
    n_query_groups: int  # key/value heads: n_head is MHA, 1 is MQA, between them GQA
    head_size: int
    intermediate_size: int
    norm: Literal["rmsnorm", "rmsnorm_plus_one", "layernorm"]
    norm_eps: float
    mlp: Literal["gated", "plain"]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    rope: Optional[RoPE]  # None: learned positions
    windows: tuple[Optional[int], ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Optional[Literal["head", "all"]] = None  # over the elements of each head, or of all heads together
    pre_norm: bool = True  # attention and MLP read the stream through a norm
    post_norm: bool = False  # what they add to it goes through one
    parallel_residual: bool = False
    tie_embeddings: bool = False
    embed_scale: float = 1.0  # what the embedding's rows are multiplied by
    local_rope: Optional[RoPE] = None  # in blocks with a window, where theirs is another
    attention_scale: Optional[float] = None  # of the scores; None: one by the root of the head size
    attention_softcap: Optional[float] = None  # scores, and logits, are bent so as to stay within ±softcap
    final_softcap: Optional[float] = None
    # Mixture of experts: each token goes through the MLPs, of this size, that its block's router likes best
    n_expert: int = 0
    n_expert_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True  # the shares of those add up to one
    dense_blocks: tuple[int, ...] = ()  # which have one MLP for all tokens
    initializer_range: float = 0.02
    # Those that `litfreeze expand` put in. It writes this field; the mathematics is the same without
    new_blocks: tuple[int, ...] = field(default=(), compare=False)
    labels: tuple[str, ...] = ()  # the classes of a classifier, in the order of its logits; a language model has none

    @property
    def n_outputs(self) -> int:
        """How many logits the head gives: one for each class or, in a language model, for each token."""
        return len(self.labels) or self.vocab_size

    def rope_of(self, i: int) -> Optional[RoPE]:
        """The rotary positions of block `i`."""
        return self.local_rope if self.local_rope and self.windows[i] is not None else self.rope

    def has_experts(self, i: int) -> bool:
        """Whether the MLP of block `i` is one of experts."""
        return self.n_expert > 0 and i not in self.dense_blocks

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """The config of `path`, a `config.json`. Raises UsageError, naming the file."""
        return cls.from_hf(language_config(read_json(path), str(path)), str(path))

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "Config":
        """The config that the Hugging Face dict `hf` describes. Raises UsageError for an architecture that is not
        supported and for any field that would change the model and is not honoured; `source` names it."""
        fields = Fields(hf, source)
        model_type = fields.take("model_type", None)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UsageError(
                f"{source}: model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
                f"Supported: {', '.join(sorted([*FAMILIES, *WITH_PICTURES]))}."
            )
        architectures = fields.words("architectures")
        for architecture in architectures:
            if not architecture.endswith(("ForCausalLM", "LMHeadModel", CLASSIFIER)):
                raise UsageError(
                    f"{source}: architecture {architecture} is neither a causal language model nor its classifier "
                    f"(…{CLASSIFIER})."
                )
        config = FAMILIES[model_type](fields, model_type)
        config = replace(config, new_blocks=fields.blocks("new_blocks", config.n_layer))
        if any(architecture.endswith(CLASSIFIER) for architecture in architectures):
            # Whatever the file says of the head of its language model: a classifier's has no embedding to share
            config = replace(config, labels=fields.classes(), tie_embeddings=False, final_softcap=None)
        if config.rope is not None and config.rope.kind == "longrope":
            config = replace(config, block_size=min(config.block_size, config.rope.original_block_size))
        fields.refuse_the_rest()
        _check(config, source)
        return config


def language_config(hf: dict[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The config.json of the language model alone if `hf` describes a model that also takes pictures, else `hf`.

    What its text_config leaves out is what transformers fills in. Raises UsageError if it has none."""
    if not isinstance(kind := hf.get("model_type"), str) or kind not in WITH_PICTURES:
        return hf
    model_type, architecture, unsaid = WITH_PICTURES[kind]
    inside = hf.get("text_config")
    if not isinstance(inside, dict) or inside.get("model_type", model_type) != model_type:
        raise UsageError(f"{source}: a {kind} model must have a text_config of model_type {model_type!r}.")
    outside = {key: hf[key] for key in ("tie_word_embeddings", *OF_BOTH) if hf.get(key) is not None}
    return {**unsaid, **inside, **outside, "model_type": model_type, "architectures": [architecture]}


# --- one function per shape of config.json --------------------------------------------------------------------------


def _llama_like(fields: Fields, model_type: str) -> Config:
    """Llama, Mistral, Qwen, OLMo 2, Phi-3: one block, told apart by biases, norms, windows and experts."""
    n_embd, n_head, n_layer = (fields.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    intermediate_size = fields.size("intermediate_size")
    # Qwen3's head size has a default of its own; the others derive it
    head_size = fields.size("head_dim", 128 if model_type == "qwen3" else n_embd // n_head)
    block_size = fields.size("max_position_embeddings")
    unbiased = model_type in ("mistral", "mixtral", "qwen2", "phi3")
    attention_bias = False if unbiased else fields.flag("attention_bias", False)
    rope = fields.rope(head_size, block_size, theta=1e6 if model_type == "mixtral" else 1e4)
    if rope.n_elem != head_size and model_type != "phi3":
        raise UsageError(f"{fields.source}: partial_rotary_factor is not supported in a {model_type} model.")
    if model_type == "phi3":
        fields.must_be("full_attn_mod", 1)
        fields.must_be("interpolate_factor", 1)
        fields.take("original_max_position_embeddings", None)  # of a model that is not stretched
    return Config(
        vocab_size=fields.size("vocab_size"),
        block_size=block_size,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=fields.size("num_key_value_heads", n_head),
        head_size=head_size,
        intermediate_size=intermediate_size,
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-5 if model_type in ("mixtral", "phi3", "olmo2") else 1e-6),
        mlp="gated",
        activation=fields.activation("hidden_act", "silu"),
        rope=rope,
        windows=_windows(fields, model_type, n_layer),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) if model_type == "llama" else False,
        qk_norm="head" if model_type in ("qwen3", "qwen3_moe") else "all" if model_type == "olmo2" else None,
        pre_norm=model_type != "olmo2",
        post_norm=model_type == "olmo2",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
        **(_experts(fields, model_type, n_layer, intermediate_size) if model_type in ("mixtral", "qwen3_moe") else {}),
    )


def _experts(fields: Fields, model_type: str, n_layer: int, intermediate_size: int) -> dict[str, Any]:
    """The fields of Mixtral's experts, and of Qwen3's, which may leave out some blocks and have a size of their own."""
    if model_type == "mixtral":
        size, dense, normalised = intermediate_size, (), True
        count = fields.size("num_local_experts", 8)
    else:
        size, normalised = fields.size("moe_intermediate_size", 768), fields.flag("norm_topk_prob", False)
        count = fields.size("num_experts", fields.size("num_local_experts", 128))
        every, listed = fields.size("decoder_sparse_step", 1), fields.blocks("mlp_only_layers", n_layer)
        dense = tuple(i for i in range(n_layer) if i in listed or (i + 1) % every)
    each = fields.size("num_experts_per_tok", 2 if model_type == "mixtral" else 8)
    if each > count:
        raise UsageError(f"{fields.source}: a token cannot go through {each} of {count} experts.")
    return {
        "n_expert": count,
        "n_expert_per_token": each,
        "moe_intermediate_size": size,
        "norm_topk_prob": normalised,
        "dense_blocks": dense,
    }


def _windows(fields: Fields, model_type: str, n_layer: int) -> tuple[Optional[int], ...]:
    """Sliding windows per block: none in Llama and OLMo 2, in every block of Mistral, Mixtral, Phi-3 and (where it is
    asked for) Qwen3's experts, by `layer_types` in Qwen2 and Qwen3."""
    if model_type in ("llama", "olmo2"):
        return (None,) * n_layer
    window = fields.take("sliding_window", 4096 if model_type in ("mistral", "qwen2", "qwen3", "qwen3_moe") else None)
    if model_type in ("mistral", "mixtral", "phi3"):
        return (window,) * n_layer
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.take("max_window_layers", 28)
    if not isinstance(first, int):
        raise UsageError(f"{fields.source}: max_window_layers is {first!r}; it must be a whole number.")
    if model_type == "qwen3_moe":
        return (window,) * n_layer
    return _by_kind(
        fields, window, ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layer)]
    )


def _by_kind(fields: Fields, window: Optional[int], usual: list[str]) -> tuple[Optional[int], ...]:
    """The window of each block by what `layer_types` or, without it, `usual` calls its attention."""
    n_layer = len(usual)
    kinds = fields.words("layer_types") or usual
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != n_layer:
        raise UsageError(
            f"{fields.source}: layer_types must name sliding_attention or full_attention for each of {n_layer} "
            f"layers; it has {len(kinds)} entries: {', '.join(sorted(set(kinds)))}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _gemma(fields: Fields, model_type: str) -> Config:
    """Gemma 2 and 3 (text): four norms to a block, and every second, or all but every sixth, block with a window."""
    n_embd, n_head, n_layer = (fields.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_size, block_size = fields.size("head_dim", 256), fields.size("max_position_embeddings")
    third = model_type == "gemma3_text"
    if third:
        every = fields.size("sliding_window_pattern", fields.size("_sliding_window_pattern", 6))
        rope, local_rope = _ropes_by_kind(fields, head_size, block_size)
    else:
        every, rope, local_rope = 2, fields.rope(head_size, block_size), None
    usual = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layer)]
    attention_bias = fields.flag("attention_bias", False)
    fields.take("hidden_act", None)  # an old name of what follows, not read by transformers either
    return Config(
        vocab_size=fields.size("vocab_size"),
        block_size=block_size,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=fields.size("num_key_value_heads", 4),
        head_size=head_size,
        intermediate_size=fields.size("intermediate_size"),
        norm="rmsnorm_plus_one",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=fields.activation("hidden_activation", "gelu_pytorch_tanh"),
        rope=rope,
        local_rope=local_rope,
        windows=_by_kind(fields, fields.take("sliding_window", 4096), usual),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        qk_norm="head" if third else None,
        post_norm=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embed_scale=math.sqrt(n_embd),
        attention_scale=1 / math.sqrt(fields.number("query_pre_attn_scalar", 256)),
        attention_softcap=None if third else fields.softcap("attn_logit_softcapping", 50.0),
        final_softcap=fields.softcap("final_logit_softcapping", None if third else 30.0),
        initializer_range=fields.number("initializer_range", 0.02),
    )


def _ropes_by_kind(fields: Fields, head_size: int, block_size: int) -> tuple[RoPE, RoPE]:
    """Gemma 3's rotary positions in blocks that see everything, and in those with a window, in both spellings."""
    both = fields.take("rope_parameters", None) or {}
    if not isinstance(both, dict) or set(both) - {"full_attention", "sliding_attention"}:
        raise UsageError(f"{fields.source}: rope_parameters must have full_attention and sliding_attention.")
    wide, local_theta = both.get("full_attention"), fields.number("rope_local_base_freq", 1e4)
    fields.left["rope_parameters"] = wide
    rope = fields.rope(head_size, block_size, theta=1e6)
    fields.left["rope_parameters"] = both.get("sliding_attention")
    return rope, fields.rope(head_size, block_size, theta=local_theta)


def _even_head_size(fields: Fields, n_embd: int, n_head: int) -> int:
    """GPT-NeoX and GPT-2 always cut the width into equal heads."""
    if n_embd % n_head:
        raise UsageError(f"{fields.source}: a width of {n_embd} is not a multiple of {n_head} heads.")
    return n_embd // n_head


def _gpt_neox(fields: Fields, _: str) -> Config:
    n_embd, n_head, n_layer = (fields.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_size = _even_head_size(fields, n_embd, n_head)
    attention_bias = fields.flag("attention_bias", True)
    block_size = fields.size("max_position_embeddings")
    return Config(
        vocab_size=fields.size("vocab_size"),
        block_size=block_size,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=n_head,
        head_size=head_size,
        intermediate_size=fields.size("intermediate_size"),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        mlp="plain",
        activation=fields.activation("hidden_act", "gelu"),
        rope=fields.rope(head_size, block_size, theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25),
        windows=(None,) * n_layer,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=True,
        parallel_residual=fields.flag("use_parallel_residual", True),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
    )


def _gpt2(fields: Fields, _: str) -> Config:
    n_embd, n_head, n_layer = (fields.size(k) for k in ("n_embd", "n_head", "n_layer"))
    fields.must_be("scale_attn_weights", True)
    fields.must_be("scale_attn_by_inverse_layer_idx", False)
    fields.must_be("add_cross_attention", False)
    fields.take("reorder_and_upcast_attn", None)  # the same mathematics in another order
    fields.take("n_ctx", None)  # an old copy of n_positions
    return Config(
        vocab_size=fields.size("vocab_size"),
        block_size=fields.size("n_positions"),
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=n_head,
        head_size=_even_head_size(fields, n_embd, n_head),
        intermediate_size=fields.size("n_inner", 4 * n_embd),
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        mlp="plain",
        activation=fields.activation("activation_function", "gelu_new"),
        rope=None,
        windows=(None,) * n_layer,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.number("initializer_range", 0.02),
    )


MOST_ELEMENTS = 2**40  # of one tensor
CLASSIFIER = "ForSequenceClassification"  # how transformers' names of classifiers end

FAMILIES = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "qwen3_moe": _llama_like,
    "mixtral": _llama_like,
    "olmo2": _llama_like,
    "phi3": _llama_like,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}

# Models that also take pictures: their language model's model_type and architecture, and what transformers fills in
# where text_config does not say it
WITH_PICTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    )
}
# Fields that the whole of such a model says for its language model too
OF_BOTH = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")


def _check(config: Config, source: str) -> None:
    """Sizes that fit together, and that a machine can hold."""
    positions = 0 if config.rope else config.block_size
    wide = max(config.intermediate_size, config.moe_intermediate_size * config.n_expert)
    widest = max(config.vocab_size, positions, config.n_head * config.head_size, wide)
    if widest * config.n_embd > MOST_ELEMENTS:
        raise UsageError(f"{source}: a tensor of {widest:,} x {config.n_embd:,} is larger than any model's.")
    if config.n_head % config.n_query_groups:
        raise UsageError(
            f"{source}: {config.n_head} attention heads cannot be shared by {config.n_query_groups} key/value heads."
        )
    if config.rope is not None and (config.rope.n_elem < 2 or config.rope.n_elem % 2):
        raise UsageError(f"{source}: rotary positions need an even number of dimensions, not {config.rope.n_elem}.")
    if any(w is not None and (isinstance(w, bool) or not isinstance(w, int) or w < 1) for w in config.windows):
        raise UsageError(f"{source}: sliding_window must be a positive whole number or null.")
