"""PEFT's adapter directories, both ways: names, layouts, and the full weights that stand beside an adapter.

PEFT adapts the modules of Hugging Face's model. Over a fused projection (GPT-2's c_attn, GPT-NeoX's query_key_value)
its adapter has one A, and a B over the rows of q, k and v: here that is three adapters with the same A."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from litfreeze.checkpoint.convert.hf import FOR_PICTURES, Link, as_hf, links, spellings
from litfreeze.checkpoint.convert.peft_config import PEFT_CONFIG, honoured, matching, settings_for
from litfreeze.checkpoint.tensors import Layout, TensorDirectory, same_bits
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.lora import MAGNITUDE, A, B, LoRA, linear_layers, model_parameters

PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# A tensor's name is this, Hugging Face's module, and one of what follows
PREFIX = "base_model.model."
NAMES = {A: "lora_A.weight", B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}
ADAPTER = {name: ours for ours, name in NAMES.items()} | {"lora_magnitude_vector.weight": MAGNITUDE}  # older PEFT
UNDER = "base_layer."  # the weight and bias of a module that carries an adapter
FULL = ("weight", "bias", f"{UNDER}weight", f"{UNDER}bias")
# Where all biases train, that of a module saved whole is written twice more; PEFT does not read these either
UNREAD = ("modules_to_save.bias", "original_module.bias")
TENSOR = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, (*ADAPTER, *FULL, *UNREAD)))})")
# A module that transformers 5 renamed, while Hugging Face's own files keep the old name
RENAMED = {"embed_out": "lm_head"}

EMBED, HEAD = "embed.weight", "head.weight"


def _parts(link: Link) -> list[str]:
    """Our modules in the Hugging Face module whose weight `link` is."""
    return [own.removesuffix(".weight") for own in link.ours]


def _module(link: Link) -> tuple[str, str]:
    """The Hugging Face module of `link` as PEFT meets it, and what of it `link` is: weight or bias."""
    name, _, kind = link.hf.rpartition(".")
    return RENAMED.get(name, name), kind


# --- reading ---------------------------------------------------------------------------------------------------------


class Shared:
    """The A over a fused projection: each of its parts gets one of its own to train."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.clone()] * self.parts


def _is_saved(module: str, saved: Collection[str]) -> bool:
    """Whether PEFT's modules_to_save `saved`, which are ends of names, take in `module` or what it is a part of."""
    return any(name.endswith(end) for name in accumulate(module.split("."), "{}.{}".format) for end in saved)


