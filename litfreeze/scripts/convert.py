"""`litfreeze convert`: foreign checkpoint formats, in and out."""

from pathlib import Path
from typing import Literal, Optional


def from_hf(checkpoint_dir: Path, out_dir: Path) -> Path:
    """Convert a Hugging Face directory to a litfreeze checkpoint, one tensor at a time. Dtypes are kept.

    Args:
        checkpoint_dir: A Hugging Face directory: config.json, weights (safetensors or .bin) and tokenizer.
        out_dir: The litfreeze directory to write.
    """
    from litfreeze.checkpoint.hub import origin
    from litfreeze.checkpoint.open import open_checkpoint
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
    if source.in_transformers != source.hf_config["model_type"]:
        base["source_type"] = source.in_transformers
    write_checkpoint(Path(out_dir), source.hf_config, layout, source.read, base, source.path)
    print(f"{out_dir}: {len(layout)} tensors from {checkpoint_dir}.")
    if left := source.tensors.left_out:
        print(f"Left out: {len(left)} tensors for pictures. What is here is the language model.")
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
    from litfreeze.checkpoint.open import open_checkpoint
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
    from litfreeze.checkpoint.hub import origin
    from litfreeze.checkpoint.open import open_checkpoint
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
        base_name: What PEFT is to call that model; without it, the directory it was converted from, or its own.
    """
    from litfreeze.checkpoint.open import open_checkpoint
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


def from_gguf(
    gguf_file: Path, out_dir: Path, dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None
) -> Path:
    """Convert a GGUF file, llama.cpp's, to a litfreeze checkpoint: weights, tokenizer and chat template.

    Args:
        gguf_file: The file.
        out_dir: The litfreeze directory to write.
        dtype: What all weights are stored in. Without it F32, F16 and BF16 stay what they are, and quantised weights
            become bfloat16, whose rounding is far below that of four bits. float32 keeps them exactly.
    """
    import tempfile

    import torch

    from litfreeze.checkpoint.convert.gguf import GGUFTensors
    from litfreeze.checkpoint.convert.gguf_file import GGUFFile
    from litfreeze.checkpoint.convert.gguf_tokenizer import write_tokenizer
    from litfreeze.checkpoint.write import stored_as, write_checkpoint
    from litfreeze.tokenizer import Tokenizer

    file = GGUFFile(Path(gguf_file))
    tensors = GGUFTensors(file, dtype and getattr(torch, dtype))
    hf_config = stored_as(tensors.hf_config, tensors.dtype("embed.weight"))
    base = {"kind": "base", "source": str(Path(gguf_file).resolve())}
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), file.metadata, file.path)
        Tokenizer.from_dir(folder)  # what is wrong with it is told before anything is written
        write_checkpoint(Path(out_dir), hf_config, tensors.layout, tensors.read, base, Path(folder))
    kinds = sorted({place.kind.name for place in file.places.values()})
    print(f"{out_dir}: {len(tensors.layout)} tensors from {gguf_file} ({', '.join(kinds)}).")
    print(f"Next: litfreeze finetune full --checkpoint_dir {out_dir} --trainable_layers -2:")
    return Path(out_dir)


def to_gguf(
    checkpoint_dir: Optional[Path] = None,
    out_file: Path = Path("out/model.gguf"),
    dtype: Optional[Literal["f32", "f16", "bf16", "q8_0", "q4_0"]] = None,
    base_dir: Optional[Path] = None,
) -> Path:
    """Convert a litfreeze checkpoint to a GGUF file that llama.cpp, Ollama and others run, tokenizer included.

    Args:
        checkpoint_dir: A litfreeze or Hugging Face checkpoint; without it, the embedded demo model.
        out_file: The file to write.
        dtype: What matrices are stored in; without it, as they are. Vectors are always f32. With q4_0 the head is q8_0.
        base_dir: The base of a checkpoint that holds only what trained, where it is not where it was.
    """
    from litfreeze.checkpoint.convert.gguf import as_gguf
    from litfreeze.checkpoint.convert.gguf_file import write_gguf
    from litfreeze.checkpoint.convert.gguf_tokenizer import STRIPPING, tokenizer_metadata
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError

    source = open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir)
    if source.lora is not None:
        raise UsageError(
            f"{source.path} is an adapter beside its base. Fold it in first: litfreeze merge_lora "
            f"--checkpoint_dir {source.path}."
        )
    out_file = Path(out_file)
    model = as_gguf(source.config, source.hf_config, source.layout(), source.read, dtype)
    tokenizer, told = tokenizer_metadata(source.tokenizer_dir, source.tokenizer(), source.config.vocab_size)
    name = STRIPPING.sub("phi 3", out_file.stem)  # a file's name must not change how texts are tokenized
    metadata = {"general.name": name, **model.metadata, **tokenizer}
    write_gguf(out_file, model.arch, metadata, model.layout, model.read)
    kinds = sorted({kind.name for kind, _ in model.layout.values()})
    print(f"{out_file}: {len(model.layout)} tensors ({', '.join(kinds)}), {out_file.stat().st_size / 1e6:,.1f} MB.")
    for line in (*model.told, *told):
        print(f"Note: {line}")
    print(f"Next: llama-cli -m {out_file}")
    return out_file
