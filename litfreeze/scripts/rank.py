"""`litfreeze rank`: which blocks to train, by their weights or by what they do on your data."""

from pathlib import Path
from typing import Literal, Optional

from litfreeze.choose.words import NEED_DATA, RECORDS, Method
from litfreeze.data.args import DataArgs
from litfreeze.picture import save_picture
from litfreeze.train.args import SEED, TrainArgs


def setup(
    checkpoint_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    method: Method = "spectrum",
    task: Literal["language", "classification"] = "language",
    data: DataArgs = DataArgs(),
    samples: Optional[int] = None,
    micro_batch_size: Optional[int] = None,
    accelerator: str = "auto",
    seed: int = SEED,
    out_json: Optional[Path] = None,
    png: Optional[Path] = None,
):
    """Rank the blocks of a model: which to train first. Nothing is trained.

    `--trainable_layers rank:spectrum:4` in finetune trains the best four at once.

    Args:
        checkpoint_dir: A litfreeze or Hugging Face directory, or ORG/NAME on the Hub; else the embedded demo model.
        base_dir: The base of a checkpoint that holds only what trained, where it is not where it was.
        method: spectrum: the signal-to-noise ratio of the weights (Spectrum). gradient: the loss's gradient on your
            data, relative to the weights. angular: how far a block turns the residual stream (ShortGPT). random: by
            chance. spectrum and random need no data.
        task: What is to be learned from the data: to write, or the class of a text. gradient looks at the loss of that,
            of a new classifier with the head that a run with this seed begins with.
        data: The records that gradient and angular look at.
        samples: How many of them: 64 unless said. They are those that a run with this seed takes first.
        micro_batch_size: Samples in one forward pass: 4 unless said. gradient is a mean over these.
        accelerator: cpu, cuda, mps or auto.
        seed: Fixes which records are looked at, and the ranking of random.
        out_json: Write every figure to this file, module by module.
        png: Draw the scores in this file.
    """
    import shlex

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.choose.rank import MEANINGS, rank
    from litfreeze.choose.sample import draw_batches
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.finetune.setting import with_demo_data
    from litfreeze.finetune.task import fitted
    from litfreeze.freeze.layers import format_layers
    from litfreeze.launch import one_device
    from litfreeze.whole import check_new_file, write_text

    check_new_file("out_json", out_json)
    check_new_file("png", png)
    for option, number in (("samples", samples), ("micro_batch_size", micro_batch_size)):
        if number is not None and number < 1:
            raise UsageError(f"--{option} {number} must be at least 1.")
    if method not in NEED_DATA and (data != DataArgs() or samples is not None or micro_batch_size is not None):
        unused = "--data" if data != DataArgs() else "--samples" if samples is not None else "--micro_batch_size"
        raise UsageError(
            f"{unused}: {method} looks at no data. Leave it out, or choose --method {' or '.join(NEED_DATA)}."
        )
    checkpoint = open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir)
    device = one_device(accelerator)[0].device
    batches = None
    named = not isinstance(data, DataArgs) or data.path is not None
    if method in NEED_DATA and checkpoint.lora is None and (named or checkpoint_dir is None):
        data = with_demo_data(data)
        checkpoint, _ = fitted(checkpoint, task, data, seed)
        batches = draw_batches(
            checkpoint, data, samples or RECORDS, micro_batch_size or TrainArgs.micro_batch_size, seed
        )
    ranking = rank(checkpoint, method, seed, device, batches)
    if out_json is not None:
        given = {"checkpoint": str(checkpoint.path), "data": None if batches is None else str(data.path)}
        write_text(Path(out_json), ranking.to_json(**given))
    if png is not None:
        draw(Path(png), ranking, str(checkpoint.path))
    print(f"Ranked    {checkpoint.path}, by {ranking.how()}\n\n{ranking.table()}\n\n{MEANINGS[method]}")
    best = format_layers(ranking.best(max(1, checkpoint.config.n_layer // 4)))
    words = [] if checkpoint_dir is None else ["--checkpoint_dir", str(checkpoint_dir)]
    words += [] if base_dir is None else ["--base_dir", str(base_dir)]
    words += ["--task", "classification"] if task == "classification" or checkpoint.config.labels else []
    if batches is not None and checkpoint_dir is not None:
        chosen = {"": data.path, ".subset": data.subset, ".split": data.split, ".val_split": data.val_split}
        words += [word for name, value in chosen.items() if value for word in (f"--data{name}", str(value))]
    print(f"Next      litfreeze finetune full {shlex.join([*words, '--trainable_layers', best])}")
    return ranking


def draw(path: Path, ranking, title: str) -> None:
    """The scores of a `Ranking` as bars, from the lowest block to the highest, its best quarter in colour: a PNG."""
    from matplotlib.figure import Figure

    depth = len(ranking.scores)
    best = ranking.best(max(1, depth // 4))
    figure = Figure((min(14, 3 + 0.25 * depth), 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(depth), ranking.scores, color=["#1f77b4" if i in best else "#c9d3da" for i in range(depth)])
    axes.set(xlabel="block", ylabel="score")
    axes.set_xticks(range(0, depth, max(1, depth // 24)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{ranking.how()}: {title}", loc="left", fontsize=9, wrap=True)

    save_picture(figure, path)
