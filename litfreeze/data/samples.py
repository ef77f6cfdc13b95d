"""Records to samples: tokens, what of them is learned, and which are kept for validation.

What happens to a record that cannot teach is decided here, and counted in `Counts`."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path

import numpy as np

from litfreeze.data.args import DataArgs
from litfreeze.data.formats import USED_KEYS, Message, to_conversation
from litfreeze.data.prompt import Prompt, Segment
from litfreeze.data.records import read_records
from litfreeze.errors import UsageError
from litfreeze.tokenizer import Tokenizer

IGNORE = -100  # the label of a token that is not learned
VAL_SPLIT = 0.1  # share of the records kept for validation unless said
MOST_CLASSES = 12  # shown to a person
MAX_SEQ_LENGTH = 1024  # tokens, where neither --data.max_seq_length nor the model says less


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence to learn from.

    Attributes:
        tokens: (T,) int32, T >= 2.
        labels: (T,) int32, not shifted: the token itself where it is learned, else -100. At least one of `labels[1:]`
            is learned; the first token can be no target, since nothing comes before it.
        source: `file:line` of its record.
        response: Where the first response begins and ends in `tokens`, its end token included, even if every token is
            learned (`mask_prompt` false). All of a plain text is response.
    """

    tokens: np.ndarray
    labels: np.ndarray
    source: str
    response: tuple[int, int]

    @cached_property
    def digest(self) -> bytes:
        """sha256 of the tokens that the model reads: all but the last."""
        return hashlib.sha256(self.tokens[:-1].astype("<i4").tobytes()).digest()

    @property
    def prompt_tokens(self) -> np.ndarray:
        """The tokens before the first response: what to generate it from."""
        return self.tokens[: self.response[0]]

    @property
    def response_tokens(self) -> np.ndarray:
        """The tokens of the first response."""
        return self.tokens[slice(*self.response)]


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
    """

    read: int = 0
    bad: int = 0
    empty: int = 0
    cut: int = 0
    dropped: int = 0
    untargeted: int = 0
    samples: int = 0
    unused_keys: set[str] = field(default_factory=set)

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
        return f"{_plural(self.read, 'record')}{odd}{f' (not used of them: {unused})' if unused else ''}"


@dataclass
class Samples:
    """Training and validation samples, each in the order of the files.

    Attributes:
        counts: Of the training data, before a part of it was split off.
        val_counts: Of validation data from files of their own, else None.
        val_unused: Validation samples left out to save time.
        labels: The classes, if samples are texts with one of them each (data/classes.py).
    """

    train: list[Sample]
    val: list[Sample]
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
        tokens = sum(len(sample.tokens) for sample in self.train)
        learned = sum(int((sample.labels[1:] != IGNORE).sum()) for sample in self.train)
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


def load_samples(args: DataArgs, tokenizer: Tokenizer, prompt: Prompt, max_seq_length: int) -> Samples:
    """Read the data, make samples of it and split them.

    A record with messages is one sample of at most `max_seq_length` tokens. Plain texts are put one after another, each
    with BOS before it (where the tokenizer adds one) and EOS behind it, and cut into windows of `max_seq_length` + 1
    tokens; a window begins with the last token of the one before, so that every token is learned once.

    Without `args.val_path`, `random.Random(args.seed)` draws round(n * val_split_fraction) samples for validation, at
    least one, leaving at least one for training. A fraction of 0 keeps none.

    Raises:
        UsageError: Data is missing, unreadable or bad (first three places named), or nothing usable is left.
    """
    if max_seq_length < 2:
        raise UsageError(f"--data.max_seq_length is {max_seq_length}; a sample needs at least 2 tokens.")
    return read_and_split(args, lambda path: _read_samples(path, args, tokenizer, prompt, max_seq_length))


def read_and_split(
    args: DataArgs,
    read: Callable[[Path], tuple[list[Sample], Counts]],
    kind: Callable[[Sample], int] = lambda _: 0,
) -> Samples:
    """The samples that `read` makes of a file or folder, split as `load_samples` says. Of each `kind` of sample, one at
    least stays for training, though validation may get fewer then."""
    if args.path is None:
        raise UsageError("No data was given; name a file or folder with --data.")
    fraction = VAL_SPLIT if args.val_split_fraction is None else args.val_split_fraction
    if not 0 <= fraction < 1:
        raise UsageError(f"--data.val_split_fraction is {fraction}; it should be from 0 to below 1.")
    if args.val_path is not None and args.val_split_fraction is not None:
        raise UsageError("--data.val_path and --data.val_split_fraction both choose validation records; keep one.")
    samples, counts = read(args.path)
    if args.val_path is not None:
        val, val_counts = read(args.val_path)
        return Samples(samples, val, counts, val_counts)
    if fraction == 0:
        return Samples(samples, [], counts)
    if len(samples) == 1:
        raise UsageError(
            f"{args.path} gives a single sample, which cannot be split into training and validation; "
            "use --data.val_path, --data.val_split_fraction 0 to train without validation, or (for plain text) "
            "a smaller --data.max_seq_length."
        )
    order = list(range(len(samples)))
    random.Random(args.seed).shuffle(order)
    n_val = min(max(round(len(samples) * fraction), 1), len(samples) - 1)
    left, kept = Counter(map(kind, samples)), set()
    for i in order:
        if len(kept) < n_val and left[kind(samples[i])] > 1:
            left[kind(samples[i])] -= 1
            kept.add(i)
    train = [sample for i, sample in enumerate(samples) if i not in kept]
    return Samples(train, [samples[i] for i in sorted(kept)], counts)


def _read_samples(
    path: Path, args: DataArgs, tokenizer: Tokenizer, prompt: Prompt, max_seq_length: int
) -> tuple[list[Sample], Counts]:
    counts = Counts()
    conversations: list[tuple[list[Segment], str]] = []
    texts: list[tuple[str, str]] = []
    problems: list[str] = []
    for record in read_records(path):
        counts.read += 1
        try:
            if record.problem:
                raise UsageError(record.problem)
            conversation = to_conversation(record.fields, args.format)
            counts.unused_keys |= set(record.fields) - USED_KEYS
            if not all(text.strip() for text in _responses(conversation)):
                counts.empty += 1
            elif isinstance(conversation, str):
                texts.append((conversation, record.source))
            else:
                conversations.append((prompt.segments(conversation), record.source))
        except UsageError as error:
            problems.append(f"{record.source}: {error}")
    counts.bad = count_bad(problems, args.bad_records)
    samples = _conversation_samples(conversations, args, tokenizer, max_seq_length, counts)
    samples += _text_samples(texts, tokenizer, max_seq_length)
    counts.samples = len(samples)
    if not samples:
        raise UsageError(f"{path} leaves nothing to learn from: {counts.describe()}.")
    return samples, counts


def count_bad(problems: Sequence[str], bad_records: str) -> int:
    """How many records have `problems`, each told with its place. Raises UsageError about the first three if
    `bad_records` is "stop"."""
    if problems and bad_records == "stop":
        more = f" (and {len(problems) - 3:,} more)" if len(problems) > 3 else ""
        raise UsageError(
            f"{_plural(len(problems), 'bad record')}: {'; '.join(problems[:3])}{more}.\n"
            "Mend them, or leave them out with --data.bad_records skip."
        )
    return len(problems)


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
) -> list[Sample]:
    openings = tokenizer.encode_batch([segments[0][0] for segments, _ in conversations])
    others = [text for segments, _ in conversations for text, _ in segments[1:]]
    encoded = iter(tokenizer.encode_batch(others, continues=True))
    samples = []
    for (segments, source), opening in zip(conversations, openings, strict=True):
        tokens, labels = [], []
        response = None
        for i, (_, learned) in enumerate(segments):
            ids = opening if i == 0 else next(encoded)
            if learned and response is None:
                response = (len(tokens), min(len(tokens) + len(ids), max_seq_length))
            tokens += ids
            labels += ids if learned or not args.mask_prompt else [IGNORE] * len(ids)
        if len(tokens) > max_seq_length:
            if args.overlong == "drop":
                counts.dropped += 1
                continue
            counts.cut += 1
        tokens, labels = tokens[:max_seq_length], labels[:max_seq_length]
        if all(label == IGNORE for label in labels[1:]):
            counts.untargeted += 1
            continue
        samples.append(Sample(np.array(tokens, np.int32), np.array(labels, np.int32), source, response))
    return samples


def _text_samples(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_seq_length: int) -> list[Sample]:
    before = [tokenizer.bos_id] if tokenizer.adds_bos else []
    behind = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = [[*before, *ids, *behind] for ids in tokenizer.encode_batch([text for text, _ in texts])]
    stream = np.fromiter(chain.from_iterable(documents), np.int32)
    ends = list(accumulate(len(document) for document in documents))
    samples = []
    for start in range(0, len(stream) - 1, max_seq_length):
        window = stream[start : start + max_seq_length + 1]
        source = texts[int(np.searchsorted(ends, start, side="right"))][1]
        samples.append(Sample(window, window, source, (0, len(window))))
    return samples


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
