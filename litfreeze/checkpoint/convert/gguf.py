"""GGUF's names, layouts and metadata, and ours: one table per family, used in both directions.

The names of tensors are the gguf package's, which maps Hugging Face's. Where llama.cpp computes something else than the
model, the model is refused, or what differs is told."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.convert.gguf_file import FLOATS, GGUFFile, Kind, gguf
from litfreeze.checkpoint.convert.hf import Plain, Stacked, links
from litfreeze.checkpoint.tensors import Layout
from litfreeze.config import Config, RoPE
from litfreeze.errors import UsageError
from litfreeze.lora import model_parameters
from litfreeze.model import rotary_frequencies

# --- how one GGUF tensor holds one or more of ours --------------------------------------------------------------------


class Interleaved:
    """Rows of q or k whose rotary pairs stand side by side, head by head. Ours stand half a head apart."""

    def __init__(self, n_head: int) -> None:
        self.n_head = n_head

    def split(self, tensor: Tensor) -> list[Tensor]:
        pairs = tensor.view(self.n_head, -1, 2, *tensor.shape[1:])  # (H, D / 2, 2, …)
        return [pairs.transpose(1, 2).reshape(tensor.shape)]

    def join(self, parts: list[Tensor]) -> Tensor:
        halves = parts[0].reshape(self.n_head, 2, -1, *parts[0].shape[1:])  # (H, 2, D / 2, …)
        return halves.transpose(1, 2).reshape(parts[0].shape)


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
OPTIONAL = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
# What says nothing of the mathematics, or says it again
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")


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
    told: Mapping[str, str] = field(default_factory=dict)  # an activation that llama.cpp computes differently


SILU = {"activation": "silu"}
FAMILIES = {
    "llama": Family(
        "llama", LLAMA, "LlamaForCausalLM", {}, SILU, ("plain", "linear", "llama3", "yarn"), interleaved=True
    ),
    "mistral": Family("llama", LLAMA, "MistralForCausalLM", {}, SILU, interleaved=True),
    "qwen2": Family("qwen2", LLAMA, "Qwen2ForCausalLM", {}, SILU, wide_heads=False),
    "qwen3": Family("qwen3", LLAMA, "Qwen3ForCausalLM", {}, {**SILU, "qkv_bias": False, "o_bias": False}),
    "gpt_neox": Family(
        "gptneox",
        GPT_NEOX,
        "GPTNeoXForCausalLM",
        {"hidden_act": "gelu"},
        {"activation": "gelu", "qkv_bias": True, "tie_embeddings": False},
        ("plain", "linear"),
        told={"gelu": "llama.cpp approximates GELU by tanh: logits differ a little."},
    ),
    "gpt2": Family(
        "gpt2", GPT2, "GPT2LMHeadModel", {"activation_function": "gelu_new"}, {"activation": "gelu_tanh"}, ()
    ),
}
ARCHS = {family.arch: model_type for model_type, family in reversed(FAMILIES.items())}
ROPE_FREQS = "rope_freqs.weight"
LLAMA3_SIZE = 8192  # what Llama 3 was trained with; a file need not say so


@dataclass(frozen=True)
class Link:
    """One GGUF tensor and the tensors of ours that it holds."""

    name: str
    ours: tuple[str, ...]
    layout: Plain | Stacked | Interleaved


def gguf_links(config: Config, model_type: str, ours: Mapping[str, Any]) -> list[Link]:
    """The table for a model whose own parameters are `ours` (name to anything), in the model's order."""
    family = FAMILIES[model_type]
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    heads = {"q_proj": config.n_head, "k_proj": config.n_query_groups} if family.interleaved else {}
    found = []
    for link in links(config, model_type, ours):
        module = link.ours[0].split(".")[-2]
        rows = [n * config.head_size for n in (config.n_head, config.n_query_groups, config.n_query_groups)]
        layout: Any = Stacked(rows, transposed=False) if len(link.ours) > 1 else Plain()  # q, k and v
        layout = Interleaved(heads[module]) if module in heads else layout
        found.append(Link(names.get_name(link.hf, (".weight", ".bias")), link.ours, layout))
    return found


