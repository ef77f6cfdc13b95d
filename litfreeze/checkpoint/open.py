"""Opening a checkpoint directory of any kind.

A litfreeze directory holds
    config.json             the Hugging Face config, so that identity has one spelling
    litfreeze.json          what this directory is: kind, hashes, base, prompt, how it was trained
    litfreeze.safetensors   all weights under our names (so that no other tool takes them for its own), or in its place
    trained.safetensors     only those that trained, an adapter's among them; the rest is read from the base
    tokenizer.json …        as they came
Hugging Face and PEFT directories are opened the same way; their tensors are renamed and re-laid as they are read."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Union

import torch

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.convert.hf import HFTensors
from litfreeze.checkpoint.convert.peft import PEFTTensors
from litfreeze.checkpoint.convert.peft_config import PEFT_CONFIG
from litfreeze.checkpoint.hub import located, origin
from litfreeze.checkpoint.manifest import MANIFEST, STEMS, TRAINED, WHOLE, read_manifest
from litfreeze.checkpoint.tensors import TensorDirectory, same_bits, sha256
from litfreeze.config import Config, language_config
from litfreeze.errors import LitfreezeError, UsageError
from litfreeze.hub import is_hub_name
from litfreeze.json_file import read_json
from litfreeze.lora import LoRA, is_lora, linear_layers, model_parameters


def paths_of(checkpoint_dir: Union[str, Path, list[str], None]) -> list[str]:
    """'a,b' and ['a', 'b'] are two checkpoints; a directory whose own name has a comma is one; None is none. Raises
    UsageError for an empty name."""
    if checkpoint_dir is None:
        return []
    if isinstance(checkpoint_dir, (list, tuple)):
        paths = [str(path) for path in checkpoint_dir]
    else:
        text = str(checkpoint_dir)
        paths = [part.strip() for part in text.split(",")]
        with suppress(OSError):  # of a name that is too long
            paths = [text] if Path(text).is_dir() else paths
    if not paths or "" in paths:
        raise UsageError("--checkpoint_dir has an empty part.")
    return [str(Path(path).expanduser()) for path in paths]


def open_checkpoint(path: Path | str, base_dir: Optional[Path | str] = None, force_base: bool = False) -> Checkpoint:
    """Opens a litfreeze, Hugging Face or PEFT directory and checks that its tensors are those its config asks for.
    ORG/NAME or ORG/NAME@REVISION that is no directory here is a model on the Hugging Face Hub, or in its cache.

    One that holds only what trained is opened over its base: `base_dir`, or where its manifest says. A base with other
    weights than it was trained on is refused unless `force_base`. Reads headers only (and a tied head that is stored
    all the same, an embedding or head beside a PEFT adapter, and a Hugging Face base whose files are not those on
    record). Raises UsageError naming the file and what is wrong with it."""
    path = located(path)
    here = False
    with suppress(OSError):  # a name that is too long, say
        here = path.is_dir()
    if not here and path.suffix == ".gguf":
        raise UsageError(f"{path} is no directory. litfreeze convert from_gguf {path} DIR makes one of a GGUF file.")
    if not here:
        raise UsageError(
            f"{path} is no directory here. A checkpoint is a litfreeze, Hugging Face or PEFT directory, or a model on "
            "the Hugging Face Hub: ORG/NAME."
        )
    if not (path / MANIFEST).is_file() and (path / PEFT_CONFIG).is_file():
        return _open_peft(path, base_dir)
    if not (path / "config.json").is_file():
        raise UsageError(f"{path} has no config.json, so it is no checkpoint.{_nearby(path)}")
    stored_config = read_json(path / "config.json")
    hf_config = language_config(stored_config, str(path / "config.json"))
    config = Config.from_hf(hf_config, str(path / "config.json"))
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
    if manifest is not None and manifest.get("holds") == TRAINED:
        return _open_over_base(path, hf_config, config, manifest, base_dir, force_base)
    if base_dir is not None or force_base:
        option = "--force_base" if base_dir is None else f"--base_dir {base_dir}"
        raise UsageError(f"{option}: {path} holds all its weights and needs no base.")
    shapes = _shapes(config)
    if manifest is None:
        tensors = HFTensors(path, config, stored_config["model_type"], shapes)
        return Checkpoint(path, path, hf_config, config, tensors, {name: tensors.dtype(name) for name in tensors})
    stored = TensorDirectory(path, [f"{STEMS[WHOLE]}.safetensors"])
    _check_shapes(stored, shapes)
    if missing := [name for name in shapes if name not in stored]:
        raise UsageError(f"{path}: tensor {missing[0]} is missing from its weights.")
    if unknown := [name for name in shapes if name not in manifest["tensors"]]:
        raise UsageError(f"{path / MANIFEST} has no hash of {unknown[0]}: it is damaged.")
    dtypes = {name: stored.layout(name)[0] for name in stored}
    return Checkpoint(path, path, hf_config, config, stored, dtypes, manifest)


def _open_over_base(
    path: Path,
    hf_config: dict[str, Any],
    config: Config,
    manifest: dict[str, Any],
    base_dir: Optional[Path | str],
    force_base: bool,
) -> Checkpoint:
    """A directory that holds what trained, and what it was trained over."""
    lora = None
    if manifest.get("lora") is not None:
        try:
            lora = LoRA.from_dict(manifest["lora"])
            unknown = set(lora.ranks) - set(linear_layers(config))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError(f"{path / MANIFEST}: its adapter's settings are damaged.") from None
        if unknown:
            raise UsageError(f"{path / MANIFEST}: this model has no linear layer {min(unknown)} to adapt.")
    shapes = _shapes(config, lora)
    stored = TensorDirectory(path, [f"{STEMS[TRAINED]}.safetensors"])
    _check_shapes(stored, shapes)
    if missing := [name for name in shapes if name not in stored and (is_lora(name) or name in manifest["tensors"])]:
        raise UsageError(f"{stored.path}: tensor {missing[0]} is missing from its weights.")
    for name in stored:
        if sha256(stored[name], stored.layout(name)[0]) != manifest["tensors"].get(name):
            raise UsageError(f"{stored.files[name].path}: {name} is damaged: its sha256 is not the one on record.")
    base = open_beneath(path, manifest, base_dir, force_base)
    expected = config
    if config.labels and not base.config.labels:  # a classifier over a language model, whose head it does not need
        expected = replace(config, labels=(), tie_embeddings=base.config.tie_embeddings)
        if "head.weight" not in stored:
            raise UsageError(f"{stored.path}: tensor head.weight is missing from its weights.")
    elif base.config.tie_embeddings and not config.tie_embeddings:
        base = base.untied()
    if base.config != expected:
        raise UsageError(f"{base.path} has another shape than the model that {path} was trained on.")
    dtypes = {name: stored.layout(name)[0] for name in stored}
    return Checkpoint(path, path, hf_config, config, stored, dtypes, manifest, base=base, lora=lora)


def identity(checkpoint: Checkpoint, seen_from: Path) -> dict[str, Any]:
    """What a checkpoint in `seen_from` keeps to find and to recognise its base again.

    The sizes and times of the base's files stand in for reading all of its weights every time."""
    path = checkpoint.path.resolve()
    on_hub = origin(path)
    return {
        **({} if on_hub is None else {"hub": on_hub}),
        "path": str(path),
        "from_here": os.path.relpath(path, seen_from.resolve()),
        "weights_hash": checkpoint.weights_hash,
        "files": _stamps(path),
    }


