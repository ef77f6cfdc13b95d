"""The records of a person's data that a ranking looks at."""

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.data.args import DataArgs
from litfreeze.data.batches import Batch, build_batch, epoch_order
from litfreeze.data.prompt import Prompt
from litfreeze.train.prepare import read_samples


def draw_batches(checkpoint: Checkpoint, data: DataArgs, count: int, micro_batch_size: int, seed: int) -> list[Batch]:
    """The first `count` training records (or all, if there are fewer) in the order in which a run with this `seed`
    takes them, as micro-batches. Nothing is computed once for several of them, so that each token counts as one.

    Raises UsageError for all that a run would refuse in the data."""
    tokenizer = checkpoint.tokenizer()
    prompt = Prompt.choose(data.prompt_style, checkpoint.prompt, tokenizer, data.prompt_args)
    samples = read_samples(checkpoint, data, tokenizer, prompt).train
    first = list(epoch_order(len(samples), seed, epoch=0)[:count])
    cut = [first[start : start + micro_batch_size] for start in range(0, len(first), micro_batch_size)]
    return [build_batch(samples, indices, data.packing == "on", share=False) for indices in cut]