class PEFTTensors(Mapping):
    """The tensors of a PEFT directory under our names and layouts, read when asked for: its adapter's and, beside it,
    full weights that take the place of the base's.

    `lora` is the adapter; `tied` tells whether the base's head is still tied to the embedding. Everything is checked on
    opening: a tensor that is missing, misshapen or of another model raises UsageError naming it and its file."""

    def __init__(self, path: Path, settings: Mapping[str, Any], config: Config, model_type: str) -> None:
        """`settings` is the directory's adapter_config.json; `config` and `model_type` are its base's."""
        known = honoured(settings, path / PEFT_CONFIG)
        self.stored = TensorDirectory(path, PEFT_WEIGHTS)
        self.found: dict[str, tuple[str, Any, int]] = {}  # ours -> name in the file, layout, part
        # A head that is tied has no weight of its own, but PEFT can give it one
        self.shapes = {n: tuple(p.shape) for n, p in model_parameters(replace(config, tie_embeddings=False)).items()}
        all_links = links(config, model_type, self.shapes)
        self.table = {name: link for link in all_links for name in spellings(link.hf, model_type)}
        linear = linear_layers(config)

        adapters: dict[str, dict[str, str]] = {}  # Hugging Face's module -> part of the adapter -> name in the file
        own_copies: set[str] = set()  # of ours, for which PEFT's model has a place of their own
        saved = known["modules_to_save"]
        for name in self.stored:
            module, kind = self._place(name, linear, model_type)
            if kind in ADAPTER:
                adapters.setdefault(module, {})[ADAPTER[kind]] = name
            elif kind in FULL:
                link = self.table[f"{module}.{kind.removeprefix(UNDER)}"]
                joined = link.layout.join([torch.empty(self.shapes[own], device="meta") for own in link.ours])
                self._check_shape(name, tuple(joined.shape))
                self.found |= {own: (name, link.layout, part) for part, own in enumerate(link.ours)}
                if _is_saved(module, saved):
                    own_copies.update(link.ours)
        for link in all_links:
            module, kind = _module(link)
            if _is_saved(module, saved) and own_copies.isdisjoint(link.ours):
                raise UsageError(f"{self.stored.path}: {PREFIX}{module}.{kind} is missing, one of its modules_to_save.")
        self.tied = config.tie_embeddings and self._settle_tie(own_copies)

        ranks, alphas = {}, {}
        for module, names in adapters.items():
            link = self.table[f"{module}.weight"]
            r = matching(known["rank_pattern"], module, known["r"])
            self._check_adapter(module, link, names, r, known["use_dora"])
            for part, own in enumerate(_parts(link)):
                ranks[own], alphas[own] = r, float(matching(known["alpha_pattern"], module, known["lora_alpha"]))
                for kind, name in names.items():
                    layout = Shared(len(link.ours)) if kind == A and len(link.ours) > 1 else link.rows
                    self.found[f"{own}.{kind}"] = name, layout, part
        if not ranks:
            raise UsageError(f"{path} holds no adapter: none of its {len(self.stored)} tensors is a lora_A.")
        ranks, alphas = ({own: of[own] for own in linear if own in of} for of in (ranks, alphas))
        self.lora = LoRA(ranks, alphas, float(known["lora_dropout"]), known["use_rslora"], known["use_dora"])

    def _place(self, name: str, linear: Collection[str], model_type: str) -> tuple[str, str]:
        """Hugging Face's module that the tensor `name` belongs to, and what it is there."""
        file = self.stored.files[name].path
        if "lora_embedding_" in name:
            raise UsageError(f"{file}: {name} adapts the embedding; litfreeze adapts linear layers only.")
        match = TENSOR.fullmatch(name)
        module, kind = match.groups() if match else ("", "")
        link = self.table.get(f"{module}.{'bias' if kind.endswith('bias') else 'weight'}")
        if link is None or (kind in ADAPTER and _parts(link)[0] not in linear):
            raise UsageError(f"{file}: tensor {name} has no place in the base, this {model_type} model.")
        if not self.stored.layout(name)[0].is_floating_point:
            raise UsageError(f"{file}: {name} is stored as {self.stored.layout(name)[0]}; litfreeze takes floats only.")
        return module, kind

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = self.stored.layout(name)[1]
        if found != expected:
            file = self.stored.files[name].path
            raise UsageError(f"{file}: {name} has shape {list(found)}; over this base it would be {list(expected)}.")

    def _check_adapter(self, module: str, link: Link, names: Mapping[str, str], r: int, dora: bool) -> None:
        """An adapter is whole, of rank `r` and fits the layer."""
        file = self.stored.files[next(iter(names.values()))].path
        n_out, n_in = sum(self.shapes[own][0] for own in link.ours), self.shapes[link.ours[0]][1]
        shapes = {A: (r, n_in), B: (n_out, r)} | ({MAGNITUDE: (n_out,)} if dora else {})
        for kind in NAMES:
            if kind in shapes and kind not in names:
                raise UsageError(f"{file}: {PREFIX}{module}.{NAMES[kind]} is missing.")
            if kind in names and kind not in shapes:
                raise UsageError(f"{file}: {names[kind]} is DoRA's, but {PEFT_CONFIG} has no use_dora.")
        found = self.stored.layout(names[A])[1]
        if len(found) == 2 and found[0] != r:
            raise UsageError(f"{file}: {names[A]} has rank {found[0]}; {PEFT_CONFIG} says {r}.")
        for kind, expected in shapes.items():
            self._check_shape(names[kind], expected)

    def _settle_tie(self, own_copies: Collection[str]) -> bool:
        """Whether a tied head stays tied; it then has no weight of its own.

        PEFT loads a full weight into the module, and so into what that is tied to; but what is in modules_to_save gets
        a copy of the module, tied to nothing."""
        both = EMBED in self and HEAD in self
        if both and same_bits(self[EMBED], self[HEAD], self.dtype(EMBED)):
            del self.found[HEAD]
        elif not own_copies.isdisjoint((EMBED, HEAD)):
            return False
        elif both:
            raise UsageError(f"{self.stored.path}: the base's head is tied to its embedding, and here they differ.")
        elif HEAD in self:
            self.found[EMBED] = self.found.pop(HEAD)
        return True

    def __getitem__(self, name: str) -> Tensor:
        stored, layout, part = self.found[name]
        return layout.split(self.stored[stored])[part]

    def __contains__(self, name: object) -> bool:
        return name in self.found  # Mapping's own would read the tensor

    def __iter__(self):
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.layout(self.found[name][0])[0]


# --- writing ---------------------------------------------------------------------------------------------------------


