"""`litfreeze finetune full`: train the weights themselves, all of them or the chosen layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

from litfreeze.data.args import DataArgs
from litfreeze.freeze.args import FactoryArgs, FrozenArgs, RateArgs, ThawArgs
from litfreeze.freeze.layers import Layers, Names
from litfreeze.place import PlaceArgs
from litfreeze.train.args import SEED, EvalArgs, LogArgs, TrainArgs

LoggerName = Literal["auto", "csv", "tensorboard", "wandb", "mlflow"]


def setup(
    checkpoint_dir: Optional[Path] = None,
    out_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    resume: Union[bool, Path] = False,
    task: Literal["language", "classification"] = "language",
    trainable_layers: Layers = None,
    trainable_modules: Names = None,
    trainable_extra: Names = None,
    untie_embeddings: bool = False,
    factory: FactoryArgs = FactoryArgs(),
    data: DataArgs = DataArgs(),
    train: TrainArgs = TrainArgs(),
    eval: EvalArgs = EvalArgs(),
    logger_name: LoggerName = "auto",
    log: LogArgs = LogArgs(),
    thaw: ThawArgs = ThawArgs(),
    rates: RateArgs = RateArgs(),
    frozen: FrozenArgs = FrozenArgs(),
    place: PlaceArgs = PlaceArgs(),
    save: Literal["full", "delta", "both"] = "full",
    save_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
    seed: int = SEED,
):
    """Fine-tune a model's own weights: the layers you name, or all of them.

    Args:
        checkpoint_dir: A litfreeze or Hugging Face directory, or ORG/NAME on the Hub; else the embedded demo model.
        out_dir: Where the run is written; by default a new folder `out/finetune/full`.
        base_dir: The base of a checkpoint that holds only what trained, where it is not where it was.
        resume: Go on with an interrupted run: its folder, or the newest one if none is named. It keeps its options.
            auto goes on in --out_dir or, where nothing was kept yet, begins: for jobs that may be put back in a queue.
        task: Learn to write, or to tell the class of a text: classification puts a new head in place of the language
            model's, with a logit for each label in the data, and trains it beside what else is named.
        trainable_layers: Blocks to train: 10,11  0-3,8  -2:  last:8  first:4  every:4  20%-80%  new  all  none;
            rank:spectrum:4 for the best 4 of litfreeze rank. By default the whole model trains.
        trainable_modules: Inside those blocks only: attn, mlp, norm, q_proj, ...; a glob; or re:... on full names.
        trainable_extra: Also outside the blocks: embed, head, final_norm.
        untie_embeddings: Give a head that is tied to the embedding a copy of its own.
        factory: LLaMA-Factory's words for what trains.
        data: The records to learn from.
        train: How long and how fast to train.
        eval: When to measure.
        logger_name: Where figures go beside metrics.csv, which is always written: tensorboard (auto is that, if it is
            installed), wandb, mlflow, or nowhere else (csv).
        log: What the run is called by the logger.
        thaw: When blocks train.
        rates: How fast each layer learns.
        frozen: How what is frozen is made cheap.
        place: On which devices, and how.
        save: The final checkpoint as a whole, as a delta (only what trained, over its base), or as both. What is saved
            on the way is always a delta.
        save_dtype: Save in this dtype in place of the base's; float32 keeps the trained masters unrounded.
        seed: Fixes the order of the records and every other draw.
    """
    given = dict(locals())

    from litfreeze.launch import launch
    from litfreeze.train.run import run

    fabric, job = made(given)
    return launch(fabric, run, job)


def made(given: Mapping[str, Any]):
    """The Fabric and the `Job` that the options `given` of `setup` come to, so that they can be looked at before
    anything starts. Raises UsageError for all that the words themselves, the checkpoint and a ranking refuse."""
    import shlex

    import torch

    from litfreeze.checkpoint.classifier import HEAD
    from litfreeze.errors import UsageError
    from litfreeze.finetune.setting import job_of, open_base, ranked_layers, settled
    from litfreeze.finetune.task import HEAD_LR, for_task
    from litfreeze.freeze.words import plan_from_words

    o = settled(setup, "full", given)
    checkpoint = open_base(o.checkpoint_dir, o.untie_embeddings, o.base_dir)
    if checkpoint.lora is not None:
        raise UsageError(
            f"{checkpoint.path} is an adapter. Fold it into its base first (litfreeze merge_lora "
            f"{shlex.quote(str(checkpoint.path))}), or go on with litfreeze finetune lora."
        )
    o, checkpoint, of_task = for_task(o, checkpoint)
    o, ranked = ranked_layers(o, checkpoint)
    plan = plan_from_words(
        checkpoint.config,
        trainable_layers=o.trainable_layers,
        trainable_modules=o.trainable_modules,
        trainable_extra=o.trainable_extra,
        factory=o.factory,
        thaw=o.thaw,
    )
    if o.save != "full" and plan.trained == set(plan.sizes):
        raise UsageError(f"--save {o.save}: everything trains, so that a delta would be the whole. Name some layers.")
    save_dtype = getattr(torch, o.save_dtype) if o.save_dtype else None
    lr = HEAD_LR if checkpoint.config.labels and plan.trained == {HEAD} else 5e-5
    notes = (*of_task, *ranked)
    return job_of("full", setup, o, checkpoint, plan, lr=lr, save=o.save, save_dtype=save_dtype, notes=notes)
