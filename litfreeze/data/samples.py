"""Records to samples: tokens, what of them is learned, and which are kept for validation.

What happens to a record that cannot teach is decided here, and counted in `Counts`."""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Union

import numpy as np

from litfreeze.data.args import DataArgs, TextArgs
from litfreeze.data.formats import USED_KEYS, Message, to_conversation
from litfreeze.data.hf_datasets import is_dataset, is_on_hub, training_splits
from litfreeze.data.prompt import Prompt, Segment
from litfreeze.data.records import Record, data_files, read_records
from litfreeze.data.shelf import IGNORE, Filling, Sample, Shelf, learned_of, lengths_of
from litfreeze.errors import UsageError
from litfreeze.tokenizer import Tokenizer

VAL_SPLIT = 0.1  # share of the records kept for validation unless said
SHOWN = 3  # bad records that are told with their places
MOST_CLASSES = 12  # shown to a person
MAX_SEQ_LENGTH = 1024  # tokens, where neither --data.max_seq_length nor the model says less
AT_ONCE = 1000  # records, or
CHARACTERS = 2_000_000  # of them, that are text in memory together


@dataclass
class Counts:
    """What became of the records of one file or folder.

    Attributes:
        read: Records found, blank lines aside.
        bad: Not readable as the format, skipped.
        empty: Left out, a response or the text being blank.
        cut: Longer than `max_seq_length`, cut at the end.
        dropped: Longer than `max_seq_length`, left out.
        untargeted: Left out, nothing to learn being left (in a cut sample, say).
        unused_keys: Keys of records that no format looks at, such as a label beside a text.
        samples: What remains. Plain text becomes windows, so that this is not the rest of a subtraction.
        lengths: How many records have so many tokens, before anything is cut.
        split: Of a set with splits, the one that was read.
        problems: Of the first bad records, where they stand and what is wrong.
    """

    read: int = 0
    bad: int = 0
    empty: int = 0
    cut: int = 0
    dropped: int = 0
    untargeted: int = 0
    samples: int = 0
    unused_keys: set[str] = field(default_factory=set)
    lengths: Counter[int] = field(default_factory=Counter)
    split: Optional[str] = None
    problems: list[str] = field(default_factory=list)

    def describe(self) -> str:
        told = {
            "bad (skipped)": self.bad,
            "empty (left out)": self.empty,
            "over-long (cut)": self.cut,
            "over-long (dropped)": self.dropped,
            "with nothing to learn (left out)": self.untargeted,
        }
        odd = "".join(f", {count:,} {what}" for what, count in told.items() if count)
        unused = ", ".join(sorted(self.unused_keys)[:6])
        split = f" of the split {self.split}" if self.split else ""
        return f"{_plural(self.read, 'record')}{split}{odd}{f' (not used of them: {unused})' if unused else ''}"

    def met(self, record: Record, error: UsageError) -> None:
        """Counts a bad record."""
        self.bad += 1
        if len(self.problems) < SHOWN:
            self.problems.append(f"{record.source}: {error}")

    def refuse_bad(self) -> None:
        """Raises UsageError about bad records, if there are any."""
        if self.bad:
            more = f" (and {self.bad - SHOWN:,} more)" if self.bad > SHOWN else ""
            raise UsageError(
                f"{_plural(self.bad, 'bad record')}: {'; '.join(self.problems)}{more}.\n"
                "Mend them, or leave them out with --data.bad_records skip."
            )


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
        told = f"{_plural(tokens, 'token')}, {learned:,} of them learned"
        classes = ""
        if self.labels:
            told = _plural(tokens - len(self.train), "token")  # a class stands in the place of the last one
            found = Counter(self.labels[sample.labels[-1]] for sample in self.train).most_common()
            each = [f"{label} ({count:,})" for label, count in found]
            each[MOST_CLASSES - 1 : -1] = ["…"] if len(each) > MOST_CLASSES else each[MOST_CLASSES - 1 : -1]
            classes = f"\n{len(self.labels)} classes: {', '.join(each)}."
        return (
            f"Read {read}.\n"
            f"{_plural(len(self.train), 'sample')} for training ({told}), {len(self.val):,} for validation{unused}."
            f"{classes}"
        )

    def unname(self) -> None:
        """No other process needs them: what lies in files is gone when this one ends."""
        for part in (self.train, self.val):
            if isinstance(part, Shelf):
                part.numbers.unname()


