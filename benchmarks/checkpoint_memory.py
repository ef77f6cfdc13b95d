"""How much memory converting and merging take: python benchmarks/checkpoint_memory.py [--gigabytes 3]

Makes a Llama-shaped bf16 checkpoint of random weights in a temporary folder, converts it there and back and merges a
LoRA and a DoRA adapter of every linear layer into it, each in a process of its own, and prints the peak of resident
memory beside that of an interpreter that only imports the same modules. Mapped pages of the files count as resident.
Exits 1 if a conversion took more than the largest tensor plus the allowance over that interpreter, a merge more than
four times the largest tensor plus the allowance, or if a weight came back changed."""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAD_SIZE = 64


def config(gigabytes: float, width: int) -> dict:
    """As many blocks as fill `gigabytes`; the embedding, 64 * width * width, is the largest tensor."""
    vocab_size, wide = 64 * width, 4 * width
    block_bytes = 2 * width * (2 * width + 2 * (width // 4) + 3 * wide)
    blocks = (gigabytes * 1e9 - 2 * vocab_size * width) / block_bytes
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": wide,
        "num_hidden_layers": max(1, int(blocks) + 1),
        "num_attention_heads": width // HEAD_SIZE,
        "num_key_value_heads": width // HEAD_SIZE // 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


# --- each step, in a process of its own ------------------------------------------------------------------------------


def make(path: Path, gigabytes: float, width: int) -> None:
    """A Hugging Face directory in several shards, written one tensor at a time."""
    import torch
    from tokenizers import Tokenizer, models

    from litfreeze.checkpoint.convert.hf import as_hf
    from litfreeze.checkpoint.tensors import write_tensors
    from litfreeze.config import Config
    from litfreeze.model import meta_parameters

    fields = config(gigabytes, width)
    shape = Config.from_hf(fields)
    ours = {name: (torch.bfloat16, tuple(p.shape)) for name, p in meta_parameters(shape).items()}
    layout, _ = as_hf(shape, "llama", ours, ours.__getitem__)
    path.mkdir()
    write_tensors(
        path,
        "model",
        layout,
        lambda name: torch.randn(layout[name][1], dtype=torch.bfloat16),
        max_shard_bytes=int(gigabytes * 1e9 / 4),
    )
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))


def import_only() -> None:
    import litfreeze.checkpoint.merge
    import litfreeze.scripts.convert
    import litfreeze.scripts.merge  # noqa: F401


def convert(command: str, source: Path, out: Path) -> None:
    from litfreeze.scripts import convert

    getattr(convert, command)(source, out)


def adapter(base_dir: Path, out: Path, dora: bool) -> None:
    """A rank-16 adapter that does something, on every linear layer of the blocks."""
    import torch

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.checkpoint.write import write_over_base
    from litfreeze.freeze.words import adapter_targets
    from litfreeze.lora import LoRA, fresh_tensors, linear_layers

    base = open_checkpoint(base_dir)
    targets = adapter_targets(base.config, "all", "all")
    lora = LoRA(dict.fromkeys(targets, 16), dict.fromkeys(targets, 32.0), dora=dora)
    layers = linear_layers(base.config)
    fresh = fresh_tensors(lora, layers, lambda module: base.read(f"{module}.weight"), seed=0)
    adapted = base.with_lora(lora, {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in fresh.items()})
    write_over_base(out, adapted, adapted.tensors, adapted.dtype, adapted.read, {"kind": "lora"})


def merge(source: Path, out: Path) -> None:
    from litfreeze.scripts.merge import merge_lora

    merge_lora(str(source), out)


def compare(source: Path, back: Path) -> None:
    """Exits with a message unless both hold the same tensors."""
    from litfreeze.checkpoint.tensors import TensorDirectory, sha256

    one, other = (TensorDirectory(path, ["model.safetensors"]) for path in (source, back))
    if set(one) != set(other):
        sys.exit("the names of the tensors have changed")
    for name in one:
        if (
            one.layout(name) != other.layout(name)
            or len({sha256(t[name], t.layout(name)[0]) for t in (one, other)}) > 1
        ):
            sys.exit(f"{name} has changed")


def measured(step: str, *arguments: object) -> tuple[float, float]:
    """Runs a function of this file in a new interpreter: its peak of resident memory in MB, and its seconds."""
    start = time.perf_counter()
    words = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1]), time.perf_counter() - start


def run_step(step: str, *words: str) -> None:
    if step == "make":
        make(Path(words[0]), float(words[1]), int(words[2]))
    elif step == "import":
        import_only()
    elif step == "adapter":
        adapter(Path(words[0]), Path(words[1]), words[2] == "DoRA")
    elif step == "merge":
        merge(Path(words[0]), Path(words[1]))
    elif step == "compare":
        compare(Path(words[0]), Path(words[1]))
    else:
        convert(step, Path(words[0]), Path(words[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    print(peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024))


# --- the table -------------------------------------------------------------------------------------------------------


def main(gigabytes: float, width: int, allowance: int) -> int:
    largest = 2 * 64 * width * width / 1e6
    with tempfile.TemporaryDirectory() as folder:
        source, ours, back = (Path(folder) / name for name in ("source", "ours", "back"))
        measured("make", source, gigabytes, width)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e6
        floor, seconds = measured("import")
        rows = [("import alone", floor, seconds, 0.0)]
        rows.append(("convert from_hf", *measured("from_hf", source, ours), largest + allowance))
        rows.append(("convert to_hf", *measured("to_hf", ours, back), largest + allowance))
        measured("compare", source, back)
        for kind in ("LoRA", "DoRA"):
            adapted, merged = Path(folder) / kind, Path(folder) / f"{kind}-merged"
            measured("adapter", ours, adapted, kind)
            rows.append((f"merge_lora, {kind}", *measured("merge", adapted, merged), 4 * largest + allowance))
            shutil.rmtree(merged)
    print(f"checkpoint {size:,.0f} MB, largest tensor {largest:,.0f} MB; there and back bit-identical")
    print(f"{'':<16} {'peak MB':>9} {'over import':>12} {'allowed':>9} {'seconds':>8}")
    for name, peak, seconds, allowed in rows:
        print(f"{name:<16} {peak:>9,.0f} {peak - floor:>12,.0f} {allowed:>9,.0f} {seconds:>8.1f}")
    return int(any(peak - floor > allowed for _, peak, _, allowed in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        run_step(*sys.argv[2:])
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--gigabytes", type=float, default=3.2)
        parser.add_argument("--width", type=int, default=1536, help="the model's width, a multiple of 256")
        parser.add_argument("--allowance", type=int, default=300, help="MB over what the tensors take")
        sys.exit(main(**vars(parser.parse_args())))
