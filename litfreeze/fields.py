"""A Hugging Face `config.json` while it is read: each field is honoured, known to leave the mathematics alone, or
refused. No heavy import here."""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, Optional

from litfreeze.errors import UsageError

DEPTHS = ("num_hidden_layers", "n_layer")
MOST_LAYERS = 1000  # far above any model's, and what memory could be asked for

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
    "gradient_checkpointing", "keys_to_ignore_at_inference", "is_decoder", "cache_implementation",
    "auto_map",  # the names of code that is never run
    # Of experts while they are pretrained: a loss beside the loss, and noise
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
})
# fmt: on


@dataclass(frozen=True)
class RoPE:
    """Rotary positions (Su et al., arXiv 2104.09864) and the ways to stretch them.

    `n_elem` is how many of a head's dimensions rotate. `kind`: plain; linear (positions divided by `factor`); llama3
    (low frequencies divided, as in Llama 3.1); yarn (Peng et al., arXiv 2309.00071); longrope (Ding et al., arXiv
    2402.13753), with its `factors` for texts up to `original_block_size`, one for each pair of dimensions."""

    n_elem: int
    theta: float = 10000.0
    kind: Literal["plain", "linear", "llama3", "yarn", "longrope"] = "plain"
    factor: float = 1.0
    original_block_size: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()


class Fields:
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
        if not _positive(value):
            raise UsageError(f"{self.source}: {key} is {value!r}; it must be a positive number.")
        return float(value)

    def softcap(self, key: str, default: Optional[float]) -> Optional[float]:
        """A positive number, or None: null says so, as in transformers."""
        value = self.take(key, default)
        return None if value is None else self.number(key, 0.0, {key: value})

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
        theta: float = 10000.0,
    ) -> RoPE:
        """Both spellings: transformers 4's rope_theta + rope_scaling, and transformers 5's rope_parameters, which like
        there counts only without the former. Without either the base is `theta`."""
        theta, share = self.number(theta_key, theta), self.number(share_key, share)
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
        elif kind in ("longrope", "su"):
            rope = self._longrope(n_elem, theta, block_size, scaling)
        else:
            raise UsageError(
                f"{self.source}: rope_type {kind!r} is not supported. Supported: default, linear, llama3, yarn, "
                "longrope."
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

    def _longrope(self, n_elem: int, theta: float, block_size: int, scaling: dict[str, Any]) -> RoPE:
        """Of its two lists of factors the one for texts of the original length. The other takes the place of it for
        every position of a longer text, so that the same tokens would not always be the same."""
        scaling.pop("long_factor", None)
        factors = scaling.pop("short_factor", None)
        if not isinstance(factors, list) or len(factors) != n_elem // 2 or not all(map(_positive, factors)):
            raise UsageError(f"{self.source}: short_factor must be a list of {n_elem // 2} positive numbers.")
        original = self._original_size(int(self.number("original_max_position_embeddings", block_size)), scaling)
        factor = self.number("factor", block_size / original, scaling)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
        return RoPE(
            n_elem,
            theta,
            "longrope",
            factor,
            original,
            attention_factor=self.number("attention_factor", usual, scaling),
            factors=tuple(float(factor) for factor in factors),
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


def _positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value <= sys.float_info.max
