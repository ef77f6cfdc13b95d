"""Records to texts and their classes, for a classifier.

Classification is next-token training with another vocabulary: a sample is a text's tokens, and after the last of them
comes its class, of which the model reads nothing."""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from litfreeze.data.args import DataArgs, TextArgs
from litfreeze.data.counts import Counts, given
from litfreeze.data.formats import text_in
from litfreeze.data.records import data_files, passed_over, read_records
from litfreeze.data.samples import AT_ONCE, filling
from litfreeze.data.shelf import IGNORE, Sample, Shelf
from litfreeze.data.split import Samples, other_than, read_and_split, splits_of, subset_of
from litfreeze.errors import UsageError, did_you_mean
from litfreeze.tokenizer import Tokenizer

TEXT_KEYS = ("text", "sentence", "utterance", "prompt", "instruction", "question")
LABEL_KEYS = ("label", "category", "intent", "class", "completion", "output", "answer")
INPUT = "input"  # beside an instruction, which it is put behind


class Labelled(NamedTuple):
    """A text and its class, None where the record has none; `source` is `file:line` of the record."""

    text: str
    label: Optional[str]
    source: str


def find_text(fields: Mapping[str, Any], key: Optional[str] = None) -> tuple[str, set[str]]:
    """The text of a record, and the keys it came from: `key` or, without it, the one of `TEXT_KEYS` that is there.

    Raises UsageError if none is there, or several are."""
    found = _find(fields, key, TEXT_KEYS, "text")
    if found is None:
        raise UsageError(_told(fields, "text", TEXT_KEYS))
    text = text_in(fields, found)
    if key is None and found == "instruction" and fields.get(INPUT):
        return f"{text}\n\n{text_in(fields, INPUT)}", {found, INPUT}
    return text, {found}


def find_label(fields: Mapping[str, Any], key: Optional[str] = None) -> Optional[tuple[str, set[str]]]:
    """The class of a record, text or a whole number, without blanks around it, and its key: `key` or, without it, the
    one of `LABEL_KEYS` that is there; None if there is none. Raises UsageError if several are there."""
    found = _find(fields, key, LABEL_KEYS, "label")
    if found is None:
        return None
    value = fields[found]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), {found}
    return text_in(fields, found).strip(), {found}


def _find(fields: Mapping[str, Any], key: Optional[str], known: Sequence[str], what: str) -> Optional[str]:
    if key is not None:
        if key not in fields:
            keys = ", ".join(map(repr, fields)) or "none"
            raise UsageError(f"has no {key!r} (--data.{what}_key), but the keys {keys}{did_you_mean(key, fields)}")
        return key
    found = [name for name in known if name in fields]
    if len(found) > 1:
        raise UsageError(f"has {' and '.join(map(repr, found))}: say with --data.{what}_key which is the {what}")
    return found[0] if found else None


def _told(fields: Mapping[str, Any], what: str, known: Sequence[str]) -> str:
    keys = ", ".join(map(repr, fields)) or "none"
    return f"has the keys {keys}; a {what} is under {', '.join(known)}, or where --data.{what}_key says"


def read_labelled(
    path: Path,
    args: Union[DataArgs, TextArgs],
    counts: Counts,
    split: Optional[str] = None,
    needs_label: bool = True,
) -> Iterator[Labelled]:
    """The texts of a file, folder or split of a set with their classes; what became of its records is counted in
    `counts`. A blank text or class is left out.

    Raises UsageError at the end for records without a text or, if `needs_label`, without a class, and if nothing is
    left."""
    usable, other = 0, other_than(args, path)
    counts.passed_over = passed_over(path, data_files(path, subset_of(args, path), other))
    for record in read_records(path, subset_of(args, path), split, other):
        counts.read += 1
        try:
            if record.problem:
                raise UsageError(record.problem)
            text, used = find_text(record.fields, args.text_key)
            if not needs_label and _blank_label(record.fields, args.label_key):
                label, named = None, set()
            else:
                label, named = find_label(record.fields, args.label_key) or (None, set())
            if label is None and needs_label:
                raise UsageError(_told(record.fields, "label", LABEL_KEYS))
        except UsageError as error:
            counts.met(record, error)
            continue
        counts.unused_keys |= given(record.fields) - used - named
        if text.strip() and label != "":
            usable += 1
            yield Labelled(text, label, record.source)
        else:
            counts.empty += 1
    if args.bad_records == "stop":
        counts.refuse_bad()
    if not usable:
        raise UsageError(f"{path} leaves no text to classify: {counts.describe()}.")


