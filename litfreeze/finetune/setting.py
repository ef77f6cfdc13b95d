"""What every finetune script does: settle its options, open the checkpoint, and make the job."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

from lightning_fabric import Fabric

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.hub import pinned, seen_from
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.resume import newest_point, points
from litfreeze.choose.rank import Ranking, rank
from litfreeze.choose.sample import draw_batches
from litfreeze.choose.words import NEED_DATA, RECORDS, has_ranks, put_ids
from litfreeze.cli import arguments
from litfreeze.data import hf_datasets
from litfreeze.data.args import DataArgs
from litfreeze.data.hf_datasets import seen_from as data_from
from litfreeze.demo import MODEL_DIR, TRAIN_DEFAULTS, TRAIN_FILE, VAL_FILE
from litfreeze.errors import UsageError
from litfreeze.finetune.recipe import as_fields, by_option, not_default, plain, recipe_yaml, told_to_logger
from litfreeze.freeze.args import FactoryArgs
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.rates import with_rates
from litfreeze.freeze.words import one_of, thawing_from_words
from litfreeze.launch import build_fabric
from litfreeze.outputs import FINAL, last_resumable
from litfreeze.train.args import TrainArgs
from litfreeze.train.job import Job

_ELSEWISE = "--{} {} stands beside --resume, but the run was made with {}. Leave it out, or start a new run."


def settled(script: Callable[..., Any], method: str, options: Mapping[str, Any]) -> SimpleNamespace:
    """The options a run goes by: those given or, with `resume`, those of the interrupted run, whose folder `out_dir` is
    then; `auto` beside an `out_dir` begins there, if nothing is to go on from. Raises UsageError if there is nothing to
    resume, or options are given that could not be honoured."""
    given = SimpleNamespace(**{name: plain(value) for name, value in options.items()})
    if not 0 <= given.seed < 2**32:
        raise UsageError(f"--seed {given.seed} must be from 0 to {2**32 - 1}.")
    for name in ("checkpoint_dir", "base_dir"):
        setattr(given, name, pinned(getattr(given, name)))
    if not given.resume:
        return but(given, anew=False, ranked=None)
    if str(given.resume) == "auto" and given.out_dir is not None:
        run_dir = Path(given.out_dir)
        if not points(run_dir) and not (run_dir / FINAL).is_dir():  # nothing was kept yet, or nothing began
            return but(given, resume=False, anew=True, ranked=None)
    else:
        run_dir = last_resumable(method) if str(given.resume) in ("True", "auto") else Path(given.resume)
    facts = newest_point(run_dir).facts
    if facts.get("method") != method:
        raise UsageError(f"--resume {run_dir} is a run of finetune {facts.get('method')}, not of {method}.")
    own = arguments(f"finetune {method}", script, facts["recipe"])
    folder = Path(facts.get("folder", "."))  # relative paths were meant from there
    for name in ("checkpoint_dir", "base_dir"):
        own[name] = own[name] and seen_from(folder, own[name])
    own["frozen"].cache_dir = own["frozen"].cache_dir and folder / own["frozen"].cache_dir
    for name in ("path", "val_path"):
        setattr(own["data"], name, getattr(own["data"], name) and data_from(folder, getattr(own["data"], name)))
    own["data"].keep_dir = own["data"].keep_dir and folder / own["data"].keep_dir
    defaults = {name: parameter.default for name, parameter in inspect.signature(script).parameters.items()}
    changed = by_option(not_default(vars(given), defaults), defaults)
    group_of = {leaf: name for name, value in own.items() for leaf in by_option({name: as_fields(value)}, defaults)}
    for name, value in changed.items():
        group, leaf = group_of[name], name.rpartition(".")[2]
        kept = getattr(own[group], leaf) if is_dataclass(own[group]) else own[name]
        if name in ("data.path", "data.val_path"):  # where it lies may change; what it holds is compared
            setattr(own["data"], leaf, Path(value))
        elif group == "log" or leaf in getattr(own[group], "exact", ()):
            own[group] = replace(own[group], **{leaf: value})
        elif name in ("base_dir", "logger_name"):
            own[name] = value
        elif name == "trainable_layers" and str(value) == facts.get("ranked"):
            pass  # they were ranked when the run began, and stay
        elif name not in ("resume", "out_dir") and not _same(value, kept):
            raise UsageError(_ELSEWISE.format(name, value, kept))
    if given.out_dir is not None and Path(given.out_dir).resolve() != run_dir.resolve():
        raise UsageError(f"--out_dir {given.out_dir} stands beside --resume {run_dir}, which is where the run goes on.")
    return SimpleNamespace(
        **{**own, "out_dir": run_dir, "resume": run_dir, "anew": False, "ranked": facts.get("ranked")}
    )


def _same(value: Any, kept: Any) -> bool:
    """Whether an option given beside --resume says what the run's own does."""
    if isinstance(kept, Path):
        return Path(value).resolve() == kept.resolve()
    return str(value) == str(kept)


