"""A GGUF file as our model, and our model as a GGUF file. Where llama.cpp computes something else than the model, the
model is refused, or what differs is told."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.convert.gguf_family import (
    ARCHS,
    FAMILIES,
    OPTIONAL,
    Family,
    Link,
    OneByOne,
    PlusOne,
    gguf_links,
)
from litfreeze.checkpoint.convert.gguf_file import FLOATS, GGUFFile, Kind, gguf
from litfreeze.checkpoint.convert.gguf_rope import (
    check_frequencies,
    check_rope,
    hf_rope,
    rope_metadata,
    rope_tensors,
)
from litfreeze.checkpoint.convert.gguf_windows import context_length, hf_windows, windows_metadata
from litfreeze.checkpoint.tensors import Layout
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.lora import model_parameters

# What says nothing of the mathematics, or says it again
HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")

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
        used = check_frequencies(file, self.config)
        model_type = self.hf_config["model_type"]
        shapes = {name: tuple(p.shape) for name, p in model_parameters(self.config).items()}
        self.found: dict[str, tuple[Link, int]] = {}
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
        link = self.found[name][0]
        return self.wanted or (torch.float32 if isinstance(link.layout, PlusOne) else self.file.dtype(link.name))

    def read(self, name: str) -> Tensor:
        (link, part), dtype = self.found[name], self.dtype(name)
        if isinstance(link.layout, OneByOne):
            return self.file.read(link.name, dtype, part)  # not all experts for one
        if isinstance(link.layout, PlusOne):  # rounded after 1 is taken away
            return link.layout.split(self.file.read(link.name, torch.float32))[part].to(dtype)
        return link.layout.split(self.file.read(link.name, dtype))[part]


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """config.json, from the metadata."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHS:
        raise UsageError(f"{file.path}: architecture {arch!r} is not supported. Supported: {', '.join(ARCHS)}.")
    experts = arch == "llama" and file.metadata.get("llama.expert_count", 0) != 0
    model_type = "mixtral" if experts else ARCHS[arch]
    family = FAMILIES[model_type]
    left = {key.removeprefix(f"{arch}."): v for key, v in file.metadata.items() if key.startswith(f"{arch}.")}

    def take(key: str, default: Any = None) -> Any:
        value = left.pop(key, default)
        if isinstance(value, (list, str)) or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"{file.path}: {arch}.{key} is {str(value)[:60]}; litfreeze takes one number for it.")
        return value

    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type, **family.hf}
    for key, (name, _) in family.keys.items():
        value = take(key)
        if value is None and key not in OPTIONAL:
            raise UsageError(f"{file.path} is damaged: its metadata lack {arch}.{key}.")
        if hf.get(name, value) != value:
            raise UsageError(f"{file.path}: {arch}.{key} is {value}, which does not go with a {name} of {hf[name]}.")
        if value is not None and not (value == 0 and name == "final_logit_softcapping" and not family.bent):
            hf[name] = value
    if "attention.key_length" in family.keys:  # what Hugging Face's config may have other defaults for
        width, heads = hf["hidden_size"], hf["num_attention_heads"]
        hf.setdefault("num_key_value_heads", heads)
        if family.wide_heads:
            hf.setdefault("head_dim", width // max(heads, 1))
        if family.uneven:
            hf["query_pre_attn_scalar"] = family.score_size(
                hf["num_hidden_layers"], width, max(heads, 1), hf["head_dim"]
            )
    hf |= hf_windows(file, take, family, hf.get("num_hidden_layers"))
    if family.scalings:
        hf |= hf_rope(file, left, take, family, hf)
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
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        hf[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return hf


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
FULL = ("position_embd.weight", "ffn_gate_inp.weight")  # in float32, as vectors are


@dataclass(frozen=True)
class AsGGUF:
    """A model as a GGUF file would hold it: what `write_gguf` takes, without the tokenizer, and what is to be told."""

    arch: str
    metadata: dict[str, Any]
    layout: dict[str, tuple[Kind, tuple[int, ...]]]
    read: Callable[[str], Tensor]
    told: list[str]


def as_gguf(
    config: Config,
    hf_config: Mapping[str, Any],
    ours: Layout,
    read: Callable[[str], Tensor],
    dtype: Optional[str] = None,
) -> AsGGUF:
    """The GGUF form of the model with the weights `ours`. `dtype` is one of KINDS; without it, as the embedding is
    stored. Raises UsageError if llama.cpp computes something else than this model."""
    model_type = hf_config["model_type"]
    if model_type not in FAMILIES:
        raise UsageError(f"llama.cpp's form of a {model_type} model is not known here. Known: {', '.join(FAMILIES)}.")
    if config.labels:
        raise UsageError("A classifier has no GGUF form; litfreeze convert to_hf writes it for transformers.")
    family, rope = FAMILIES[model_type], config.rope
    _check_mathematics(config, family)
    check_rope(config, family)

    told = [family.told[config.activation]] if config.activation in family.told else []
    windows, of_windows = windows_metadata(config, family)
    told += of_windows
    seen = replace(config, block_size=context_length(config, family))
    if seen.block_size < config.block_size:
        told.append(
            f"llama.cpp has no sliding window for {family.arch}: context_length is the window, {seen.block_size}."
        )
    if rope is not None and rope.kind == "longrope":
        told.append(f"llama.cpp turns to the long factors if run for more than {rope.original_block_size} positions.")
    metadata = {f"{family.arch}.{key}": getattr(seen, ours) for key, (_, ours) in family.keys.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    metadata |= {f"{family.arch}.{key}": value for key, value in windows.items()}
    metadata[f"{family.arch}.vocab_size"] = config.vocab_size
    if rope is not None:
        metadata |= {f"{family.arch}.rope.{key}": value for key, value in rope_metadata(rope).items()}

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
    factors = {} if rope is None else rope_tensors(rope, hf_config)
    layout |= {name: (Kind.F32, tuple(tensor.shape)) for name, tensor in factors.items()}
    metadata |= {"general.type": "model", "general.file_type": int(FILE_TYPES[kind])}
    metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION

    def read_joined(name: str) -> Tensor:
        if name in factors:
            return factors[name]
        return table[name].layout.join([read(own) for own in table[name].ours])

    return AsGGUF(family.arch, metadata, layout, read_joined, told)


def _check_mathematics(config: Config, family: Family) -> None:
    """Raises UsageError if llama.cpp computes something else than a model of this config."""
    for name, value in family.always.items():
        if getattr(config, name) != value:
            raise UsageError(f"llama.cpp's {family.arch} has {name}={value}, and this model {getattr(config, name)}.")
    if not family.wide_heads and config.head_size * config.n_head != config.n_embd:
        raise UsageError(f"llama.cpp's {family.arch} has heads of n_embd / n_head, and this model {config.head_size}.")
    if family.bent and None in (config.attention_softcap, config.final_softcap):
        raise UsageError(f"llama.cpp's {family.arch} always has softcaps of scores and logits; this model lacks one.")
    if family.uneven:
        size = family.score_size(config.n_layer, config.n_embd, config.n_head, config.head_size)
        if not math.isclose(config.attention_scale, size**-0.5, rel_tol=1e-6):
            raise UsageError(
                f"llama.cpp's {family.arch} of {config.n_layer} blocks has query_pre_attn_scalar={size}, and this "
                f"model {config.attention_scale**-2:g}."
            )


def _stored_as(name: str, shape: tuple[int, ...], kind: Kind, head: str) -> Kind:
    """As llama.cpp's own tools do: vectors in float32, rows that cannot be quantised in f16, and the head, which
    suffers most, in more than four bits."""
    if len(shape) < 2 or name.endswith(FULL):
        return Kind.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return Kind.F16
    return Kind.Q8_0 if kind is Kind.Q4_0 and name == head else kind
