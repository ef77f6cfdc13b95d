"""Records to samples: tokens, and what of them is learned.

What happens to a record that cannot teach is decided here, and counted in `Counts`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np

from litfreeze.data.args import DataArgs, TextArgs
from litfreeze.data.counts import Counts, given
from litfreeze.data.filling import Filling
from litfreeze.data.formats import Message, to_conversation, used_keys
from litfreeze.data.prompt import Prompt, Segment
from litfreeze.data.records import Record, data_files, passed_over, read_records
from litfreeze.data.shelf import IGNORE, Sample, Shelf
from litfreeze.data.split import Samples, other_than, read_and_split, subset_of
from litfreeze.errors import UsageError
from litfreeze.sizes import megabytes
from litfreeze.tokenizer import Tokenizer

MAX_SEQ_LENGTH = 1024  # tokens, where neither --data.max_seq_length nor the model says less
AT_ONCE = 1000  # records, or
CHARACTERS = 2_000_000  # of them, that are text in memory together
LARGE = 10**8  # bytes of a file, from which on it is told if memory has to hold it as a whole


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


def filling(path: Path, args: DataArgs, counts: Counts) -> Filling:
    """For the samples of `path`, of which a sample's numbers take about twice the bytes of its text. What memory has to
    hold as a whole is told in `counts`."""
    sizes = {file: file.stat().st_size for file in data_files(path, subset_of(args, path), other_than(args, path))}
    counts.passed_over = passed_over(path, list(sizes))
    for file, size in sizes.items():
        if size > LARGE and file.suffix.lower() in (".json", ".txt"):
            counts.whole = f"{file.name}, {megabytes(size)},"
    return Filling(args.keep, args.keep_dir, sum(sizes.values()))


def _read_samples(
    path: Path, split: Optional[str], args: DataArgs, tokenizer: Tokenizer, prompt: Prompt, max_seq_length: int
) -> tuple[Shelf, Counts]:
    counts = Counts(split=split)
    made = filling(path, args, counts)
    windows = Windows(tokenizer, max_seq_length)
    for some in some_at_once(read_records(path, subset_of(args, path), split, other_than(args, path))):
        conversations: list[tuple[list[Segment], str]] = []
        texts: list[tuple[str, str]] = []
        for record in some:
            counts.read += 1
            try:
                if record.problem:
                    raise UsageError(record.problem)
                conversation = to_conversation(record.fields, args.format)
                counts.unused_keys |= given(record.fields) - used_keys(record.fields, args.format)
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
        for sample in _conversation_samples(conversations, args, prompt, max_seq_length, counts):
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
    prompt: Prompt,
    max_seq_length: int,
    counts: Counts,
) -> Iterator[Sample]:
    openings = prompt.encode([segments[0][0] for segments, _ in conversations])
    others = [text for segments, _ in conversations for text, _ in segments[1:]]
    encoded = iter(prompt.tokenizer.encode_batch(others, continues=True))
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
