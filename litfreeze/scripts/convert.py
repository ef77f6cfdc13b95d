"""`litfreeze convert`: foreign checkpoint formats, in and out."""

from pathlib import Path
from typing import Optional


def from_hf(checkpoint_dir: Path, out_dir: Path) -> Path:
    """Convert a Hugging Face directory to a litfreeze checkpoint, one tensor at a time. Dtypes are kept.

    Args:
        checkpoint_dir: A Hugging Face directory: config.json, weights (safetensors or .bin) and tokenizer.
        out_dir: The litfreeze directory to write.
    """
    from litfreeze.checkpoint.directory import open_checkpoint
    from litfreeze.checkpoint.hub import origin
    from litfreeze.checkpoint.write import write_checkpoint
    from litfreeze.errors import UsageError

    source = open_checkpoint(checkpoint_dir)
    if source.manifest is not None:
        raise UsageError(f"{checkpoint_dir} already is a litfreeze checkpoint.")
    if source.lora is not None:
        raise UsageError(f"{checkpoint_dir} is an adapter: litfreeze convert from_peft takes it.")
    source.tokenizer()  # an absent or broken tokenizer is told before anything is written
    layout = source.layout()
    base = {"kind": "base", "source": origin(source.path) or str(source.path.resolve())}
    write_checkpoint(Path(out_dir), source.hf_config, layout, source.read, base, source.path)
    print(f"{out_dir}: {len(layout)} tensors from {checkpoint_dir}.")
    task = "--task classification " if source.config.labels else ""
    print(f"Next: litfreeze finetune full {task}--checkpoint_dir {out_dir} --trainable_layers -2:")
    return Path(out_dir)


def to_hf(
    checkpoint_dir: Optional[Path] = None, out_dir: Path = Path("out/hf"), base_dir: Optional[Path] = None
) -> Path:
    """Convert a litfreeze checkpoint to a Hugging Face directory that transformers, vLLM and others load.

    Args:
        checkpoint_dir: A litfreeze checkpoint; without it, the embedded demo model.
        out_dir: The Hugging Face directory to write.
        base_dir: The base of a checkpoint that holds only what trained, where it is not where it was.
    """
    from litfreeze.checkpoint.directory import open_checkpoint
    from litfreeze.checkpoint.write import write_hf
    from litfreeze.demo import MODEL_DIR

    checkpoint = open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir)
    count = write_hf(Path(out_dir), checkpoint)
    kind = "SequenceClassification" if checkpoint.config.labels else "CausalLM"
    print(f"{out_dir}: {count} tensors. AutoModelFor{kind}.from_pretrained({str(out_dir)!r}) loads it.")
    return Path(out_dir)


def from_peft(checkpoint_dir: Path, out_dir: Path, base_dir: Optional[Path] = None) -> Path:
    """Convert a PEFT adapter to a litfreeze LoRA checkpoint. Its dtypes are kept, and so is what it has beside LoRA.

    Args:
        checkpoint_dir: A PEFT directory: adapter_config.json and adapter_model.safetensors or .bin.
        out_dir: The litfreeze directory to write.
        base_dir: The model that it adapts, where adapter_config.json does not name a directory here.
    """
    from litfreeze.checkpoint.directory import open_checkpoint
    from litfreeze.checkpoint.hub import origin
    from litfreeze.checkpoint.write import write_over_base
    from litfreeze.errors import UsageError

    source = open_checkpoint(checkpoint_dir, base_dir)
    if source.manifest is not None or source.lora is None:
        raise UsageError(f"{checkpoint_dir} is no PEFT adapter: it has a litfreeze.json, or no adapter_config.json.")
    source.tokenizer()  # an absent or broken tokenizer is told before anything is written
    known = {"kind": "lora", "source": origin(source.path) or str(source.path.resolve())}
    write_over_base(Path(out_dir), source, source.tensors, source.dtype, source.read, known)
    print(f"{out_dir}: {source.lora.describe()} on {len(source.lora.ranks)} layers of {source.base.path}.")
    if source.replaced:
        print(f"Beside it {len(source.replaced)} weights stand in place of the base's.")
    print(f"Next: litfreeze merge_lora --checkpoint_dir {out_dir}, or litfreeze finetune lora with it to train on.")
    return Path(out_dir)


def to_peft(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/peft"),
    base_dir: Optional[Path] = None,
    base_name: Optional[str] = None,
) -> Path:
    """Convert a litfreeze LoRA checkpoint to a PEFT adapter, for the Hugging Face form of its base.

    Args:
        checkpoint_dir: A litfreeze LoRA checkpoint.
        out_dir: The PEFT directory to write.
        base_dir: The model that it adapts, where it is not where it was.
        base_name: What PEFT is to call that model; without it, the directory it was converted from.
    """
    from litfreeze.checkpoint.directory import open_checkpoint
    from litfreeze.checkpoint.write import write_peft

    source = open_checkpoint(checkpoint_dir, base_dir)
    settings = write_peft(Path(out_dir), source, base_name)
    base = settings["base_model_name_or_path"]
    print(f"{out_dir}: {source.lora.describe()} for {base}.")
    if Path(base, "litfreeze.json").is_file():
        print(f"PEFT needs that base as Hugging Face's: litfreeze convert to_hf --checkpoint_dir {base}")
    classes = len(source.config.labels)
    model = f"AutoModelForCausalLM.from_pretrained({base!r})"
    if classes:
        model = f"AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels={classes})"
    print(f"PeftModel.from_pretrained({model}, {str(out_dir)!r}) loads it.")
    return Path(out_dir)
