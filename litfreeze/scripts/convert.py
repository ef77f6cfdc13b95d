"""`litfreeze convert`: foreign checkpoint formats, in and out."""

from pathlib import Path
from typing import Optional


def from_hf(checkpoint_dir: Path, out_dir: Path) -> Path:
    """Convert a Hugging Face directory to a litfreeze checkpoint, one tensor at a time. Dtypes are kept.

    Args:
        checkpoint_dir: A Hugging Face directory: config.json, weights (safetensors or .bin) and tokenizer.
        out_dir: The litfreeze directory to write.
    """
    from litfreeze.checkpoint.directory import open_checkpoint, write_checkpoint
    from litfreeze.errors import UsageError

    source = open_checkpoint(checkpoint_dir)
    if source.manifest is not None:
        raise UsageError(f"{checkpoint_dir} already is a litfreeze checkpoint.")
    source.tokenizer()  # an absent or broken tokenizer is told before anything is written
    layout = source.layout()
    base = {"kind": "base", "source": str(Path(checkpoint_dir).resolve())}
    write_checkpoint(Path(out_dir), source.hf_config, layout, source.read, base, source.path)
    print(f"{out_dir}: {len(layout)} tensors from {checkpoint_dir}.")
    print(f"Next: litfreeze finetune full --checkpoint_dir {out_dir} --trainable_layers -2:")
    return Path(out_dir)


def to_hf(checkpoint_dir: Optional[Path] = None, out_dir: Path = Path("out/hf")) -> Path:
    """Convert a litfreeze checkpoint to a Hugging Face directory that transformers, vLLM and others load.

    Args:
        checkpoint_dir: A litfreeze checkpoint; without it, the embedded demo model.
        out_dir: The Hugging Face directory to write.
    """
    from litfreeze.checkpoint.directory import open_checkpoint, write_hf
    from litfreeze.demo import MODEL_DIR

    count = write_hf(Path(out_dir), open_checkpoint(checkpoint_dir or MODEL_DIR))
    print(f"{out_dir}: {count} tensors. AutoModelForCausalLM.from_pretrained({str(out_dir)!r}) loads it.")
    return Path(out_dir)
