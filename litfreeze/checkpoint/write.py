"""Writing a checkpoint directory, ours, Hugging Face's or PEFT's: whole or not at all."""

import json
import shutil
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.checkpoint import Checkpoint, weights_hash
from litfreeze.checkpoint.convert.hf import as_hf
from litfreeze.checkpoint.convert.peft import as_peft
from litfreeze.checkpoint.convert.peft_config import PEFT_CONFIG
from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.manifest import FORMAT, MANIFEST, STEMS, TRAINED, WHOLE
from litfreeze.checkpoint.open import identity
from litfreeze.checkpoint.tensors import Layout, write_tensors
from litfreeze.errors import UsageError
from litfreeze.hub import is_hub_name
from litfreeze.tokenizer import TOKENIZER_FILES
from litfreeze.version import __version__
from litfreeze.whole import hash_file, whole_directory, write_text


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
        hashes = _write_model(aside, STEMS[WHOLE], hf_config, layout, read, tokenizer_from)
        return _write_manifest(aside, {**manifest, "holds": WHOLE}, weights_hash(layout, hashes), hashes)


def write_over_base(
    out_dir: Path,
    checkpoint: Checkpoint,
    names: Container[str],
    dtype: Callable[[str], torch.dtype],
    read: Callable[[str], Tensor],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes of `checkpoint` only the tensors `names`, over its base (itself, if it is whole), and its adapter's
    settings. Otherwise as `write_checkpoint`."""
    whole = {name: (dtype(name), shape) for name, (_, shape) in checkpoint.layout().items()}
    layout = {name: entry for name, entry in whole.items() if name in names}
    base, lora = checkpoint.whole, checkpoint.lora
    with whole_directory(Path(out_dir)) as aside:
        hashes = _write_model(aside, STEMS[TRAINED], checkpoint.hf_config, layout, read, checkpoint.tokenizer_dir)
        known = {**manifest, "holds": TRAINED, "base": identity(base, Path(out_dir)), "lora": lora and lora.to_dict()}
        return _write_manifest(aside, known, weights_hash(whole, {**base.tensor_hashes, **hashes}), hashes)


def _write_manifest(
    directory: Path, known: Mapping[str, Any], weights_hash: str, hashes: Mapping[str, str]
) -> dict[str, Any]:
    whole = {
        "format": FORMAT,
        "litfreeze": __version__,
        **known,
        "weights_hash": weights_hash,
        "tensors": hashes,
        "files": {file.name: record_of(file) for file in sorted(directory.iterdir())},
    }
    write_text(directory / MANIFEST, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return whole


def record_of(file: Path) -> dict[str, Any]:
    """Its size and, unless its tensors have hashes of their own, its sha256."""
    size = {"bytes": file.stat().st_size}
    return size if file.suffix == ".safetensors" else {**size, "sha256": hash_file(file)}


def write_hf(out_dir: Path, checkpoint: Checkpoint) -> int:
    """Writes `checkpoint` as a Hugging Face directory, whole or not at all, and returns how many tensors it has.

    Raises UsageError if it has no tokenizer, carries an adapter or `out_dir` already holds something."""
    if checkpoint.lora is not None:
        raise UsageError(
            f"{checkpoint.path} is an adapter beside its base. Fold it in with litfreeze merge_lora first, or write it "
            "for PEFT with litfreeze convert to_peft."
        )
    checkpoint.tokenizer()
    model_type = checkpoint.hf_config["model_type"]
    layout, read = as_hf(checkpoint.config, model_type, checkpoint.layout(), checkpoint.read)
    with whole_directory(Path(out_dir)) as aside:
        _write_model(aside, "model", checkpoint.hf_config, layout, read, checkpoint.tokenizer_dir)
    return len(layout)


def write_peft(out_dir: Path, checkpoint: Checkpoint, base_name: Optional[str] = None) -> dict[str, Any]:
    """Writes the adapter of `checkpoint` for PEFT to load over the Hugging Face form of its base, whole or not at all,
    and returns its adapter_config.json.

    `base_name` is what that calls the base; without it, the model that the base was converted from or, where that is
    none of transformers' own, the base's directory. Raises UsageError if there is no adapter or `out_dir` already holds
    something."""
    if checkpoint.base is None or checkpoint.lora is None:
        raise UsageError(
            f"{checkpoint.path} carries no adapter, and PEFT takes nothing else. "
            "litfreeze convert to_hf writes a whole model for transformers."
        )
    base, replaced = checkpoint.base, set(checkpoint.replaced)
    if base.aliases and "head" in checkpoint.lora.ranks and "head.weight" in replaced:
        # Beneath its adapter an untied head is loaded into PEFT's tied one: the embedding needs a copy of its own
        replaced.add("embed.weight")
    settings, layout, read = as_peft(
        checkpoint.config, base.in_transformers, checkpoint.lora, replaced, checkpoint.layout(), checkpoint.read
    )
    source = (base.manifest or {}).get("source")
    if source is None or Path(source).suffix.lower() == ".gguf":  # which transformers would not take for its own
        source = str(base.path.resolve())
    named = base_name or origin(base.path) or source
    name, _, revision = named.partition("@") if is_hub_name(named) else (named, "", "")
    settings = {"base_model_name_or_path": name, **({"revision": revision} if revision else {}), **settings}
    with whole_directory(Path(out_dir)) as aside:
        write_tensors(aside, "adapter_model", layout, read, max_shard_bytes=sys.maxsize)  # PEFT reads one file
        write_text(aside / PEFT_CONFIG, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        _copy_tokenizer(checkpoint.tokenizer_dir, aside)
    return settings


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
    _copy_tokenizer(tokenizer_from, directory)
    return hashes


def _copy_tokenizer(tokenizer_from: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, directory / name)


def stored_as(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`hf_config` of weights in `dtype`: transformers 4 and 5 spell the field differently, and read either."""
    return {**hf_config, "dtype" if "dtype" in hf_config else "torch_dtype": str(dtype).removeprefix("torch.")}