def max_length(args: Union[DataArgs, TextArgs], block_size: int) -> int:
    """The most tokens of a sample for a model of `block_size` positions. Raises UsageError if it has fewer than asked
    for."""
    length = args.max_seq_length or min(block_size, MAX_SEQ_LENGTH)
    if length > block_size:
        raise UsageError(f"--data.max_seq_length {length} is more than the {block_size} positions this model has.")
    return length


def load_samples(args: DataArgs, tokenizer: Tokenizer, prompt: Prompt, max_seq_length: int) -> Samples:
    """Read the data, make samples of it and split them.

    A record with messages is one sample of at most `max_seq_length` tokens. Plain texts are put one after another, each
    with BOS before it (where the tokenizer adds one) and EOS behind it, and cut into windows of `max_seq_length` + 1
    tokens; a window begins with the last token of the one before, so that every token is learned once.

    Of a set with splits, `hf_datasets.training_splits` says which are taken. Else, without `args.val_path`,
    `random.Random(args.seed)` draws round(n * val_split_fraction) samples for validation, at least one, leaving at
    least one for training. A fraction of 0 keeps none.

    Raises:
        UsageError: Data is missing, unreadable or bad (first three places named), or nothing usable is left.
    """
    if max_seq_length < 2:
        raise UsageError(f"--data.max_seq_length is {max_seq_length}; a sample needs at least 2 tokens.")

    def read(path: Path, split: Optional[str]) -> tuple[Shelf, Counts]:
        return _read_samples(path, split, args, tokenizer, prompt, max_seq_length)

    return read_and_split(args, read)


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


def some_at_once(records: Iterable[Record]) -> Iterator[list[Record]]:
    """`records` a good many at a time, so that not all of them are text in memory."""
    some: list[Record] = []
    size = 0
    for record in records:
        some.append(record)
        size += sum(len(value) for value in record.fields.values() if isinstance(value, str))
        if len(some) == AT_ONCE or size > CHARACTERS:
            yield some
            some, size = [], 0
    yield some


def subset_of(args: DataArgs, path: Path) -> Optional[str]:
    """The subset to read of `path`, the data's own or that of validation: both have the one that is named, if both are
    sets on the Hub."""
    return args.subset if path == args.path or is_on_hub(path) else None


def files_behind(args: DataArgs) -> list[Path]:
    """The files that all records come from. Raises what `data_files` raises."""
    paths = [path for path in (args.path, args.val_path) if path is not None]
    return [file for path in paths for file in data_files(path, subset_of(args, path))]


def filling(path: Path, args: DataArgs) -> Filling:
    """For the samples of `path`, of which a sample's numbers take about twice the bytes of its text."""
    expected = sum(file.stat().st_size for file in data_files(path, subset_of(args, path)))
    return Filling(args.keep, args.keep_dir, expected)


def _read_samples(
    path: Path, split: Optional[str], args: DataArgs, tokenizer: Tokenizer, prompt: Prompt, max_seq_length: int
) -> tuple[Shelf, Counts]:
    counts = Counts(split=split)
    made = filling(path, args)
    windows = Windows(tokenizer, max_seq_length)
    for some in some_at_once(read_records(path, subset_of(args, path), split)):
        conversations: list[tuple[list[Segment], str]] = []
        texts: list[tuple[str, str]] = []
        for record in some:
            counts.read += 1
            try:
                if record.problem:
                    raise UsageError(record.problem)
                conversation = to_conversation(record.fields, args.format)
                counts.unused_keys |= record.fields.keys() - USED_KEYS
                if not all(text.strip() for text in _responses(conversation)):
                    counts.empty += 1
                elif isinstance(conversation, str):
                    texts.append((conversation, record.source))
                else:
                    conversations.append((prompt.segments(conversation), record.source))
            except UsageError as error:
                counts.met(record, error)
        if counts.bad and args.bad_records == "stop":
            continue  # only to count the others
        for sample in _conversation_samples(conversations, args, tokenizer, max_seq_length, counts):
            made.add(sample)
        for sample in windows.of(texts, counts):
            made.add(sample, late=True)
    if args.bad_records == "stop":
        counts.refuse_bad()
    for sample in windows.rest():
        made.add(sample, late=True)
    counts.samples = len(made)
    if not counts.samples:
        raise UsageError(f"{path} leaves nothing to learn from: {counts.describe()}.")
    return made.shelf(), counts