# --- reading a file as ours -------------------------------------------------------------------------------------------


class GGUFTensors:
    """The tensors of a GGUF file under our names and layouts, read when asked for, in `dtype` or, without one, in what
    holds them (`GGUFFile.dtype`).

    `hf_config` is what config.json would be. Everything is checked on opening: a missing, extra or misshapen tensor, or
    metadata that is not understood, raises UsageError naming it and the file."""

    def __init__(self, file: GGUFFile, dtype: Optional[torch.dtype] = None) -> None:
        self.file, self.wanted = file, dtype
        self.hf_config = _hf_config(file)
        self.config = Config.from_hf(self.hf_config, str(file.path))
        _check_frequencies(file, self.config)
        model_type = self.hf_config["model_type"]
        shapes = {name: tuple(p.shape) for name, p in model_parameters(self.config).items()}
        self.found: dict[str, tuple[Link, int]] = {}
        used = {ROPE_FREQS}
        for link in gguf_links(self.config, model_type, shapes):
            used.add(link.name)
            expected = tuple(link.layout.join([torch.empty(shapes[own], device="meta") for own in link.ours]).shape)
            if link.name not in file.places:
                raise UsageError(f"{file.path}: tensor {link.name} is missing.")
            if (shape := file.places[link.name].shape) != expected:
                raise UsageError(
                    f"{file.path}: {link.name} has shape {list(shape)}; its metadata ask for {list(expected)}."
                )
            self.found |= {own: (link, part) for part, own in enumerate(link.ours)}
        if extra := sorted(set(file.places) - used):
            raise UsageError(f"{file.path}: tensor {extra[0]} has no place in a {model_type} model.")
        self.layout: Layout = {name: (self.dtype(name), shape) for name, shape in shapes.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.wanted or self.file.dtype(self.found[name][0].name)

    def read(self, name: str) -> Tensor:
        link, part = self.found[name]
        return link.layout.split(self.file.read(link.name, self.dtype(name)))[part]


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """config.json, from the metadata."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHS:
        raise UsageError(f"{file.path}: architecture {arch!r} is not supported. Supported: {', '.join(ARCHS)}.")
    model_type = ARCHS[arch]
    family = FAMILIES[model_type]
    left = {key.removeprefix(f"{arch}."): v for key, v in file.metadata.items() if key.startswith(f"{arch}.")}

    def take(key: str, default: Any = None) -> Any:
        value = left.pop(key, default)
        if isinstance(value, (list, str)):
            raise UsageError(f"{file.path}: {arch}.{key} is {str(value)[:60]}; litfreeze takes one number for it.")
        return value

    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type, **family.hf}
    for key, (name, _) in family.keys.items():
        value = take(key)
        if value is None and key not in OPTIONAL:
            raise UsageError(f"{file.path} is damaged: its metadata lack {arch}.{key}.")
        if hf.get(name, value) != value:
            raise UsageError(f"{file.path}: {arch}.{key} is {value}, which does not go with a {name} of {hf[name]}.")
        if value is not None:
            hf[name] = value
    if family.scalings:
        hf |= _hf_rope(file, left, take, family, hf)
    if take("attention.causal", True) is not True:
        raise UsageError(f"{file.path}: its attention is not causal; litfreeze takes language models only.")
    for key in HARMLESS:
        left.pop(key, None)
    for key, value in left.items():
        if value not in (False, 0, "") and not (isinstance(value, float) and value == 1):  # switched off
            raise UsageError(f"{file.path}: litfreeze does not honour {arch}.{key}={str(value)[:60]}.")
    if "token_embd.weight" not in file.places:
        raise UsageError(f"{file.path}: tensor token_embd.weight is missing.")
    hf["vocab_size"] = file.places["token_embd.weight"].shape[0]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != hf["vocab_size"]:
        raise UsageError(f"{file.path} is damaged: {len(tokens)} tokens, and {hf['vocab_size']} embeddings.")
    hf["tie_word_embeddings"] = "output.weight" not in file.places
    if model_type == "llama":
        hf["attention_bias"] = "blk.0.attn_q.bias" in file.places
        hf["mlp_bias"] = "blk.0.ffn_up.bias" in file.places
    for name in ("bos", "eos"):
        hf[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return hf


def _hf_rope(
    file: GGUFFile, left: dict[str, Any], take: Callable[..., Any], family: Family, hf: Mapping[str, Any]
) -> dict[str, Any]:
    """The rotary fields of config.json, taken out of the metadata that are `left`."""
    width = hf.get("head_dim") or hf["hidden_size"] // max(hf["num_attention_heads"], 1)
    n_elem, theta = take("rope.dimension_count", width), take("rope.freq_base", 10000.0)
    if family.arch == "gptneox":
        share = n_elem / max(width, 1)
        share = share if int(width * share) == n_elem else math.nextafter(share, 1)
        fields = {"rotary_emb_base": theta, "rotary_pct": share}
    elif n_elem == width:
        fields = {"rope_theta": theta}
    else:
        raise UsageError(f"{file.path}: {n_elem} of a head's {width} dimensions rotate; litfreeze takes only all here.")
    values = {ours: take(f"rope.scaling.{key}") for key, ours in SCALING.items()}
    values = {key: value for key, value in values.items() if value is not None}
    kind = left.pop("rope.scaling.type", "linear" if "factor" in values else "none")
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
    if kind not in family.scalings:
        raise UsageError(f"{file.path}: rope.scaling.type {kind!r} is not supported. Supported: none, linear, yarn.")
    if kind == "linear":
        values = {"factor": values.get("factor")}
    if kind == "yarn":
        values["attention_factor"] = values.get("attention_factor", 1.0) * _temperature(values.get("factor", 1.0))
    return {**fields, "rope_scaling": {"rope_type": kind, **values}}


# Under rope.scaling, and in config.json's rope_scaling
SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def _temperature(factor: float) -> float:
    """What llama.cpp multiplies cos and sin with under yarn; `rope.scaling.attn_factor` comes on top."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def _check_frequencies(file: GGUFFile, config: Config) -> None:
    """What the file divides the rotary frequencies by must be Llama 3's."""
    if ROPE_FREQS in file.places:
        found = file.read(ROPE_FREQS, torch.float32)
        expected = _divisors(config.rope) if config.rope and config.rope.kind == "llama3" else None
        if expected is None or found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4):
            raise UsageError(f"{file.path}: {ROPE_FREQS} is not Llama 3's scaling of rotary positions.")


