"""A checkpoint directory: open one of either kind, write one of ours.

A litfreeze directory holds
    config.json             the Hugging Face config, so that identity has one spelling
    litfreeze.json          what this directory is: kind, hashes, base, prompt, how it was trained
    litfreeze.safetensors   the weights under our names (so that no other tool takes them for its own)
    tokenizer.json …        as they came
A plain Hugging Face directory is opened the same way; its tensors are renamed and re-laid as they are read."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from litfreeze import __version__
from litfreeze.checkpoint.convert.hf import HFTensors, as_hf
from litfreeze.checkpoint.tensors import Layout, TensorDirectory, sha256, whole_directory, write_tensors, write_text
from litfreeze.config import Config, read_json
from litfreeze.errors import UsageError
from litfreeze.model import GPT, meta_parameters
from litfreeze.tokenizer import TOKENIZER_FILES, Tokenizer

MANIFEST = "litfreeze.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """An opened directory. `tensors` gives every parameter of `GPT(config)` under its own name, mapped from disk."""

    path: Path
    hf_config: dict[str, Any]
    config: Config
    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    manifest: Optional[dict[str, Any]] = None  # None: a plain Hugging Face directory
    aliases: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """The parameter `name`, backed by its file."""
        return self.tensors[self.aliases.get(name, name)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `name` is stored in."""
        return self.dtypes[self.aliases.get(name, name)]

    def layout(self) -> Layout:
        """dtype and shape of every parameter, in the model's order."""
        return {name: (self.dtype(name), tuple(p.shape)) for name, p in meta_parameters(self.config).items()}

    def tokenizer(self) -> Tokenizer:
        """Raises UsageError if the directory has none."""
        return Tokenizer.from_dir(self.path)

    @property
    def prompt(self) -> Optional[dict[str, Any]]:
        """The prompt style this checkpoint was trained with, if it was trained here."""
        return (self.manifest or {}).get("prompt")

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over names, dtypes, shapes and contents: the same for a Hugging Face directory and its converted copy.
        Of a litfreeze directory it is on record; of another every weight is read once."""
        if self.manifest is not None:
            return self.manifest["weights_hash"]
        layout = {name: entry for name, entry in self.layout().items() if name not in self.aliases}
        return weights_hash(layout, {name: sha256(self.read(name), layout[name][0]) for name in layout})

    def untied(self) -> "Checkpoint":
        """The same checkpoint with a head of its own, which starts as a copy of the embedding."""
        if not self.config.tie_embeddings:
            raise UsageError(f"{self.path}: the head is not tied to the embedding, so there is nothing to untie.")
        return replace(
            self,
            hf_config={**self.hf_config, "tie_word_embeddings": False},
            config=replace(self.config, tie_embeddings=False),
            aliases={"head.weight": "embed.weight"},
        )


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Opens a litfreeze or a Hugging Face directory and checks that its tensors are those its config asks for.

    Reads headers only (and a tied head that is stored all the same). Raises UsageError naming the file and what is
    wrong with it."""
    path = Path(path)
    if not path.is_dir():
        raise UsageError(
            f"{path} is no directory here. --checkpoint_dir takes a local litfreeze or Hugging Face directory; "
            "nothing is downloaded."
        )
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} has no config.json, so it is no checkpoint.{_nearby(path)}")
    hf_config = read_json(path / "config.json")
    config = Config.from_hf(hf_config, str(path / "config.json"))
    shapes = {name: tuple(p.shape) for name, p in meta_parameters(config).items()}
    if not (path / MANIFEST).is_file():
        tensors = HFTensors(path, config, hf_config["model_type"], shapes)
        return Checkpoint(path, hf_config, config, tensors, {name: tensors.dtype(name) for name in tensors})
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path / MANIFEST} has format {manifest.get('format')!r}; this litfreeze reads {FORMAT}.")
    if not isinstance(manifest.get("weights_hash"), str):
        raise UsageError(f"{path / MANIFEST} has no weights_hash: it is damaged, or not written by litfreeze.")
    stored = TensorDirectory(path, ["litfreeze.safetensors"])
    _check_shapes(stored, shapes)
    return Checkpoint(path, hf_config, config, stored, {name: stored.layout(name)[0] for name in stored}, manifest)


