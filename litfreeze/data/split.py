"""Which samples are for training and which for validation."""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from litfreeze.data.args import DataArgs
from litfreeze.data.counts import Counts, plural, printable
from litfreeze.data.hf_datasets import is_dataset, is_on_hub, training_splits
from litfreeze.data.records import data_files
from litfreeze.data.shelf import Sample, Shelf, learned_of, lengths_of
from litfreeze.errors import UsageError

VAL_SPLIT = 0.1  # share of the records kept for validation unless said
MOST_CLASSES = 12  # shown to a person


@dataclass
class Samples:
    """Training and validation samples, each in the order of the files.

    Attributes:
        counts: Of the training data, before a part of it was split off.
        val_counts: Of validation data from files of their own, else None.
        val_unused: Validation samples left out to save time.
        labels: The classes, if samples are texts with one of them each (data/classes.py).
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    counts: Counts
    val_counts: Counts | None = None
    val_unused: int = 0
    labels: tuple[str, ...] = ()

    def describe(self) -> str:
        """Two lines for a person: what was read, and what it became; of a classifier's, one more for the classes."""
        read = self.counts.describe()
        if self.val_counts is not None:
            read += f"; validation: {self.val_counts.describe()}"
        unused = f" ({self.val_unused:,} more are not used: --eval.max_samples)" if self.val_unused else ""
        tokens, learned = int(lengths_of(self.train).sum()), int(learned_of(self.train).sum())
        told = f"{plural(tokens, 'token')}, {learned:,} of them learned"
        classes = ""
        if self.labels:
            told = plural(tokens - len(self.train), "token")  # a class stands in the place of the last one
            found = Counter(self.labels[sample.labels[-1]] for sample in self.train).most_common()
            each = [f"{printable(label)} ({count:,})" for label, count in found]
            each[MOST_CLASSES - 1 : -1] = ["…"] if len(each) > MOST_CLASSES else each[MOST_CLASSES - 1 : -1]
            classes = f"\n{len(self.labels)} classes: {', '.join(each)}."
        return (
            f"Read {read}.\n"
            f"{plural(len(self.train), 'sample')} for training ({told}), {len(self.val):,} for validation{unused}."
            f"{classes}"
        )

    def unname(self) -> None:
        """No other process needs them: what lies in files is gone when this one ends."""
        for part in (self.train, self.val):
            if isinstance(part, Shelf):
                part.numbers.unname()


def read_and_split(
    args: DataArgs,
    read: Callable[[Path, Optional[str]], tuple[Shelf, Counts]],
    kind: Optional[Callable[[Sample], int]] = None,
) -> Samples:
    """The samples that `read` makes of a file or folder, or of a split of a set, split as `load_samples` says. Of each
    `kind` of sample, one at least stays for training, though validation may get fewer then."""
    if args.path is None:
        raise UsageError("No data was given; name a file or folder with --data.")
    fraction = VAL_SPLIT if args.val_split_fraction is None else args.val_split_fraction
    if not 0 <= fraction < 1:
        raise UsageError(f"--data.val_split_fraction is {fraction}; it should be from 0 to below 1.")
    if args.val_path is not None and args.val_split_fraction is not None:
        raise UsageError("--data.val_path and --data.val_split_fraction both choose validation records; keep one.")
    split, val_split = splits_of(args)
    samples, counts = read(args.path, split)
    if args.val_path is not None or val_split is not None:
        val, val_counts = read(args.val_path or args.path, val_split)
        return Samples(samples, val, counts, val_counts)
    if fraction == 0:
        return Samples(samples, [], counts)
    if len(samples) == 1:
        raise UsageError(
            f"{args.path} gives a single sample, which cannot be split into training and validation; "
            "use --data.val_path, --data.val_split_fraction 0 to train without validation, or (for plain text) "
            "a smaller --data.max_seq_length."
        )
    order = array("q", range(len(samples)))
    random.Random(args.seed).shuffle(order)
    n_val = min(max(round(len(samples) * fraction), 1), len(samples) - 1)
    kinds = [0] * len(samples) if kind is None else list(map(kind, samples))
    left, kept = Counter(kinds), np.zeros(len(samples), np.bool_)
    for i in order:
        if n_val and left[kinds[i]] > 1:
            left[kinds[i]] -= 1
            kept[i] = True
            n_val -= 1
    return Samples(samples.chosen(np.flatnonzero(~kept)), samples.chosen(np.flatnonzero(kept)), counts)


def splits_of(args: DataArgs) -> tuple[Optional[str], Optional[str]]:
    """The splits to train and to validate on, None for what is no set with splits or where a part is split off. Raises
    UsageError for options that contradict each other or the data, and what `hf_datasets.rows` raises."""
    if args.val_split is not None and args.val_split_fraction is not None:
        raise UsageError("--data.val_split and --data.val_split_fraction both choose validation records; keep one.")
    if args.val_path is None and not is_dataset(args.path):
        if args.val_split is not None:
            given = f"--data.val_split {args.val_split}"
            raise UsageError(f"{given} is for Hugging Face datasets, and {args.path} is not one.")
        return args.split, None
    if args.val_path is None:
        own = args.val_split_fraction is not None
        return training_splits(args.path, args.subset, args.split, args.val_split, own)
    split, val_split = args.split, args.val_split
    if is_dataset(args.path):
        split, _ = training_splits(args.path, args.subset, split, None, True)
    if val_split is None and is_dataset(args.val_path):
        _, val_split = training_splits(args.val_path, subset_of(args, args.val_path), None, None, False)
    return split, val_split


def subset_of(args: DataArgs, path: Path) -> Optional[str]:
    """The subset to read of `path`, the data's own or that of validation: both have the one that is named, if both are
    sets on the Hub."""
    return args.subset if path == args.path or is_on_hub(path) else None


def other_than(args: DataArgs, path: Path) -> Optional[Path]:
    """Of the records to learn and those to validate on, where the others are: a file of theirs that lies in the folder
    `path` is theirs alone."""
    both = args.path, getattr(args, "val_path", None)
    return next((other for other in both if other is not None and other != path), None)


def files_behind(args: DataArgs) -> list[Path]:
    """The files that all records come from. Raises what `data_files` raises."""
    paths = [path for path in (args.path, args.val_path) if path is not None]
    return [file for path in paths for file in data_files(path, subset_of(args, path), other_than(args, path))]
