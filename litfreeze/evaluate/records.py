"""The scores of a model on the person's own records: those that a run tells of its validation records."""

from collections.abc import Sequence
from dataclasses import replace

from lightning_fabric import Fabric

from litfreeze.data.args import DataArgs
from litfreeze.data.hf_datasets import is_dataset, only_split
from litfreeze.data.prompt import Prompt
from litfreeze.data.shelf import Sample
from litfreeze.errors import UsageError
from litfreeze.evaluate.columns import Column
from litfreeze.finetune.task import KEYS, LANGUAGE, refuse
from litfreeze.model import GPT
from litfreeze.train.feed import Feed
from litfreeze.train.loss import NextToken
from litfreeze.train.outcome import Scores
from litfreeze.train.prepare import read_samples
from litfreeze.train.validate import validate


def read_all(columns: Sequence[Column], data: DataArgs, limit: int | None) -> tuple[list[Sequence[Sample]], str]:
    """The samples that each of `columns` is asked, and what a person is told of them. Raises UsageError for options
    that are about splitting records, or belong to the other task."""
    is_classifier = bool(columns[0].checkpoint.config.labels)
    refuse(
        data, DataArgs(), LANGUAGE if is_classifier else KEYS, "data", "language" if is_classifier else "classification"
    )
    for name in ("val_path", "val_split", "val_split_fraction", "seed"):
        if getattr(data, name) != getattr(DataArgs(), name):
            raise UsageError(f"--data.{name}: evaluate looks at all records of --data. Leave it out.")
    split = only_split(data.path, data.subset) if data.split is None and is_dataset(data.path) else data.split
    everything = replace(data, split=split, val_split_fraction=0)
    found, told = [], []
    for column in columns:
        tokenizer = column.checkpoint.tokenizer()
        prompt = Prompt.choose(data.prompt_style, column.asked_as.prompt, tokenizer, data.prompt_args)
        samples = read_samples(column.checkpoint, everything, tokenizer, prompt)
        found.append(samples.train[:limit])
        told.append(f"{samples.counts.describe()}, {len(found[-1]):,} of them measured")
    if len(set(told)) == 1:
        return found, f"Data      {data.path}: {told[0]}"
    lines = [f"Data      {data.path}, which is not the same to all of them:"]
    return found, "\n".join(lines + [f"          {c.name}: {said}" for c, said in zip(columns, told, strict=True)])


def score(fabric: Fabric, model: GPT, samples: Sequence[Sample], data: DataArgs, micro_batch_size: int) -> Scores:
    """The scores of `model` on `samples`."""
    return validate(fabric, NextToken(model), Feed(fabric, samples, data, share=True), micro_batch_size)
