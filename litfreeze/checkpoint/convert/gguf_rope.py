"""Rotary positions in GGUF's metadata and tensors, and in config.json, both ways."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litfreeze.checkpoint.convert.gguf_family import Family
from litfreeze.checkpoint.convert.gguf_file import GGUFFile
from litfreeze.config import Config, RoPE
from litfreeze.errors import UsageError
from litfreeze.model import rotary_frequencies

LLAMA3_SIZE = 8192  # what Llama 3 was trained with; a file need not say so
LOCAL_BASE = 10000.0  # Gemma 3's in blocks with a window, if a file does not say
# Tensors that say what each frequency is divided by: Llama 3's, and Phi-3's for short and for long texts
ROPE_FREQS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Under rope.scaling, and in config.json's rope_scaling
SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Families in which a part of a head may rotate, and config.json's names of the base and of that share
PARTIAL = {"gptneox": ("rotary_emb_base", "rotary_pct"), "phi3": ("rope_theta", "partial_rotary_factor")}


def _temperature(factor: float) -> float:
    """What llama.cpp multiplies cos and sin with under yarn; `rope.scaling.attn_factor` comes on top."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _divisors(rope: RoPE) -> Tensor:
    """What `rope` divides each plain frequency by: (n_elem / 2,)."""
    device = torch.device("cpu")
    return rotary_frequencies(replace(rope, kind="plain"), device) / rotary_frequencies(rope, device)


# --- reading ----------------------------------------------------------------------------------------------------------


def hf_rope(
    file: GGUFFile, left: dict[str, Any], take: Callable[..., Any], family: Family, hf: Mapping[str, Any]
) -> dict[str, Any]:
    """The rotary fields of config.json, taken out of the metadata that are `left`."""
    width = hf.get("head_dim") or hf["hidden_size"] // max(hf["num_attention_heads"], 1)
    n_elem, theta = take("rope.dimension_count", width), take("rope.freq_base", 10000.0)
    if family.arch in PARTIAL:
        share = n_elem / max(width, 1)
        share = share if int(width * share) == n_elem else math.nextafter(share, 1)
        fields = dict(zip(PARTIAL[family.arch], (theta, share), strict=True))
    elif n_elem == width:
        fields = {"rope_theta": theta}
    else:
        raise UsageError(f"{file.path}: {n_elem} of a head's {width} dimensions rotate; litfreeze takes only all here.")
    if family.arch == "gemma3":
        fields["rope_local_base_freq"] = take("rope.freq_base_swa", LOCAL_BASE)
    values = {ours: take(f"rope.scaling.{key}") for key, ours in SCALING.items()}
    values = {key: value for key, value in values.items() if value is not None}
    kind = left.pop("rope.scaling.type", "linear" if "factor" in values else "none")
    if kind in ("none", "longrope") and "longrope" in family.scalings and {SHORT, LONG} & file.places.keys():
        return fields | _hf_longrope(file, values, hf)
    if ROPE_FREQS in file.places and kind == "none" and "llama3" in family.scalings:
        kind = "llama3"
        # The lowest frequency is divided by the whole factor; the others are compared with the file's
        factor = float(file.read(ROPE_FREQS, torch.float32).view(-1)[-1])
        values = {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": values.get("original_max_position_embeddings", LLAMA3_SIZE),
        }
    elif kind != "yarn" and values.get("attention_factor", 1) != 1:
        raise UsageError(f"{file.path}: rope.scaling.attn_factor goes with the type yarn, and this one is {kind!r}.")
    if kind == "none":
        return fields
    if kind not in family.scalings or kind in ("plain", "longrope"):
        known = ["none", *(known for known in ("linear", "yarn") if known in family.scalings)]
        raise UsageError(f"{file.path}: rope.scaling.type {kind!r} is not supported. Supported: {', '.join(known)}.")
    if kind == "linear":
        values = {"factor": values.get("factor")}
    if kind == "yarn":
        values["attention_factor"] = values.get("attention_factor", 1.0) * _temperature(values.get("factor", 1.0))
    return {**fields, "rope_scaling": {"rope_type": kind, **values}}