def _nearby(path: Path) -> str:
    """Where the checkpoint may be instead: people name the run's folder in place of its `final`."""
    inside = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
    near = "final" if "final" in inside else inside[0] if inside else None
    return f" Did you mean {path / near}?" if near else ""


def _check_shapes(stored: TensorDirectory, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in stored:
            raise UsageError(f"{stored.path}: tensor {name} is missing from its weights.")
        if stored.layout(name)[1] != shape:
            found = list(stored.layout(name)[1])
            raise UsageError(
                f"{stored.files[name].path}: {name} has shape {found}; config.json asks for {list(shape)}."
            )
    if extra := sorted(set(stored) - set(shapes)):
        raise UsageError(f"{stored.files[extra[0]].path}: tensor {extra[0]} has no place in this model.")


def load_model(checkpoint: Checkpoint, dtype: Callable[[str], torch.dtype]) -> GPT:
    """The model with its weights, `dtype(name)` telling each one's dtype.

    Where that is the stored dtype and the tensor is stored as it is used, it stays backed by its file: it costs no
    memory until it is used, and can be dropped and read again. Changing it in memory never changes the file."""
    with torch.device("meta"):
        model = GPT(checkpoint.config)
    for name in list(dict(model.named_parameters())):
        owner, _, attribute = name.rpartition(".")
        # A weight cut out of a fused one is a view with strides of its own, which fused optimizers do not honour
        weight = checkpoint.read(name).to(dtype(name)).contiguous()
        setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    if checkpoint.config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval()


def write_checkpoint(
    out_dir: Path,
    hf_config: Mapping[str, Any],
    layout: Layout,
    read: Callable[[str], Tensor],
    manifest: Mapping[str, Any],
    tokenizer_from: Path,
) -> dict[str, Any]:
    """Writes a litfreeze directory that appears whole or not at all, and returns its manifest.

    `read(name)` gives each tensor of `layout` when its turn comes. `manifest` holds what the caller knows (kind, base,
    prompt, training); hashes and versions are added here. Raises UsageError if `out_dir` already holds something."""
    with whole_directory(Path(out_dir)) as aside:
        hashes = _write_model(aside, "litfreeze", hf_config, layout, read, tokenizer_from)
        whole = {
            "format": FORMAT,
            "litfreeze": __version__,
            **manifest,
            "weights_hash": weights_hash(layout, hashes),
            "tensors": hashes,
        }
        write_text(aside / MANIFEST, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return whole


def write_hf(out_dir: Path, checkpoint: Checkpoint) -> int:
    """Writes `checkpoint` as a Hugging Face directory, whole or not at all, and returns how many tensors it has.

    Raises UsageError if it has no tokenizer or `out_dir` already holds something."""
    checkpoint.tokenizer()
    model_type = checkpoint.hf_config["model_type"]
    layout, read = as_hf(checkpoint.config, model_type, checkpoint.layout(), checkpoint.read)
    with whole_directory(Path(out_dir)) as aside:
        _write_model(aside, "model", checkpoint.hf_config, layout, read, checkpoint.path)
    return len(layout)


def _write_model(
    directory: Path,
    stem: str,
    hf_config: Mapping[str, Any],
    layout: Layout,
    read: Callable[[str], Tensor],
    tokenizer_from: Path,
) -> dict[str, str]:
    """What both kinds of directory hold: weights, config and tokenizer. Returns the hashes of the weights."""
    hashes = write_tensors(directory, stem, layout, read)
    write_text(directory / "config.json", json.dumps(hf_config, indent=2, ensure_ascii=False) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, directory / name)
    return hashes


def stored_as(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`hf_config` of weights in `dtype`: transformers 4 and 5 spell the field differently, and read either."""
    return {**hf_config, "dtype" if "dtype" in hf_config else "torch_dtype": str(dtype).removeprefix("torch.")}


def weights_hash(layout: Layout, hashes: Mapping[str, str]) -> str:
    """One hash for all weights, whatever order or shards they are stored in."""
    lines = (f"{name} {layout[name][0]} {tuple(layout[name][1])} {hashes[name]}\n" for name in sorted(layout))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
