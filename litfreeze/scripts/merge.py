"""`litfreeze merge_lora` and `litfreeze merge_delta`: what trained, folded into its base."""

from pathlib import Path
from typing import Literal, Optional, Union

Dtype = Literal["float32", "bfloat16", "float16"]


def merge_lora(
    checkpoint_dir: Union[str, list[str], None] = None,
    out_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    scale: float = 1.0,
    weights: Union[str, float, list[float], None] = None,
    dtype: Optional[Dtype] = None,
    force_base: bool = False,
) -> Path:
    """Fold an adapter into its base: a checkpoint of its own, for generate, finetune and convert to_hf.

    Computed in fp32 and rounded once, a few rows at a time, whatever the model's size.

    Args:
        checkpoint_dir: An adapter (litfreeze or PEFT), or several over the same base, as a,b; without it, the last
            output of finetune lora.
        out_dir: The checkpoint to write; by default beside the adapter, with -merged behind its name.
        base_dir: The base, where it is not where it was.
        scale: Times the change: 1 merges it as it was trained, 0.5 half of it.
        weights: One for each of several adapters, as 0.7,0.3; each is added with its weight.
        dtype: Write in this dtype in place of the base's; float32 rounds nothing away.
        force_base: Accept a base with other weights than the adapter was trained on.
    """
    from litfreeze.checkpoint.open import TRAINED, open_checkpoint, paths_of
    from litfreeze.errors import UsageError
    from litfreeze.outputs import last_checkpoint

    paths = paths_of(checkpoint_dir) or [str(last_checkpoint("lora", TRAINED))]
    shares = _shares(weights, scale, paths)
    parts = [open_checkpoint(path, base_dir, force_base) for path in paths]
    for part in parts:
        if part.lora is None:
            what = "holds what trained, without an adapter: litfreeze merge_delta makes it whole"
            raise UsageError(f"{part.path} {what if part.base else 'is a whole model, with no adapter to merge'}.")
    settings = " and ".join(part.lora.describe() for part in parts)
    return _merge(parts, shares, out_dir or _beside(paths[0], "-merged"), dtype, settings)


def merge_delta(
    checkpoint_dir: Optional[Path] = None,
    out_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    dtype: Optional[Dtype] = None,
    force_base: bool = False,
) -> Path:
    """Make a checkpoint that holds only what trained whole: its base's weights beside its own.

    Args:
        checkpoint_dir: What `--save delta` wrote, or a best or step-... of a run; without it, the last such output.
        out_dir: The checkpoint to write; by default beside it, with -whole behind its name.
        base_dir: The base, where it is not where it was.
        dtype: Write in this dtype in place of the base's.
        force_base: Accept a base with other weights than it was trained on.
    """
    from litfreeze.checkpoint.open import TRAINED, open_checkpoint
    from litfreeze.errors import UsageError
    from litfreeze.outputs import last_checkpoint

    path = Path(checkpoint_dir) if checkpoint_dir is not None else last_checkpoint("full", TRAINED)
    part = open_checkpoint(path, base_dir, force_base)
    if part.base is None:
        raise UsageError(f"{path} holds all its weights already.")
    if part.lora is not None:
        raise UsageError(f"{path} is an adapter: litfreeze merge_lora --checkpoint_dir {path} folds it in.")
    return _merge([part], [1.0], out_dir or _beside(path, "-whole"), dtype, f"{len(part.tensors)} tensors")


def _merge(parts: list, shares: list[float], out_dir: Path, dtype: Optional[str], what: str) -> Path:
    import shlex

    import torch

    from litfreeze.checkpoint.merge import fold, write_merged

    out_dir = Path(out_dir)
    merged = fold(parts, shares, getattr(torch, dtype) if dtype else None)
    merged.tokenizer()  # an absent or broken one is told before anything is written
    rounding = write_merged(out_dir, merged)
    names = " and ".join(
        str(part.path) + (f" (times {share:g})" if share != 1 else "")
        for part, share in zip(parts, shares, strict=True)
    )
    print(f"Merged    {names}: {what}")
    print(f"Base      {parts[0].base.path}")
    if merged.config.tie_embeddings != parts[0].config.tie_embeddings:
        print("Head      adapted, so it has weights of its own now and is no longer tied to the embedding.")
    print(rounding.describe(merged).replace("Rounding ", "Rounding  ", 1))
    if rounding.error > 1e-3 and dtype != "float32":
        print("          --dtype float32 keeps all of it, in a larger file.")
    place = shlex.quote(str(out_dir))
    print(f"Written   {out_dir}")
    ask = "classify --text" if merged.config.labels else "generate --prompt"
    print(f"Next      litfreeze {ask.replace(' ', f' --checkpoint_dir {place} ')} Hello")
    print(f"          litfreeze convert to_hf --checkpoint_dir {place} --out_dir {shlex.quote(f'{out_dir}-hf')}")
    return out_dir


def _beside(path: Union[str, Path], ending: str) -> Path:
    """`path` with `ending` behind its name, also where it is `.` or `..`."""
    path = Path(path)
    path = path if path.name not in ("", "..") else path.resolve()
    return path.with_name(f"{path.name}{ending}")


def _shares(weights: Union[str, float, list[float], None], scale: float, paths: list[str]) -> list[float]:
    """What each adapter's change is multiplied by."""
    from math import isfinite

    from litfreeze.errors import UsageError

    if weights is None:
        if len(paths) > 1:
            raise UsageError(
                f"--checkpoint_dir names {len(paths)} adapters: say how much of each, as --weights 0.7,0.3."
            )
        shares = [1.0]
    else:
        try:
            parts = weights.split(",") if isinstance(weights, str) else weights
            shares = [float(part) for part in (parts if isinstance(parts, (list, tuple)) else [parts])]
        except ValueError:
            raise UsageError(f"--weights {weights} are no numbers. Write one for each adapter, as 0.7,0.3.") from None
    if len(shares) != len(paths):
        raise UsageError(f"--weights gives {len(shares)} for {len(paths)} adapters.")
    if not all(isfinite(share * scale) for share in shares):
        raise UsageError("--weights and --scale must be plain numbers.")
    return [share * scale for share in shares]
