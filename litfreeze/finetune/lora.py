"""`litfreeze finetune lora`: train an adapter on chosen layers, or go on with one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

from litfreeze.data.args import DataArgs
from litfreeze.freeze.args import FrozenArgs, RateArgs, ThawArgs
from litfreeze.freeze.layers import Layers, Names
from litfreeze.place import PlaceArgs
from litfreeze.train.args import SEED, EvalArgs, LogArgs, TrainArgs

LoggerName = Literal["auto", "csv", "tensorboard", "wandb", "mlflow"]


def setup(
    checkpoint_dir: Optional[Path] = None,
    out_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    force_base: bool = False,
    resume: Union[bool, Path] = False,
    task: Literal["language", "classification"] = "language",
    trainable_layers: Layers = None,
    lora_targets: Names = None,
    lora_r: Optional[int] = None,
    lora_alpha: Optional[float] = None,
    lora_dropout: Optional[float] = None,
    use_rslora: Optional[bool] = None,
    use_dora: Optional[bool] = None,
    lora_plus_ratio: Optional[float] = None,
    full_layers: Layers = None,
    trainable_extra: Names = None,
    full_lr_ratio: float = 0.1,
    lora_resize: bool = False,
    merge_first: bool = False,
    untie_embeddings: bool = False,
    data: DataArgs = DataArgs(),
    train: TrainArgs = TrainArgs(),
    eval: EvalArgs = EvalArgs(),
    logger_name: LoggerName = "auto",
    log: LogArgs = LogArgs(),
    thaw: ThawArgs = ThawArgs(),
    rates: RateArgs = RateArgs(),
    frozen: FrozenArgs = FrozenArgs(),
    place: PlaceArgs = PlaceArgs(),
    seed: int = SEED,
):
    """Train a LoRA adapter on the layers you name, beside the frozen weights. Given an adapter, go on training it.

    Args:
        checkpoint_dir: A model (litfreeze or Hugging Face), which gets a new adapter; or an adapter (litfreeze or
            PEFT), which goes on training with its own rank, alpha and targets. Without it, the embedded demo model.
        out_dir: Where the run is written; by default a new folder `out/finetune/lora`.
        base_dir: The base of an adapter, where it is not where it was.
        force_base: Accept a base with other weights than the adapter was trained on.
        resume: Go on with an interrupted run: its folder, or the newest one if none is named. It keeps its options.
            auto goes on in --out_dir or, where nothing was kept yet, begins: for jobs that may be put back in a queue.
        task: Learn to write, or to tell the class of a text: classification puts a new head in place of the language
            model's, with a logit for each label in the data, and trains it in full beside the adapter.
        trainable_layers: Blocks that get an adapter: 10,11  0-3,8  -2:  last:8  20%-80%  all; rank:spectrum:4 for
            the best 4 of litfreeze rank. By default all those that do not train in full.
        lora_targets: Linear layers inside them: q_proj,v_proj ...; attn, mlp; a glob; re:...; all (the default). head
            stands outside the blocks.
        lora_r: Rank, 8 unless said.
        lora_alpha: The update is scaled by alpha / r; 16 unless said.
        lora_dropout: On what goes into the adapter; 0.05 unless said.
        use_rslora: Scale by alpha / sqrt(r), so that high ranks learn as fast as low ones.
        use_dora: Also learn the length of each row of the adapted weights (DoRA).
        lora_plus_ratio: LoRA+: B learns at this many times the learning rate of A, 1 unless said; 16 is its authors'
            choice.
        full_layers: Blocks that train in full, beside the adapter on others.
        trainable_extra: What trains in full outside the blocks: embed, head, final_norm.
        full_lr_ratio: Weights that train in full learn at this many times the learning rate.
        lora_resize: Let lora_r make a continued adapter's rank larger; what it computes stays the same.
        merge_first: Fold the adapter given into its base, and begin a new one over that.
        untie_embeddings: Give a head that is tied to the embedding a copy of its own.
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
        seed: Fixes the new adapter, the order of the records and every other draw.
    """
    given = dict(locals())

    from litfreeze.launch import launch
    from litfreeze.train.run import run

    fabric, job = made(given)
    return launch(fabric, run, job)


def made(given: Mapping[str, Any]):
    """The Fabric and the `Job` that the options `given` of `setup` come to, so that they can be looked at before
    anything starts. Raises UsageError for all that the words themselves, the checkpoint and a ranking refuse."""
    from litfreeze.finetune.adapter import begin, default_lr
    from litfreeze.finetune.setting import job_of, open_base, ranked_layers, settled
    from litfreeze.finetune.task import for_task

    o = settled(setup, "lora", given)
    opened = open_base(o.checkpoint_dir, o.untie_embeddings, o.base_dir, o.force_base)
    o, opened, of_task = for_task(o, opened)
    o, ranked = ranked_layers(o, opened)
    checkpoint, plan, notes = begin(opened, o)
    lr, about_lr = default_lr(opened, o)
    return job_of("lora", setup, o, checkpoint, plan, lr, save="delta", notes=(*of_task, *notes, *ranked, *about_lr))
