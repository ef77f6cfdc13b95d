"""An opened checkpoint: its shape, its tensors where they lie, and what is on record of them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.convert.hf import HFTensors
from litfreeze.checkpoint.tensors import Layout, sha256
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.lora import LoRA, is_lora, model_parameters
from litfreeze.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened directory. `read` gives every parameter of its model, an adapter's included, mapped from disk."""

    path: Path
    tokenizer_dir: Path
    hf_config: dict[str, Any]
    config: Config
    tensors: Mapping[str, Tensor]  # all of them or, over a base, those that stand in its place
    dtypes: Mapping[str, torch.dtype]  # of `tensors`
    manifest: Optional[dict[str, Any]] = None  # None: a plain Hugging Face or PEFT directory
    aliases: Mapping[str, str] = field(default_factory=dict)  # of a whole one whose head has been untied
    base: Optional["Checkpoint"] = None  # a whole checkpoint
    lora: Optional[LoRA] = None

    def read(self, name: str) -> Tensor:
        """The parameter `name`, backed by its file."""
        name = self.aliases.get(name, name)
        return self.tensors[name] if self.base is None or name in self.tensors else self.base.read(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `name` is stored in."""
        name = self.aliases.get(name, name)
        return self.dtypes[name] if self.base is None or name in self.tensors else self.base.dtype(name)

    def layout(self) -> Layout:
        """dtype and shape of every parameter, in the model's order."""
        return {n: (self.dtype(n), tuple(p.shape)) for n, p in model_parameters(self.config, self.lora).items()}

    @property
    def whole(self) -> "Checkpoint":
        """The checkpoint beneath, if this one holds only what trained; else itself."""
        return self if self.base is None else self.base

    @property
    def in_transformers(self) -> str:
        """The model_type that transformers gives what this was read or converted from. It is another than the language
        model's own where that is a part of one that also takes pictures, and gives its modules other names."""
        if isinstance(self.tensors, HFTensors):
            return self.tensors.model_type
        return (self.manifest or {}).get("source_type") or self.hf_config["model_type"]

    @property
    def replaced(self) -> list[str]:
        """Weights of the model that stand in place of the base's. (An adapter's tensors have no place there.)"""
        return [] if self.base is None else [name for name in self.tensors if not is_lora(name)]

    def tokenizer(self) -> Tokenizer:
        """Raises UsageError if the directory has none."""
        return Tokenizer.from_dir(self.tokenizer_dir)

    def check_tokens(self, tokens: Iterable[int]) -> None:
        """Raises UsageError if one of `tokens` has no embedding in this model."""
        known = self.config.vocab_size
        if (top := max(tokens, default=0)) >= known:
            raise UsageError(
                f"{self.path}: the tokenizer gives id {top}, but the model has {known} embeddings. "
                "The tokenizer belongs to another model."
            )

    @property
    def prompt(self) -> Optional[dict[str, Any]]:
        """The prompt style this checkpoint was trained with, if it was trained here."""
        manifest = self.manifest or (self.base and self.base.manifest) or {}
        return manifest.get("prompt")

    @property
    def history(self) -> list[dict[str, Any]]:
        """The runs that made this checkpoint, oldest first: what stood in their manifests, without lists of tensors."""
        manifest = self.manifest or (self.base and self.base.manifest) or {}
        last = manifest.get("training")
        runs = [{"kind": manifest.get("kind"), **last}] if last else []
        return manifest.get("history", []) + [{k: v for k, v in run.items() if k != "trained"} for run in runs]

    @cached_property
    def tensor_hashes(self) -> Mapping[str, str]:
        """sha256 of every tensor. On record in a litfreeze directory; of another every weight is read once."""
        if self.manifest is not None and "tensors" in self.manifest:
            own = self.manifest["tensors"]
        else:
            own = {name: sha256(self.tensors[name], self.dtypes[name]) for name in self.tensors}
        hashes = own if self.base is None else {**self.base.tensor_hashes, **own}
        return {**hashes, **{alias: hashes[name] for alias, name in self.aliases.items()}}

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over names, dtypes, shapes and contents, however they are stored: the same for a Hugging Face
        directory and its converted copy, for what trained over its base and for the whole."""
        if self.manifest is not None and "weights_hash" in self.manifest:
            return self.manifest["weights_hash"]
        layout = {name: entry for name, entry in self.layout().items() if name not in self.aliases}
        return weights_hash(layout, self.tensor_hashes)

    def hash_of_contents(self) -> str:
        """`weights_hash`, with every weight read, whatever is on record."""
        return replace(self, manifest=self.without_hashes()).weights_hash

    def untied(self) -> "Checkpoint":
        """The same checkpoint with a head of its own, which starts as a copy of the embedding."""
        if not self.config.tie_embeddings:
            raise UsageError(f"{self.path}: the head is not tied to the embedding, so there is nothing to untie.")
        apart = replace(
            self,
            hf_config={**self.hf_config, "tie_word_embeddings": False},
            config=replace(self.config, tie_embeddings=False),
        )
        if self.base is None:
            return replace(apart, aliases={"head.weight": "embed.weight"})
        tensors, dtypes = self.tensors, self.dtypes
        if "embed.weight" in tensors:  # then the head begins as this embedding, and not as the base's
            tensors = InMemory({**tensors, "head.weight": tensors["embed.weight"]})
            dtypes = {**dtypes, "head.weight": dtypes["embed.weight"]}
            apart = replace(apart, manifest=self.without_hashes())
        return replace(apart, tensors=tensors, dtypes=dtypes, base=self.base.untied())

    def with_lora(self, lora: LoRA, tensors: Mapping[str, Tensor]) -> "Checkpoint":
        """The same checkpoint carrying an adapter of these `tensors`, in place of the one it may have had.

        It goes by the path, prompt and history of what it was made from until it is written."""
        own = {name: self.tensors[name] for name in self.replaced} | dict(tensors)
        dtypes = {name: self.dtypes[name] if name in self.replaced else own[name].dtype for name in own}
        made = {"tensors": InMemory(own), "dtypes": dtypes, "base": self.whole, "lora": lora, "aliases": {}}
        return replace(self, **made, manifest=self.without_hashes())

    def without_hashes(self) -> Optional[dict[str, Any]]:
        """The manifest for what is made of this checkpoint in memory: its hashes are to be computed."""
        return self.manifest and {k: v for k, v in self.manifest.items() if k not in ("weights_hash", "tensors")}


class InMemory(dict):
    """Tensors that no file holds yet, handed out as copies: as a file's, they stay what they are whatever trains."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).clone()


def weights_hash(layout: Layout, hashes: Mapping[str, str]) -> str:
    """One hash for all weights, whatever order or shards they are stored in."""
    lines = (f"{name} {layout[name][0]} {tuple(layout[name][1])} {hashes[name]}\n" for name in sorted(layout))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