def open_beneath(path: Path, manifest: Mapping[str, Any], base_dir: Optional[Path | str], force: bool) -> Checkpoint:
    """The base that the manifest of `path` names, or `base_dir`, once it is known for the one trained on."""
    known = manifest.get("base")
    words = ("path", "from_here", "weights_hash")
    if not isinstance(known, dict) or not all(isinstance(known.get(word), str) for word in words):
        raise UsageError(f"{path / MANIFEST} names no base: it is damaged.")
    # What moved along with the checkpoint comes before what stands where the base once was
    places = [located(base_dir)] if base_dir is not None else [path / known["from_here"], Path(known["path"])]
    places = list(dict.fromkeys(place.resolve() for place in places if _has_config(place)))
    if base_dir is None and path.resolve() in places:
        places.remove(path.resolve())
    if base_dir is None and not places and is_hub_name(known.get("hub", "")):
        places = [located(known["hub"])]
    if not places and base_dir is not None:
        raise UsageError(f"--base_dir {base_dir} is no checkpoint.")
    needed = manifest.get("holds") == TRAINED  # else it is looked for, and no option can name another
    if not places and not needed:
        raise UsageError(f"{path} was trained from {known['path']}, which is no longer there.")
    if not places:
        raise UsageError(
            f"{path} holds only what trained, over {known['path']}, which is no longer there. "
            "Name the base's directory with --base_dir."
        )
    refused = []
    for place in places:
        base = open_checkpoint(place)
        if base.base is not None:
            raise UsageError(
                f"--base_dir {place} itself holds only what trained. Name the base under it, {base.base.path}."
            )
        on_record = base.manifest or known  # a Hugging Face directory has no record of its own
        same_files = known.get("files") == _stamps(place)
        found = on_record["weights_hash"] if same_files else base.hash_of_contents()
        if force or found == known["weights_hash"]:
            return base
        refused.append(f"{place} is not the base that {path} was trained on (its weights have sha256 {found[:16]}…, ")
    advice = " Name that one with --base_dir, or insist with --force_base." if needed else ""
    raise UsageError(f"{refused[0]}not {known['weights_hash'][:16]}…).{advice}")