def _blank_label(fields: Mapping[str, Any], key: Optional[str]) -> bool:
    """Whether nothing stands where a class could: a file to classify often has such a column."""
    values = [fields[name] for name in ([key] if key is not None else LABEL_KEYS) if name in fields]
    return bool(values) and all(value is None or (isinstance(value, str) and not value.strip()) for value in values)


def labels_of(args: DataArgs) -> tuple[str, ...]:
    """The classes of the training data in order, by number if all are whole numbers. Raises UsageError unless these
    can be learned: two or more, and on average at least two records of each."""
    counts = Counter(one.label for one in read_labelled(args.path, args, Counts(), splits_of(args)[0]))
    labels, records = sort_labels(counts), counts.total()
    if len(labels) == 1:
        raise UsageError(f"{args.path}: every record has the label {labels[0]!r}; a classifier needs two or more.")
    if len(labels) > records / 2:
        raise UsageError(
            f"{args.path}: {len(labels):,} different labels in {records:,} records, such as {labels[0][:60]!r}: "
            "this is no classification data. Leave out --task classification to learn to write such answers."
        )
    return labels


def sort_labels(labels: Collection[str]) -> tuple[str, ...]:
    """In order: by number if all are whole numbers, else as text."""
    numbers = all(re.fullmatch("-?[0-9]+", label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label) if numbers else (0, label)))


def load_classified(
    args: DataArgs, tokenizer: Tokenizer, labels: Sequence[str], max_seq_length: int, pad_id: Optional[int]
) -> Samples:
    """Read texts and their classes, make samples of them and split them as `load_samples` does, except that of every
    class a record stays for training.

    Raises UsageError for data that is missing or bad, and for a label that is not one of `labels`."""
    ids = {label: i for i, label in enumerate(labels)}

    def read(path: Path, split: Optional[str]) -> tuple[Shelf, Counts]:
        counts = Counts(split=split)
        made = filling(path, args, counts)
        strange: dict[str, str] = {}  # labels that are no classes, and where they stand first
        texts = read_labelled(path, args, counts, split)
        while some := list(islice(texts, AT_ONCE)):
            strange = {one.label: one.source for one in reversed(some) if one.label not in ids} | strange
            if strange:
                continue  # only to name them all
            tokenised = tokenise([one.text for one in some], tokenizer, max_seq_length, pad_id)
            for one, (tokens, count) in zip(some, tokenised, strict=True):
                counts.lengths[count] += 1
                cut = count > max_seq_length
                if not tokens:
                    counts.untargeted += 1
                elif cut and args.overlong == "drop":
                    counts.dropped += 1
                else:
                    counts.cut += cut
                    made.add(as_sample(tokens, ids[one.label], one.source))
        if strange:
            first, *others = sort_labels(strange)
            named = ", ".join(map(repr, [first, *others[:4]])) + (f" and {len(others) - 4} more" if others[4:] else "")
            raise UsageError(
                f"{path}: {named}, first at {strange[first]}, is no class of the training data."
                f"{did_you_mean(first, labels)} Mend the labels, or train with records of these classes too."
            )
        counts.samples = len(made)
        if not counts.samples:
            raise UsageError(f"{path} leaves nothing to learn from: {counts.describe()}.")
        return made.shelf(), counts

    samples = read_and_split(args, read, kind=lambda sample: int(sample.labels[-1]))
    samples.labels = tuple(labels)
    return samples


def tokenise(
    texts: Sequence[str], tokenizer: Tokenizer, max_seq_length: int, pad_id: Optional[int]
) -> list[tuple[list[int], int]]:
    """The first `max_seq_length` tokens of each text, with those that the tokenizer itself puts around it, and how many
    it has.

    What stands at the end and is `pad_id` goes: transformers, too, reads the class after the last token that is not."""
    found = []
    for tokens in tokenizer.encode_batch(texts, special_tokens=True):
        kept = tokens[:max_seq_length]
        while kept and kept[-1] == pad_id:
            kept.pop()
        found.append((kept, len(tokens)))
    return found


def as_sample(tokens: Sequence[int], label: int, source: str) -> Sample:
    """`tokens` (T,) and the class that follows them: a sample of T + 1, in which 0 holds the place that is not read."""
    labels = np.full(len(tokens) + 1, IGNORE, np.int32)
    labels[-1] = label
    return Sample(np.array([*tokens, 0], np.int32), labels, source, (len(tokens), len(tokens) + 1))
