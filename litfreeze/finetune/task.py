"""`--task`: what a run learns to do. A classifier begins as a language model with a fresh head, then goes on as one."""

from dataclasses import replace
from types import SimpleNamespace

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.classifier import as_classifier
from litfreeze.data.args import DataArgs
from litfreeze.data.classes import labels_of
from litfreeze.errors import UsageError
from litfreeze.finetune.setting import but, with_demo_data
from litfreeze.freeze.rates import rate_groups
from litfreeze.train.args import EvalArgs

HEAD_LR = 0.005  # of a new head: it begins from nothing, while the blocks already know most of what they will
LANGUAGE = ("format", "prompt_style", "prompt_args", "mask_prompt")  # options of --data about what is written
KEYS = ("text_key", "label_key")


def for_task(options: SimpleNamespace, checkpoint: Checkpoint) -> tuple[SimpleNamespace, Checkpoint, list[str]]:
    """The options of a run and its `checkpoint` as `options.task` needs them, and what the person is told about it: a
    classifier's head has a learning rate of its own in `rates` unless one is given.

    Raises UsageError for options that belong to the other task, and for what `fitted` refuses."""
    if options.task == "classification":
        refuse(options.eval, EvalArgs(), ("max_new_tokens",), "eval", "language")
        if options.untie_embeddings:
            raise UsageError("--untie_embeddings: a classifier's head is its own anyway. Leave it out.")
    as_it_was = bool(checkpoint.config.labels)
    checkpoint, told = fitted(checkpoint, options.task, with_demo_data(options.data), options.seed)
    named = rate_groups(options.rates.layer_lr) if options.rates.layer_lr is not None else []
    has_rate = options.train.lr is not None or any("head" in words for words, _ in named)
    if options.task == "language" or options.checkpoint_dir is None or has_rate:
        return options, checkpoint, told
    rate = HEAD_LR / 2 if as_it_was else HEAD_LR
    layer_lr = ", ".join([*([options.rates.layer_lr] if named else []), f"head:{rate:g}"])
    told.append(f"The head learns at {rate:g} (--layer_lr head:RATE or --train.lr sets another).")
    return but(options, rates=replace(options.rates, layer_lr=layer_lr)), checkpoint, told


def fitted(checkpoint: Checkpoint, task: str, data: DataArgs, seed: int) -> tuple[Checkpoint, list[str]]:
    """`checkpoint` for `task`: as it is, or as a classifier of the training data's classes with a head drawn by `seed`.
    And what the person is told about it.

    Raises UsageError for options of `data` that belong to the other task, a classifier that is to learn language, and
    one whose classes are not those of the data."""
    labels = checkpoint.config.labels
    if task == "language":
        refuse(data, DataArgs(), KEYS, "data", "classification")
        if labels:
            raise UsageError(
                f"{checkpoint.path} is a classifier of {len(labels)} classes. Say --task classification to go on with "
                "it; a language model needs the head that it no longer has."
            )
        return checkpoint, []
    refuse(data, DataArgs(), LANGUAGE, "data", "language")
    found = labels_of(data)
    if not labels:
        return as_classifier(checkpoint, found, seed), [f"As a classifier: a new head for {len(found)} classes."]
    if set(found) != set(labels):
        told = [
            f"{', '.join(map(repr, some[:3]))}{f' and {len(some) - 3} more' if len(some) > 3 else ''} {where}"
            for some, where in (
                (sorted(set(found) - set(labels)), "only in the data"),
                (sorted(set(labels) - set(found)), "only in the classifier"),
            )
            if some
        ]
        raise UsageError(
            f"{checkpoint.path} knows {len(labels)} classes and {data.path} has {len(found)}: {'; '.join(told)}. "
            "Begin again from the language model, or mend the labels."
        )
    return checkpoint, [f"Goes on as a classifier of its {len(labels)} classes."]


def refuse(given: object, defaults: object, names: tuple[str, ...], group: str, task: str) -> None:
    """Options that only `task` has must be as they are by default."""
    for name in names:
        if (value := getattr(given, name)) != getattr(defaults, name):
            raise UsageError(f"--{group}.{name} {value} belongs to --task {task}. Leave one of them out.")