def as_peft(
    config: Config,
    model_type: str,
    lora: LoRA,
    replaced: Collection[str],
    ours: Layout,
    read: Callable[[str], Tensor],
) -> tuple[dict[str, Any], Layout, Callable[[str], Tensor]]:
    """The settings and the layout of a PEFT directory with the adapter `lora`, and a function that reads its tensors.

    `replaced` names the full weights beside the adapter, `ours` is the layout of every parameter that `read` gives.
    A module with a new weight is saved whole (modules_to_save). Where it carries an adapter or is tied, or where only
    its bias is new, PEFT loads what is new into its own place. Raises UsageError for an MLP in a model with
    experts: transformers has those of a block in one tensor, and PEFT takes the names of an MLP for theirs."""
    if inside := [name for name in (*lora.ranks, *replaced) if config.n_expert and ".mlp." in name]:
        raise UsageError(
            f"PEFT has no place for what trained in {inside[0].removesuffix('.weight')}: transformers keeps a block's "
            "experts in one tensor. Fold it in with litfreeze merge_lora, and convert that to_hf."
        )
    modules: dict[str, dict[str, Link]] = {}  # Hugging Face's module -> weight, bias
    for link in links(config, model_type, dict.fromkeys([*ours, HEAD])):  # a tied head can carry an adapter too
        module, kind = _module(link)
        modules.setdefault(module, {})[kind] = link

    ranks, alphas, tensors, conv1d = {}, {}, {}, False
    for module, kinds in modules.items():
        if any(part in lora.ranks for part in _parts(kinds["weight"])):
            ranks[module], alphas[module], found = _joined(lora, kinds["weight"], ours, read)
            tensors |= {f"{PREFIX}{module}.{NAMES[kind]}": tensor for kind, tensor in found.items()}
            conv1d |= kinds["weight"].layout.transposed

    full, saved, biases = {}, [], set()  # name in the file -> Hugging Face's; modules; where biases lie
    for module, kinds in modules.items():
        new = [kind for kind, link in kinds.items() if any(own in replaced for own in link.ours)]
        place = UNDER if module in ranks else ""
        tied = config.tie_embeddings and kinds["weight"].ours == (EMBED,)
        if "weight" in new and not place and not tied:
            saved.append(module)
            new = list(kinds)
        elif "bias" in new:
            biases.add(place)
        full |= {f"{PREFIX}{module}.{place}{kind}": kinds[kind].hf for kind in new}

    hf_layout, hf_read = as_hf(config, model_type, ours, read)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    layout |= {name: hf_layout[hf] for name, hf in full.items()}
    blocks = {module: _block(kinds["weight"]) for module, kinds in modules.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.labels else "CAUSAL_LM",
        **settings_for(ranks, alphas, blocks, config.n_layer, alone=model_type not in FOR_PICTURES),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "all" if "" in biases else "lora_only" if biases else "none",
        "modules_to_save": saved or None,
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return settings, layout, lambda name: tensors[name] if name in tensors else hf_read(full[name])


def _block(link: Link) -> Optional[int]:
    words = link.ours[0].split(".")  # blocks.0.attn.q_proj.weight
    return int(words[1]) if words[0] == "blocks" else None


def _joined(
    lora: LoRA, link: Link, ours: Layout, read: Callable[[str], Tensor]
) -> tuple[int, float, dict[str, Tensor]]:
    """Rank, alpha and tensors of the one adapter that does what ours do on the parts of `link`.

    Parts with the same A share it, as those do that came from PEFT. Otherwise each keeps ranks of its own: the As
    stand one above the other, and B is block-diagonal. Scales that differ go into B (fp32). A part without an adapter
    has zeros in B and, for DoRA, the row lengths of its weight."""
    adapted = [part for part in _parts(link) if part in lora.ranks]
    first, downs = adapted[0], [read(f"{part}.{A}") for part in adapted]  # (r, in) each
    scale = lora.scale(first)
    shared = all(a.dtype == downs[0].dtype and same_bits(a, downs[0], a.dtype) for a in downs)
    if shared:
        r, alpha, down = lora.ranks[first], lora.alphas[first], downs[0]
    else:
        r, down = sum(lora.ranks[part] for part in adapted), torch.cat(downs)
        alpha = scale * (math.sqrt(r) if lora.rslora else r)

    ups, start = [], 0
    for part in _parts(link):
        if part not in adapted:
            ups.append(torch.zeros(ours[f"{part}.weight"][1][0], r, dtype=ours[f"{first}.{B}"][0]))
            continue
        b, own = read(f"{part}.{B}"), lora.ranks[part]  # (out, own)
        if lora.scale(part) != scale:
            b = b.float() * (lora.scale(part) / scale)
        if not shared:
            b, start = F.pad(b, (start, r - start - own)), start + own  # (out, r)
        ups.append(b)
    tensors = {A: down, B: link.rows.join(ups)}
    if lora.dora:
        tensors[MAGNITUDE] = link.rows.join([_magnitude(part, part in adapted, read) for part in _parts(link)])
    return r, alpha, tensors


def _magnitude(part: str, adapted: bool, read: Callable[[str], Tensor]) -> Tensor:
    """DoRA's row lengths (out,): those that `part` has learned, or has."""
    if adapted:
        return read(f"{part}.{MAGNITUDE}")
    return torch.linalg.vector_norm(read(f"{part}.weight"), dim=1, dtype=torch.float32)