def open_base(
    checkpoint_dir: Optional[Path],
    untie_embeddings: bool = False,
    base_dir: Optional[Path] = None,
    force_base: bool = False,
) -> Checkpoint:
    """The checkpoint to start from, the embedded demo model if none is named."""
    checkpoint = open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir, force_base)
    return checkpoint.untied() if untie_embeddings else checkpoint


def but(options: SimpleNamespace, **changed: Any) -> SimpleNamespace:
    """`options` with some of them `changed`."""
    return SimpleNamespace(**{**vars(options), **changed})


def ranked_layers(options: SimpleNamespace, checkpoint: Checkpoint) -> tuple[SimpleNamespace, list[str]]:
    """The options with block ids in the place of `rank:spectrum:4` in `trainable_layers`, so that the run and its
    recipe know ids alone, with the words in `ranked`; and what the person is told about it, nothing where there is no
    ranking.

    A method that needs data looks at the records the run learns from first. Raises UsageError for words that mean
    nothing, and where another option says which blocks train."""
    if not has_ranks(options.trainable_layers):
        return options, []
    theirs = getattr(options, "factory", FactoryArgs())
    others = {name: getattr(theirs, name) for name in ("freeze_trainable_layers", "freeze_trainable_layers_ids")}
    one_of(trainable_layers=options.trainable_layers, unfreeze=options.thaw.unfreeze, **others)
    config = checkpoint.config
    ranked = partial(ranking, options, checkpoint)
    layers, told = put_ids(options.trainable_layers, config.n_layer, config.new_blocks, ranked)
    return but(options, trainable_layers=layers, ranked=str(options.trainable_layers)), told


def ranking(options: SimpleNamespace, checkpoint: Checkpoint, method: str) -> Ranking:
    """The blocks of `checkpoint` by `method`, on the records that a run with these options learns from first."""
    batches, seed = None, options.seed
    if method in NEED_DATA:
        data = with_demo_data(options.data)
        batches = draw_batches(checkpoint, data, RECORDS, options.train.micro_batch_size, seed)
    return rank(checkpoint, method, seed, build_fabric(options.place)[0].device, batches)


def job_of(
    method: str,
    script: Callable[..., Any],
    options: SimpleNamespace,
    checkpoint: Checkpoint,
    plan: FreezePlan,
    lr: float,
    **more: Any,
) -> tuple[Fabric, Job]:
    """A `Job` of the options that every script has and of `more`, and the devices they ask for to run it on."""
    options = but(options, data=with_pins(options.data))
    data, train = with_demo_defaults(options.checkpoint_dir, options.data, options.train, lr, epochs=3)
    fabric, precision = build_fabric(options.place)
    chosen = {**vars(options), "train": train, "place": replace(options.place, precision=precision.name)}
    job = Job(
        method=method,
        checkpoint=checkpoint,
        plan=with_rates(plan, options.rates, train.lr),
        precision=precision,
        data=data,
        train=train,
        eval=options.eval,
        out_dir=options.out_dir and Path(options.out_dir),
        seed=options.seed,
        recipe=recipe_yaml(script, chosen),
        frozen=options.frozen,
        compile=options.place.compile,
        logger_name=options.logger_name,
        log=options.log,
        settings=told_to_logger(script, chosen),
        thawing=thawing_from_words(plan.config, options.thaw, options.seed),
        resume=bool(options.resume),
        anew=options.anew,
        ranked=options.ranked,
        **more,
    )
    return fabric, job


def with_demo_defaults(
    checkpoint_dir: Optional[Path], data: Union[DataArgs, Path, str], train: TrainArgs, lr: float, epochs: int
) -> tuple[DataArgs, TrainArgs]:
    """Fills in what was left open: the embedded utterances, and `lr` and `epochs` (of the demo, for its model)."""
    data = with_demo_data(data)
    settled = {"lr": lr, "epochs": epochs, **(TRAIN_DEFAULTS if checkpoint_dir is None else {})}
    if train.max_steps is not None:
        settled.pop("epochs")  # the steps say how long
    return data, replace(train, **{name: value for name, value in settled.items() if getattr(train, name) is None})


def with_demo_data(data: Union[DataArgs, Path, str]) -> DataArgs:
    """The embedded utterances, if no data is named. A bare path stands for `DataArgs(path)`."""
    data = data if isinstance(data, DataArgs) else DataArgs(path=Path(data))
    if data.path is not None:
        return data
    own_split = data.val_path is not None or data.val_split_fraction is not None
    return replace(data, path=TRAIN_FILE, val_path=data.val_path if own_split else VAL_FILE)


def with_pins(data: Union[DataArgs, Path, str]) -> DataArgs:
    """`data` with the commits of sets on the Hub, so that they mean the same later on. Raises what reading them
    does."""
    data = data if isinstance(data, DataArgs) else DataArgs(path=Path(data))
    path = data.path and hf_datasets.pinned(Path(data.path), data.subset)
    return replace(data, path=path, val_path=data.val_path and hf_datasets.pinned(Path(data.val_path), data.subset))
