"""The shape of one model, read from a Hugging Face `config.json`.

A model's identity is what its config says, never its name. Every field is either honoured, known to leave the
mathematics alone, or refused: a field that is silently dropped would be a wrong model. No heavy import here."""

import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

from litfreeze.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class RoPE:
    """Rotary positions (Su et al., arXiv 2104.09864) and the ways to stretch them.

    `n_elem` is how many of a head's dimensions rotate. `kind`: plain; linear (positions divided by `factor`); llama3
    (low frequencies divided, as in Llama 3.1); yarn (Peng et al., arXiv 2309.00071)."""

    n_elem: int
    theta: float = 10000.0
    kind: Literal["plain", "linear", "llama3", "yarn"] = "plain"
    factor: float = 1.0
    original_block_size: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


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
    norm: Literal["rmsnorm", "layernorm"]
    norm_eps: float
    mlp: Literal["gated", "plain"]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    rope: Optional[RoPE]  # None: learned positions
    windows: tuple[Optional[int], ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    # Those that `litfreeze expand` put in. It writes this field; the mathematics is the same without
    new_blocks: tuple[int, ...] = field(default=(), compare=False)
    labels: tuple[str, ...] = ()  # the classes of a classifier, in the order of its logits; a language model has none

    @property
    def n_outputs(self) -> int:
        """How many logits the head gives: one for each class or, in a language model, for each token."""
        return len(self.labels) or self.vocab_size

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """The config of `path`, a `config.json`. Raises UsageError, naming the file."""
        return cls.from_hf(read_json(path), str(path))

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "Config":
        """The config that the Hugging Face dict `hf` describes. Raises UsageError for an architecture that is not
        supported and for any field that would change the model and is not honoured; `source` names it."""
        fields = _Fields(hf, source)
        model_type = fields.take("model_type", None)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise UsageError(
                f"{source}: model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
                f"Supported: {', '.join(FAMILIES)}."
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
            config = replace(config, labels=fields.classes(), tie_embeddings=False)
        fields.refuse_the_rest()
        _check(config, source)
        return config


# --- one function per shape of config.json --------------------------------------------------------------------------


def _llama_like(fields: "_Fields", model_type: str) -> Config:
    """Llama, Mistral, Qwen2 and Qwen3: one block, told apart by biases, q/k norm and windows."""
    n_embd, n_head, n_layer = (fields.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # Qwen3's head size has a default of its own; the others derive it
    head_size = fields.size("head_dim", 128 if model_type == "qwen3" else n_embd // n_head)
    block_size = fields.size("max_position_embeddings")
    attention_bias = False if model_type in ("mistral", "qwen2") else fields.flag("attention_bias", False)
    rope = fields.rope(head_size, block_size)
    if rope.n_elem != head_size:
        raise UsageError(f"{fields.source}: partial_rotary_factor is not supported in a {model_type} model.")
    return Config(
        vocab_size=fields.size("vocab_size"),
        block_size=block_size,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_query_groups=fields.size("num_key_value_heads", n_head),
        head_size=head_size,
        intermediate_size=fields.size("intermediate_size"),
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        mlp="gated",
        activation=fields.activation("hidden_act", "silu"),
        rope=rope,
        windows=_windows(fields, model_type, n_layer),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
    )


def _windows(fields: "_Fields", model_type: str, n_layer: int) -> tuple[Optional[int], ...]:
    """Sliding windows per block: none in Llama, in every block of Mistral, by `layer_types` in Qwen."""
    if model_type == "llama":
        return (None,) * n_layer
    window = fields.take("sliding_window", 4096)
    if model_type == "mistral":
        return (window,) * n_layer
    if not fields.flag("use_sliding_window", False):
        window = None
    first = fields.take("max_window_layers", 28)
    if not isinstance(first, int):
        raise UsageError(f"{fields.source}: max_window_layers is {first!r}; it must be a whole number.")
    kinds = fields.words("layer_types")
    kinds = kinds or ["sliding_attention" if window and i >= first else "full_attention" for i in range(n_layer)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != n_layer:
        raise UsageError(
            f"{fields.source}: layer_types must name sliding_attention or full_attention for each of {n_layer} "
            f"layers; it has {len(kinds)} entries: {', '.join(sorted(set(kinds)))}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _even_head_size(fields: "_Fields", n_embd: int, n_head: int) -> int:
    """GPT-NeoX and GPT-2 always cut the width into equal heads."""
    if n_embd % n_head:
        raise UsageError(f"{fields.source}: a width of {n_embd} is not a multiple of {n_head} heads.")
    return n_embd // n_head


def _gpt_neox(fields: "_Fields", _: str) -> Config:
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


def _gpt2(fields: "_Fields", _: str) -> Config:
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


DEPTHS = ("num_hidden_layers", "n_layer")
MOST_LAYERS, MOST_ELEMENTS = 1000, 2**40  # far above any model's, and what memory could be asked for
CLASSIFIER = "ForSequenceClassification"  # how transformers' names of classifiers end

FAMILIES = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# The regularisation of pretraining: litfreeze trains without dropout, as LitGPT does, and says so
DROPOUT = ("attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")

# Fields that do not change a forward pass: tokens and generation habits, and bookkeeping
# fmt: off
HARMLESS = frozenset({
    *DROPOUT,
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "task_specific_params", "pretraining_tp", "is_llama_config",
    "id2label", "label2id", "num_labels", "_num_labels", "problem_type", "output_hidden_states", "output_attentions",
    "return_dict",
    "return_dict_in_generate", "chunk_size_feed_forward", "tokenizer_class", "prefix", "finetuning_task",
    "transformers.js_config", "unsloth_version", "unsloth_fixed", "temperature", "top_p", "top_k", "do_sample",
    "max_length", "min_length", "repetition_penalty", "num_beams", "model_max_length", "torchscript",
    "gradient_checkpointing", "keys_to_ignore_at_inference", "is_decoder",
})
# fmt: on


class _Fields:
    """A config.json while it is read: hands out each field once and, at the end, refuses what nobody took."""

    def __init__(self, hf: dict[str, Any], source: str) -> None:
        self.left = dict(hf)
        self.source = source

    def take(self, key: str, default: Any) -> Any:
        return self.left.pop(key, default)

    def size(self, key: str, default: Optional[int] = None) -> int:
        """A positive whole number that a tensor can have; null counts as absent, as in transformers."""
        value = self.take(key, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
            told = "is missing" if value is None else f"is {value!r}; it must be a positive whole number"
            raise UsageError(f"{self.source}: {key} {told}.")
        if key in DEPTHS and value > MOST_LAYERS:
            raise UsageError(f"{self.source}: {key} is {value}; litfreeze takes up to {MOST_LAYERS:,} blocks.")
        return value

    def number(self, key: str, default: float, within: Optional[dict[str, Any]] = None) -> float:
        """A positive number."""
        value = (self.left if within is None else within).pop(key, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise UsageError(f"{self.source}: {key} is {value!r}; it must be a positive number.")
        return float(value)

    def flag(self, key: str, default: bool, within: Optional[dict[str, Any]] = None) -> bool:
        value = (self.left if within is None else within).pop(key, None)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UsageError(f"{self.source}: {key} is {value!r}; it must be true or false.")
        return value

    def words(self, key: str) -> list[str]:
        value = self.take(key, None) or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UsageError(f"{self.source}: {key} is {value!r}; it must be a list of words.")
        return value

    def blocks(self, key: str, n_layer: int) -> tuple[int, ...]:
        """Rising ids of some of `n_layer` blocks."""
        value = self.take(key, None) or []
        whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        if not whole or sorted(set(value)) != value or (value and not 0 <= value[0] <= value[-1] < n_layer):
            raise UsageError(f"{self.source}: {key} is {value!r}; it must be a rising list of ids below {n_layer}.")
        return tuple(value)

    def classes(self) -> tuple[str, ...]:
        """The names of a classifier's classes: those of id2label which, as in transformers, may be left out of two."""
        kind = self.take("problem_type", None)
        if kind not in (None, "single_label_classification"):
            raise UsageError(f"{self.source}: problem_type {kind!r} is not supported; single_label_classification is.")
        named = self.take("id2label", None)
        named = {"0": "LABEL_0", "1": "LABEL_1"} if named is None else named
        ids = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
        labels = tuple(named[i] for i in ids if i in named)
        whole = len(labels) == len(ids) and all(isinstance(label, str) and label for label in labels)
        if len(labels) < 2 or not whole or len(set(labels)) < len(labels):
            raise UsageError(
                f"{self.source}: id2label is {json.dumps(named)[:80]}; it must name two or more classes, each by a "
                'text of its own, from "0" on without a gap.'
            )
        if self.take("num_labels", None) not in (None, len(labels)):
            raise UsageError(f"{self.source}: num_labels is not the number of classes in id2label, {len(labels)}.")
        return labels

    def activation(self, key: str, default: str) -> str:
        name = self.take(key, default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise UsageError(f"{self.source}: {key} {name!r} is not supported. Supported: {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[name]

    def must_be(self, key: str, allowed: Any) -> None:
        value = self.take(key, allowed)
        if value != allowed:
            raise UsageError(f"{self.source}: {key}={value!r} is not supported, only {allowed!r}.")

    def rope(
        self,
        head_size: int,
        block_size: int,
        theta_key: str = "rope_theta",
        share_key: str = "partial_rotary_factor",
        share: float = 1.0,
    ) -> RoPE:
        """Both spellings: transformers 4's rope_theta + rope_scaling, and transformers 5's rope_parameters, which like
        there counts only without the former."""
        theta, share = self.number(theta_key, 10000.0), self.number(share_key, share)
        parameters = self.take("rope_parameters", None)
        scaling = self.take("rope_scaling", None) or parameters or {}
        if not isinstance(scaling, dict):
            raise UsageError(f"{self.source}: the rotary scaling is {scaling!r}; it must be an object.")
        scaling = dict(scaling)
        kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
        scaling.pop("type", None)
        theta = self.number("rope_theta", theta, scaling)
        share = self.number("partial_rotary_factor", share, scaling)
        if share > 1:
            raise UsageError(f"{self.source}: {share:g} of a head's dimensions cannot rotate; 1 is all of them.")
        n_elem = int(head_size * share)
        if kind == "default":
            rope = RoPE(n_elem, theta)
        elif kind == "linear":
            rope = RoPE(n_elem, theta, "linear", self.number("factor", 0, scaling))
        elif kind == "llama3":
            rope = RoPE(
                n_elem,
                theta,
                "llama3",
                self.number("factor", 0, scaling),
                self._original_size(block_size, scaling),
                self.number("low_freq_factor", 0, scaling),
                self.number("high_freq_factor", 0, scaling),
            )
        elif kind == "yarn":
            rope = self._yarn(n_elem, theta, block_size, scaling)
        else:
            raise UsageError(
                f"{self.source}: rope_type {kind!r} is not supported. Supported: default, linear, llama3, yarn."
            )
        if left := [key for key, value in scaling.items() if value]:
            raise UsageError(f"{self.source}: rope {kind!r} has fields litfreeze does not honour: {', '.join(left)}.")
        return rope

    def _yarn(self, n_elem: int, theta: float, block_size: int, scaling: dict[str, Any]) -> RoPE:
        if theta <= 1:
            raise UsageError(f"{self.source}: rope_theta is {theta:g}; yarn needs more than 1.")
        original = self._original_size(block_size, scaling)
        factor = self.number("factor", block_size / original, scaling)
        mscales = [self.number(key, 1.0, scaling) for key in ("mscale", "mscale_all_dim") if scaling.get(key)]

        def temperature(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention_factor = temperature(mscales[0]) / temperature(mscales[1]) if len(mscales) == 2 else temperature(1.0)
        return RoPE(
            n_elem,
            theta,
            "yarn",
            factor,
            original,
            beta_fast=self.number("beta_fast", 32.0, scaling),
            beta_slow=self.number("beta_slow", 1.0, scaling),
            truncate=self.flag("truncate", True, scaling),
            attention_factor=self.number("attention_factor", attention_factor, scaling),
        )

    def _original_size(self, block_size: int, scaling: dict[str, Any]) -> int:
        """How many positions the model was trained with before they were stretched."""
        size = self.number("original_max_position_embeddings", block_size, scaling)
        if not 1 <= size < 2**63:
            raise UsageError(f"{self.source}: original_max_position_embeddings is {size:g}; it must be 1 or more.")
        return int(size)

    def refuse_the_rest(self) -> None:
        """A field nobody took must be harmless or switched off."""
        off = (None, False, 0, "", [], {})
        rest = {k: v for k, v in self.left.items() if k not in HARMLESS and v not in off}
        if rest:
            told = ", ".join(f"{k}={json.dumps(v)[:60]}" for k, v in list(rest.items())[:3])
            raise UsageError(
                f"{self.source}: litfreeze does not honour {told}. "
                "If it leaves the model's mathematics alone, delete it from a copy of config.json."
            )


def _check(config: Config, source: str) -> None:
    """Sizes that fit together, and that a machine can hold."""
    positions = 0 if config.rope else config.block_size
    widest = max(config.vocab_size, positions, config.n_head * config.head_size, config.intermediate_size)
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UsageError, naming the file, if it is absent, broken or not an object."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _llama_preset(**fields: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **fields}


# Shapes to start from random weights with `litfreeze init --preset`, written as their config.json would be.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": _llama_preset(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        vocab_size=1536,
    ),
    "smollm2-135m": _llama_preset(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
    "llama-3.2-1b": _llama_preset(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        vocab_size=128256,
    ),
}