def _hf_longrope(file: GGUFFile, values: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's factors: config.json wants both lists."""
    if values.get("factor", 1) != 1:
        raise UsageError(f"{file.path}: rope.scaling.factor is {values['factor']} beside rope_factors; 1 is supported.")
    factors = {}
    for name in (SHORT, LONG):
        if name not in file.places:
            raise UsageError(f"{file.path}: tensor {name} is missing.")
        # As the shortest decimals that they are
        factors[name] = [float(str(value)) for value in file.read(name, torch.float32).view(-1).numpy()]
    if len(factors[LONG]) != len(factors[SHORT]) or not all(0 < factor < math.inf for factor in factors[LONG]):
        raise UsageError(f"{file.path}: {LONG} must hold {len(factors[SHORT])} positive numbers, as {SHORT} does.")
    return {
        "original_max_position_embeddings": values.get(
            "original_max_position_embeddings", hf["max_position_embeddings"]
        ),
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": factors[SHORT],
            "long_factor": factors[LONG],
            "attention_factor": values.get("attention_factor", 1.0),
        },
    }


def check_frequencies(file: GGUFFile, config: Config) -> set[str]:
    """The names of the tensors that the model's positions are told by. Raises UsageError if what the file divides the
    rotary frequencies by is not Llama 3's."""
    if config.rope is not None and config.rope.kind == "longrope":
        return {SHORT, LONG}
    if ROPE_FREQS not in file.places:
        return set()
    found = file.read(ROPE_FREQS, torch.float32)
    expected = _divisors(config.rope) if config.rope and config.rope.kind == "llama3" else None
    if expected is None or found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
        raise UsageError(f"{file.path}: {ROPE_FREQS} is not Llama 3's scaling of rotary positions.")
    return {ROPE_FREQS}


# --- writing ----------------------------------------------------------------------------------------------------------


def check_rope(config: Config, family: Family) -> None:
    """Raises UsageError if llama.cpp turns positions of this family otherwise."""
    rope, local = config.rope, config.local_rope
    if rope is None:
        return
    if rope.kind not in family.scalings:
        raise UsageError(f"llama.cpp's {family.arch} does not stretch positions as this model does ({rope.kind}).")
    if (rope.beta_fast, rope.beta_slow, rope.truncate) != (32.0, 1.0, True):
        raise UsageError("llama.cpp's yarn has beta_fast=32, beta_slow=1, truncate=true, and this model others.")
    if local is not None and local.kind != "plain":
        raise UsageError(
            f"llama.cpp's {family.arch} stretches no positions in blocks with a window; this model does ({local.kind})."
        )


def rope_metadata(rope: RoPE) -> dict[str, Any]:
    found: dict[str, Any] = {"dimension_count": rope.n_elem, "freq_base": rope.theta}
    if rope.kind == "llama3":  # its tensor says the rest; llama.cpp does not need this
        return found | {"scaling.original_context_length": rope.original_block_size}
    if rope.kind == "longrope":
        return found | {
            "scaling.original_context_length": rope.original_block_size,
            "scaling.attn_factor": rope.attention_factor,
        }
    if rope.kind != "plain":
        found |= {"scaling.type": rope.kind, "scaling.factor": rope.factor}
    if rope.kind == "yarn":
        found |= {
            "scaling.original_context_length": rope.original_block_size,
            "scaling.attn_factor": rope.attention_factor / _temperature(rope.factor),
        }
    return found


def rope_tensors(rope: RoPE, hf_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What llama.cpp wants as tensors: (n_elem / 2,) each. Phi-3's long factors are config.json's alone."""
    if rope.kind == "llama3":
        return {ROPE_FREQS: _divisors(rope)}
    if rope.kind != "longrope":
        return {}
    scaling = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    long = scaling.get("long_factor") or list(rope.factors)
    if not isinstance(long, list) or len(long) != len(rope.factors) or not all(type(f) in (int, float) for f in long):
        raise UsageError(f"config.json: long_factor must be a list of {len(rope.factors)} numbers.")
    return {SHORT: torch.tensor(rope.factors), LONG: torch.tensor(long, dtype=torch.float32)}