def _responses(conversation: list[Message] | str) -> list[str]:
    if isinstance(conversation, str):
        return [conversation]
    return [message["content"] for message in conversation if message["role"] == "assistant"]


def _conversation_samples(
    conversations: Sequence[tuple[list[Segment], str]],
    args: DataArgs,
    tokenizer: Tokenizer,
    max_seq_length: int,
    counts: Counts,
) -> Iterator[Sample]:
    openings = tokenizer.encode_batch([segments[0][0] for segments, _ in conversations])
    others = [text for segments, _ in conversations for text, _ in segments[1:]]
    encoded = iter(tokenizer.encode_batch(others, continues=True))
    for (segments, source), opening in zip(conversations, openings, strict=True):
        tokens, labels = [], []
        response = None
        for i, (_, learned) in enumerate(segments):
            ids = opening if i == 0 else next(encoded)
            if learned and response is None:
                response = (len(tokens), min(len(tokens) + len(ids), max_seq_length))
            tokens += ids
            labels += ids if learned or not args.mask_prompt else [IGNORE] * len(ids)
        counts.lengths[len(tokens)] += 1
        if len(tokens) > max_seq_length:
            if args.overlong == "drop":
                counts.dropped += 1
                continue
            counts.cut += 1
        tokens, labels = tokens[:max_seq_length], labels[:max_seq_length]
        if all(label == IGNORE for label in labels[1:]):
            counts.untargeted += 1
            continue
        yield Sample(np.array(tokens, np.int32), np.array(labels, np.int32), source, response)


class Windows:
    """Plain texts to windows: what is left of some texts is the beginning of the next window."""

    def __init__(self, tokenizer: Tokenizer, max_seq_length: int) -> None:
        self.tokenizer, self.length = tokenizer, max_seq_length
        self.before = [tokenizer.bos_id] if tokenizer.adds_bos else []
        self.behind = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        self.left = np.empty(0, np.int32)  # tokens, the first of which is the last one of the window before
        self.ends: list[tuple[int, str]] = []  # where in them each text ends, and its source

    def of(self, texts: Sequence[tuple[str, str]], counts: Counts) -> Iterator[Sample]:
        """The windows that are full once `texts`, with their sources, have come."""
        encoded = self.tokenizer.encode_batch([text for text, _ in texts])
        parts, end = [self.left], len(self.left)
        for ids, (_, source) in zip(encoded, texts, strict=True):
            parts.append(np.array([*self.before, *ids, *self.behind], np.int32))
            counts.lengths[len(parts[-1])] += 1
            end += len(parts[-1])
            self.ends.append((end, source))
        tokens, at, text = np.concatenate(parts), 0, 0
        while at + self.length < len(tokens):
            while self.ends[text][0] <= at:
                text += 1
            yield self._sample(tokens[at : at + self.length + 1], text)
            at += self.length
        self.left = tokens[at:].copy()
        self.ends = [(end - at, source) for end, source in self.ends if end > at]

    def rest(self) -> Iterator[Sample]:
        """The last window, if anything is left to learn."""
        if len(self.left) > 1:
            yield self._sample(self.left, 0)

    def _sample(self, window: np.ndarray, text: int) -> Sample:
        return Sample(window, window, self.ends[text][1], (0, len(window)))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
