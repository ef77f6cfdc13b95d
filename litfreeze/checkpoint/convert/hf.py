"""Hugging Face's tensor names and layouts, and ours: one table per family, used in both directions."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litfreeze.checkpoint.tensors import Layout, TensorDirectory
from litfreeze.config import Config
from litfreeze.errors import UsageError

# --- how one Hugging Face tensor holds one or more of ours ----------------------------------------------------------


class Plain:
    """The same tensor."""

    transposed = False

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]


class Transposed:
    """GPT-2's Conv1D keeps (in, out); a linear layer keeps (out, in)."""

    transposed = True

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor.T]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].T


class Stacked:
    """Parts one after the other, each of so many rows: q, k and v, or an MLP's gate and what it lets through. GPT-2's
    weight, (C, 3 C), has columns."""

    def __init__(self, rows: Sequence[int], transposed: bool) -> None:
        self.sizes, self.transposed = list(rows), transposed

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return (tensor.T if self.transposed else tensor).split(self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        stacked = torch.cat(list(parts))
        return stacked.T if self.transposed else stacked


class PerHead:
    """GPT-NeoX's fused projection: q, k and v of head 0, then of head 1, …: (H, 3, D, …)."""

    transposed = False

    def __init__(self, n_head: int) -> None:
        self.n_head = n_head

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        heads = tensor.view(self.n_head, 3, -1, *tensor.shape[1:])
        return [heads[:, i].flatten(0, 1) for i in range(3)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        heads = [part.view(self.n_head, -1, *part.shape[1:]) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Link:
    """One Hugging Face tensor and the tensors of ours that it holds."""

    hf: str
    ours: tuple[str, ...]
    layout: Plain | Transposed | Stacked | PerHead
    rows: Plain | Stacked | PerHead  # the same for what has an entry for each row (out, …): a bias, an adapter's B


# --- the name maps: Hugging Face on the left, ours on the right; {i} is the block -----------------------------------

QKV = ("blocks.{i}.attn.q_proj", "blocks.{i}.attn.k_proj", "blocks.{i}.attn.v_proj")

LLAMA = {
    "model.embed_tokens": "embed",
    "model.layers.{i}.input_layernorm": "blocks.{i}.norm_1",
    "model.layers.{i}.self_attn.q_proj": "blocks.{i}.attn.q_proj",
    "model.layers.{i}.self_attn.k_proj": "blocks.{i}.attn.k_proj",
    "model.layers.{i}.self_attn.v_proj": "blocks.{i}.attn.v_proj",
    "model.layers.{i}.self_attn.o_proj": "blocks.{i}.attn.o_proj",
    "model.layers.{i}.self_attn.q_norm": "blocks.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blocks.{i}.attn.k_norm",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.norm_2",
    "model.layers.{i}.mlp.gate_proj": "blocks.{i}.mlp.gate_proj",
    "model.layers.{i}.mlp.up_proj": "blocks.{i}.mlp.up_proj",
    "model.layers.{i}.mlp.down_proj": "blocks.{i}.mlp.down_proj",
    "model.norm": "final_norm",
    "lm_head": "head",
}
GPT_NEOX = {
    "gpt_neox.embed_in": "embed",
    "gpt_neox.layers.{i}.input_layernorm": "blocks.{i}.norm_1",
    "gpt_neox.layers.{i}.attention.query_key_value": QKV,
    "gpt_neox.layers.{i}.attention.dense": "blocks.{i}.attn.o_proj",
    "gpt_neox.layers.{i}.post_attention_layernorm": "blocks.{i}.norm_2",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "blocks.{i}.mlp.up_proj",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "blocks.{i}.mlp.down_proj",
    "gpt_neox.final_layer_norm": "final_norm",
    "embed_out": "head",
}
GPT2 = {
    "transformer.wte": "embed",
    "transformer.wpe": "pos_embed",
    "transformer.h.{i}.ln_1": "blocks.{i}.norm_1",
    "transformer.h.{i}.attn.c_attn": QKV,
    "transformer.h.{i}.attn.c_proj": "blocks.{i}.attn.o_proj",
    "transformer.h.{i}.ln_2": "blocks.{i}.norm_2",
    "transformer.h.{i}.mlp.c_fc": "blocks.{i}.mlp.up_proj",
    "transformer.h.{i}.mlp.c_proj": "blocks.{i}.mlp.down_proj",
    "transformer.ln_f": "final_norm",
    "lm_head": "head",
}
# A norm behind attention and MLP, with one before them (Gemma) or without (OLMo 2)
POST_NORM = {
    **LLAMA,
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.post_norm_1",
    "model.layers.{i}.pre_feedforward_layernorm": "blocks.{i}.norm_2",
    "model.layers.{i}.post_feedforward_layernorm": "blocks.{i}.post_norm_2",
}
PHI3 = {
    **LLAMA,
    "model.layers.{i}.self_attn.qkv_proj": QKV,
    "model.layers.{i}.mlp.gate_up_proj": ("blocks.{i}.mlp.gate_proj", "blocks.{i}.mlp.up_proj"),
}
for _apart in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
    del PHI3[f"model.layers.{{i}}.{_apart}"]
# {e} is the expert
MIXTRAL = {
    **LLAMA,
    "model.layers.{i}.block_sparse_moe.gate": "blocks.{i}.mlp.router",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1": "blocks.{i}.mlp.experts.{e}.gate_proj",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3": "blocks.{i}.mlp.experts.{e}.up_proj",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2": "blocks.{i}.mlp.experts.{e}.down_proj",
}
QWEN3_MOE = {
    **LLAMA,
    "model.layers.{i}.mlp.gate": "blocks.{i}.mlp.router",
    "model.layers.{i}.mlp.experts.{e}.gate_proj": "blocks.{i}.mlp.experts.{e}.gate_proj",
    "model.layers.{i}.mlp.experts.{e}.up_proj": "blocks.{i}.mlp.experts.{e}.up_proj",
    "model.layers.{i}.mlp.experts.{e}.down_proj": "blocks.{i}.mlp.experts.{e}.down_proj",
}
# The language model within one that also takes pictures
GEMMA3 = {re.sub("^model", "model.language_model", hf): ours for hf, ours in POST_NORM.items()}
NAME_MAPS: dict[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "olmo2": POST_NORM,
    "phi3": PHI3,
    "gemma2": POST_NORM,
    "gemma3": GEMMA3,
    "gemma3_text": POST_NORM,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
}
# transformers' classifier of each family
CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
    "mixtral": "MixtralForSequenceClassification",
    "olmo2": "Olmo2ForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
# Other spellings of the same tensor, by family: what to put in place of the beginning of our table's name
OTHER_SPELLINGS: dict[str, list[tuple[str, str]]] = {
    "gpt_neox": [("embed_out.", "lm_head.")],
    "gpt2": [("transformer.", "")],
    "gemma3": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")],
}
# What of a model that also takes pictures is for these
FOR_PICTURES = {"gemma3": re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")}
# Masks and tables that old exports carry and that follow from the config
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias)|attention\.(bias|masked_bias))$")


def links(config: Config, model_type: str, ours: Mapping[str, Any]) -> list[Link]:
    """The table for a model whose own parameters are `ours` (name to anything), in the model's order."""
    found = []
    for hf, names in NAME_MAPS[model_type].items():
        hf = "score" if names == "head" and config.labels else hf  # the head of every family's classifier
        names = (names,) if isinstance(names, str) else names
        layers = range(config.n_layer) if "{i}" in hf else (0,)
        experts = range(config.n_expert) if "{e}" in hf else (0,)
        for i, e, kind in product(layers, experts, ("weight", "bias")):
            own = tuple(_numbered(f"{name}.{kind}", i, e) for name in names)
            if own[0] in ours:
                layout, rows = (_layout(model_type, config, hf, k, len(own)) for k in (kind, "bias"))
                found.append(Link(_numbered(f"{hf}.{kind}", i, e), own, layout, rows))
    order = {name: n for n, name in enumerate(ours)}
    return sorted(found, key=lambda link: order[link.ours[0]])


def _numbered(name: str, i: int, e: int) -> str:
    return name.replace("{i}", str(i)).replace("{e}", str(e))


def _layout(model_type: str, config: Config, hf: str, kind: str, parts: int) -> Any:
    if parts == 3 and model_type == "gpt_neox":
        return PerHead(config.n_head)
    if parts == 3:
        rows = (config.n_head, config.n_query_groups, config.n_query_groups)
        return Stacked([n * config.head_size for n in rows], transposed=model_type == "gpt2" and kind == "weight")
    if parts == 2:
        return Stacked([config.intermediate_size] * 2, transposed=False)
    conv1d = model_type == "gpt2" and kind == "weight" and hf.rsplit(".", 1)[-1].startswith("c_")
    return Transposed() if conv1d else Plain()


def spellings(name: str, model_type: str) -> list[str]:
    """Our table's name of a Hugging Face tensor, and what else it goes by."""
    others = OTHER_SPELLINGS.get(model_type, [])
    return [name] + [other + name.removeprefix(begin) for begin, other in others if name.startswith(begin)]


# --- reading a Hugging Face directory as ours -----------------------------------------------------------------------

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class HFTensors(Mapping):
    """The tensors of a Hugging Face directory under our names and layouts, read when asked for.

    `model_type` is the whole directory's, whose parts for pictures are `left_out`. Everything is checked on opening: a
    missing, extra or misshapen tensor raises UsageError naming it and its file."""

    def __init__(self, path: Path, config: Config, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.stored = TensorDirectory(path, HF_WEIGHTS)
        self.model_type = model_type
        self.found: dict[str, tuple[Link, int, str]] = {}  # ours -> link, part, name in the file
        used = set()
        for link in links(config, model_type, shapes):
            name = self._spelling(link.hf, model_type)
            used.add(name)
            expected = tuple(link.layout.join([torch.empty(shapes[n], device="meta") for n in link.ours]).shape)
            dtype, shape = self.stored.layout(name)
            file = self.stored.files[name].path
            if not dtype.is_floating_point:
                raise UsageError(f"{file}: {name} is stored as {dtype}; litfreeze takes no quantised weights.")
            if shape != expected:
                raise UsageError(f"{file}: {name} has shape {list(shape)}; config.json asks for {list(expected)}.")
            self.found |= {own: (link, part, name) for part, own in enumerate(link.ours)}
        pictures = FOR_PICTURES.get(model_type)
        self.left_out = {name for name in self.stored if pictures is not None and pictures.match(name)}
        self._check_extra(set(self.stored) - used - self.left_out, config, model_type)

    def _spelling(self, name: str, model_type: str) -> str:
        for candidate in spellings(name, model_type):
            if candidate in self.stored:
                return candidate
        raise UsageError(f"{self.stored.path}: tensor {name} is missing from its weights.")

    def _check_extra(self, extra: set[str], config: Config, model_type: str) -> None:
        """A tied head that is stored all the same must be the embedding; computed tables are passed over."""
        head = next(hf for hf, ours in NAME_MAPS[model_type].items() if ours == "head")
        for name in sorted(extra):
            file = self.stored.files[name].path
            if name in spellings(f"{head}.weight", model_type) and config.tie_embeddings:
                embedding = self["embed.weight"]
                if not torch.equal(self.stored[name].to(embedding.dtype), embedding):
                    raise UsageError(
                        f"{file}: config.json ties the head to the embedding, but {name} differs from it. "
                        'Set "tie_word_embeddings": false in config.json if the head is its own.'
                    )
            elif not COMPUTED.search(name):
                raise UsageError(f"{file}: tensor {name} has no place in a {model_type} model.")

    def __getitem__(self, name: str) -> Tensor:
        link, part, stored = self.found[name]
        return link.layout.split(self.stored[stored])[part]

    def __contains__(self, name: object) -> bool:
        return name in self.found  # Mapping's own would read the tensor

    def __iter__(self):
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.layout(self.found[name][2])[0]


# --- writing ours as a Hugging Face directory would hold it ---------------------------------------------------------


def as_hf(
    config: Config, model_type: str, ours: Layout, read: Callable[[str], Tensor]
) -> tuple[Layout, Callable[[str], Tensor]]:
    """The layout of a Hugging Face checkpoint with the weights `ours`, and a function that reads its tensors.

    Joined parts (q, k, v) of different dtypes take the widest."""
    table = {link.hf: link for link in links(config, model_type, ours)}
    layout: Layout = {}
    for hf, link in table.items():
        joined = link.layout.join([torch.empty(ours[own][1], dtype=ours[own][0], device="meta") for own in link.ours])
        layout[hf] = joined.dtype, tuple(joined.shape)
    return layout, lambda hf: table[hf].layout.join([read(own) for own in table[hf].ours])
