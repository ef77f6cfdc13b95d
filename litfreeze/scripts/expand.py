"""`litfreeze expand`: a deeper model that computes the same, whose new blocks can be trained (LLaMA-Pro)."""

from pathlib import Path
from typing import Optional

from litfreeze.freeze.layers import Layers


def setup(
    checkpoint_dir: Optional[Path] = None,
    out_dir: Path = Path("out/expanded"),
    base_dir: Optional[Path] = None,
    new_blocks: Optional[int] = None,
    after: Layers = None,
) -> Path:
    """Put new blocks into a model that change nothing until they train: LLaMA-Pro's block expansion.

    Each is a copy of the block below it that adds nothing to the residual stream yet. `--trainable_layers new` trains
    exactly these.

    Args:
        checkpoint_dir: A litfreeze or Hugging Face directory, or ORG/NAME on the Hub; else the embedded demo model.
        out_dir: The checkpoint to write.
        base_dir: The base of a checkpoint that holds only what trained, where it is not where it was.
        new_blocks: How many, evenly over the depth, which they must divide: one behind each group of blocks.
        after: The blocks that a new one follows instead, in the words of --trainable_layers: 3,7,11 or every:4.
    """
    import shlex
    from math import prod

    from litfreeze.checkpoint.expand import expand, write_expanded
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.freeze.layers import format_layers, parse_layers, spread
    from litfreeze.freeze.plan import block_of
    from litfreeze.sizes import megabytes

    base = open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir)
    n_layer = base.config.n_layer
    if base.lora is not None:
        raise UsageError(f"{base.path} is an adapter, and new blocks would have none. Merge it first.")
    if after is None and new_blocks is None:
        raise UsageError("--new_blocks says how many blocks to put in, or --after behind which.")
    if after is None:
        chosen = spread(n_layer, new_blocks, "new_blocks")
    else:
        chosen = parse_layers(after, n_layer, "after", base.config.new_blocks)
    if not chosen:
        raise UsageError("--after none leaves the model as it is.")
    if new_blocks not in (None, len(chosen)):
        raise UsageError(f"--new_blocks {new_blocks}, but --after names {len(chosen)} blocks. Keep one of them.")
    if base.config.new_blocks:
        print(
            f"Note      {base.path} has new blocks already, {format_layers(base.config.new_blocks)}. From now on `new` "
        )
        print("          means those of this time.")
    base.tokenizer()  # an absent or broken one is told before anything is written
    deeper = expand(base, chosen)
    write_expanded(Path(out_dir), deeper)
    added = [shape for name, (_, shape) in deeper.layout().items() if block_of(name) in deeper.config.new_blocks]
    size = sum(file.stat().st_size for file in Path(out_dir).glob("*.safetensors"))
    place, new = shlex.quote(str(out_dir)), format_layers(deeper.config.new_blocks)
    print(f"Expanded  {base.path}: {n_layer} blocks are {deeper.config.n_layer}, of which {new} are new.")
    print(f"          They copy blocks {format_layers(chosen)} and add nothing until they train.")
    print(f"          {sum(map(prod, added)):,} parameters more.")
    print(f"Written   {out_dir} ({megabytes(size)})")
    print(f"Next      litfreeze finetune full --checkpoint_dir {place} --trainable_layers new")
    return Path(out_dir)
