"""`litfreeze data show`: records as the model will see them."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from litfreeze.data.args import DataArgs
from litfreeze.train.args import SEED, TrainArgs

if TYPE_CHECKING:
    from litfreeze.data.shelf import Shelf

FIRST: list[int] = []


def show(
    checkpoint_dir: Optional[Path] = None,
    data: DataArgs = DataArgs(),
    task: Literal["language", "classification"] = "language",
    n: int = 3,
    index: list[int] = FIRST,
    png: Optional[Path] = None,
) -> None:
    """Print some records as the model will see them, what of them is learned, and how long all of them are.

    What is learned stands in green on a terminal, elsewhere (or if NO_COLOR is set) between \u27e6 and \u27e7.

    Args:
        checkpoint_dir: Whose tokenizer and prompt style: a litfreeze or Hugging Face directory, or ORG/NAME on the Hub;
            else the embedded demo model.
        data: As in finetune.
        task: As in finetune.
        n: How many records to print; long ones without their middle.
        index: Print these in place of the first ones, and whole: lines or rows, as errors name them (data.jsonl:17 is
            17).
        png: Write a picture of the lengths there.
    """
    import os
    import sys

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.data.prompt import Prompt
    from litfreeze.data.samples import max_length
    from litfreeze.data.show import Colours, describe_lengths, draw_lengths, numbered, record
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.finetune.setting import with_demo_data
    from litfreeze.finetune.task import fitted
    from litfreeze.train.prepare import read_samples
    from litfreeze.whole import check_new_file

    if n < 0:
        raise UsageError(f"--n {n} must be at least 0.")
    check_new_file("png", png, ".png")
    data = with_demo_data(data)
    checkpoint, _ = fitted(open_checkpoint(checkpoint_dir or MODEL_DIR), task, data, SEED)
    labels, tokenizer = checkpoint.config.labels, checkpoint.tokenizer()
    prompt = Prompt.choose(data.prompt_style, checkpoint.prompt, tokenizer, data.prompt_args)
    samples = read_samples(checkpoint, data, tokenizer, prompt)
    chosen = numbered(samples.train + samples.val, index) if index else samples.train[:n]
    colours = Colours(sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for sample in chosen:
        print(record(sample, tokenizer, labels, colours, whole=bool(index)) + "\n")
    limit = max_length(data, checkpoint.config.block_size)
    prompted = not labels and bool(samples.train.prompts.any())
    print(f"Data      {samples.describe().replace(chr(10), chr(10) + ' ' * 10)}")
    if not labels:
        print(f"          {f'Prompt style: {prompt.style}.' if prompted else 'Plain text.'}")
    print("\n" + describe_lengths(samples, limit, data, prompted or bool(labels)))
    if prompted:
        print(shared_share(samples.train, data))
    if png is not None:
        draw_lengths(Path(png), samples.counts.lengths, limit)
        print(f"Written   {png}")


def shared_share(samples: "Shelf", data: DataArgs) -> str:
    """How many tokens are spared where records of a micro-batch begin alike, in some of those that a run has first."""
    from litfreeze.data.batches import build_batch, epoch_order

    size = TrainArgs.micro_batch_size
    order = epoch_order(len(samples), SEED, 0)[: 250 * size]
    cut = [list(order[start : start + size]) for start in range(0, len(order), size)]
    rows = sum(build_batch(samples, indices).tokens.numel() for indices in cut)
    tokens = int((samples.chosen(order).lengths - 1).sum())
    if rows == tokens:
        return "No records of a micro-batch begin alike."
    off = "" if data.packing == "on" and data.share_prompts else " (--data says to compute them all the same)"
    spared = f"{100 * (1 - rows / tokens):.1f} %"
    return f"Records that begin alike spare {spared} of the tokens in micro-batches of {size}{off}."