def _divisors(rope: RoPE) -> Tensor:
    """What `rope` divides each plain frequency by: (n_elem / 2,)."""
    device = torch.device("cpu")
    return rotary_frequencies(replace(rope, kind="plain"), device) / rotary_frequencies(rope, device)


# --- writing ours as a file -------------------------------------------------------------------------------------------

# --dtype: how matrices are stored, and what general.file_type says then
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}
FULL = ("position_embd.weight", ROPE_FREQS)  # in float32, as vectors are


@dataclass(frozen=True)
class AsGGUF:
    """A model as a GGUF file would hold it: what `write_gguf` takes, without the tokenizer, and what is to be told."""

    arch: str
    metadata: dict[str, Any]
    layout: dict[str, tuple[Kind, tuple[int, ...]]]
    read: Callable[[str], Tensor]
    told: list[str]


def as_gguf(
    config: Config, model_type: str, ours: Layout, read: Callable[[str], Tensor], dtype: Optional[str] = None
) -> AsGGUF:
    """The GGUF form of the model with the weights `ours`. `dtype` is one of KINDS; without it, as the embedding is
    stored. Raises UsageError if llama.cpp computes something else than this model."""
    if model_type not in FAMILIES:
        raise UsageError(f"llama.cpp's form of a {model_type} model is not known here. Known: {', '.join(FAMILIES)}.")
    if config.labels:
        raise UsageError("A classifier has no GGUF form; litfreeze convert to_hf writes it for transformers.")
    family, rope = FAMILIES[model_type], config.rope
    for name, value in family.always.items():
        if getattr(config, name) != value:
            raise UsageError(f"llama.cpp's {family.arch} has {name}={value}, and this model {getattr(config, name)}.")
    if not family.wide_heads and config.head_size * config.n_head != config.n_embd:
        raise UsageError(f"llama.cpp's {family.arch} has heads of n_embd / n_head, and this model {config.head_size}.")
    if rope is not None and rope.kind not in family.scalings:
        raise UsageError(f"llama.cpp's {family.arch} does not stretch positions as this model does ({rope.kind}).")
    if rope is not None and (rope.beta_fast, rope.beta_slow, rope.truncate) != (32.0, 1.0, True):
        raise UsageError("llama.cpp's yarn has beta_fast=32, beta_slow=1, truncate=true, and this model others.")

    told = [family.told[config.activation]] if config.activation in family.told else []
    window = min((window for window in config.windows if window is not None), default=config.block_size)
    if window < config.block_size:
        told.append(f"llama.cpp has no sliding window for {family.arch}: context_length is the window, {window}.")
    seen = replace(config, block_size=min(window, config.block_size))
    metadata = {f"{family.arch}.{key}": getattr(seen, ours) for key, (_, ours) in family.keys.items()}
    metadata[f"{family.arch}.vocab_size"] = config.vocab_size
    if rope is not None:
        metadata |= {f"{family.arch}.rope.{key}": value for key, value in _rope_metadata(rope).items()}

    table = {link.name: link for link in gguf_links(config, model_type, ours)}
    embedding = ours["embed.weight"][0]
    kind = KINDS[dtype] if dtype else next((kind for kind, held in FLOATS.items() if held == embedding), Kind.F32)
    head = "token_embd.weight" if config.tie_embeddings else "output.weight"
    layout: dict[str, tuple[Kind, tuple[int, ...]]] = {}
    for name, link in table.items():
        joined = link.layout.join([torch.empty(ours[own][1], device="meta") for own in link.ours])
        layout[name] = _stored_as(name, tuple(joined.shape), kind, head), tuple(joined.shape)
    if rough := [name for name, (stored, _) in layout.items() if kind not in FLOATS and stored is Kind.F16]:
        told.append(f"{len(rough)} tensors are in f16, since their rows are no multiple of 32: {rough[0]} …")
    if rope is not None and rope.kind == "llama3":
        layout[ROPE_FREQS] = Kind.F32, (rope.n_elem // 2,)
    metadata |= {"general.type": "model", "general.file_type": int(FILE_TYPES[kind])}
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION

    def read_joined(name: str) -> Tensor:
        if name == ROPE_FREQS:
            return _divisors(rope)
        return table[name].layout.join([read(own) for own in table[name].ours])

    return AsGGUF(family.arch, metadata, layout, read_joined, told)


def _stored_as(name: str, shape: tuple[int, ...], kind: Kind, head: str) -> Kind:
    """As llama.cpp's own tools do: vectors in float32, rows that cannot be quantised in f16, and the head, which
    suffers most, in more than four bits."""
    if len(shape) < 2 or name in FULL:
        return Kind.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return Kind.F16
    return Kind.Q8_0 if kind is Kind.Q4_0 and name == head else kind


def _rope_metadata(rope: RoPE) -> dict[str, Any]:
    found: dict[str, Any] = {"dimension_count": rope.n_elem, "freq_base": rope.theta}
    if rope.kind == "llama3":  # its tensor says the rest; llama.cpp does not need this
        return found | {"scaling.original_context_length": rope.original_block_size}
    if rope.kind != "plain":
        found |= {"scaling.type": rope.kind, "scaling.factor": rope.factor}
    if rope.kind == "yarn":
        found |= {
            "scaling.original_context_length": rope.original_block_size,
            "scaling.attn_factor": rope.attention_factor / _temperature(rope.factor),
        }
    return found