def began_from(checkpoint: Checkpoint) -> Optional[Checkpoint]:
    """What a checkpoint stands over, or was trained from or merged into; None if that is nothing. Raises LitfreezeError
    if it is not there any more."""
    manifest = checkpoint.manifest or {}
    if checkpoint.base is not None or "base" not in manifest:
        return checkpoint.base
    return open_beneath(checkpoint.path, manifest, None, False)


def _has_config(place: Path) -> bool:
    """Whether a checkpoint may be there. What a file names as a place can be anything."""
    with suppress(OSError):  # a name that is too long, say
        return (place / "config.json").is_file()
    return False


def _stamps(path: Path) -> dict[str, list[int]]:
    """Size and time of change (ns) of the files that weights can stand in."""
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _open_peft(path: Path, base_dir: Optional[Path | str]) -> Checkpoint:
    """An adapter as PEFT saves it. It names its base, and has no hash of it."""
    settings = read_json(path / PEFT_CONFIG)
    named = settings.get("base_model_name_or_path")
    place = Path(base_dir) if base_dir is not None else Path(named) if isinstance(named, str) and named else None
    if place is not None and not _has_config(place):
        revision = settings.get("revision")
        word = f"{place}@{revision}" if base_dir is None and isinstance(revision, str) else place
        try:
            place = located(word)
        except LitfreezeError as error:
            raise type(error)(f"{path} is an adapter; its base {error} --base_dir names another place.") from None
    if place is None or not _has_config(place):
        what = f"--base_dir {base_dir}" if base_dir is not None else f"its base, {named!r},"
        raise UsageError(f"{path} is an adapter, and {what} is no directory here. Name the base with --base_dir.")
    base = open_checkpoint(place)
    if base.base is not None:
        raise UsageError(
            f"--base_dir {place} itself holds only what trained. Name the base under it, {base.base.path}."
        )
    tensors = PEFTTensors(path, settings, base.config, base.in_transformers)
    if base.config.tie_embeddings and not tensors.tied:
        base = base.untied()
    for name in {"embed.weight", "head.weight"} & set(tensors):  # PEFT saves a head's weight with its adapter, unasked
        if same_bits(tensors[name], base.read(name), torch.promote_types(tensors.dtype(name), base.dtype(name))):
            del tensors.found[name]
    dtypes = {name: tensors.dtype(name) for name in tensors}
    brought = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer_dir = path if brought else base.tokenizer_dir
    return Checkpoint(path, tokenizer_dir, base.hf_config, base.config, tensors, dtypes, base=base, lora=tensors.lora)


def _shapes(config: Config, lora: Optional[LoRA] = None) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model_parameters(config, lora).items()}


def _nearby(path: Path) -> str:
    """Where the checkpoint may be instead: people name the run's folder in place of its `final`."""
    inside = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
    near = "final" if "final" in inside else inside[0] if inside else None
    return f" Did you mean {path / near}?" if near else ""


def _check_shapes(stored: TensorDirectory, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(stored):
        if name not in shapes:
            raise UsageError(f"{stored.files[name].path}: tensor {name} has no place in this model.")
        found, asked = list(stored.layout(name)[1]), list(shapes[name])
        if found != asked:
            raise UsageError(f"{stored.files[name].path}: {name} has shape {found}; config.json asks for {asked}.")
