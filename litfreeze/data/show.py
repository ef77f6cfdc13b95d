"""Samples for a person to look at: what the model reads and learns, and how long records are."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from litfreeze.data.args import DataArgs
from litfreeze.data.counts import printable
from litfreeze.data.shelf import IGNORE, Sample
from litfreeze.data.split import Samples
from litfreeze.errors import UsageError
from litfreeze.picture import save_picture
from litfreeze.tokenizer import Tokenizer

HEAD, TAIL = 1200, 600  # characters that are shown of a long text
BARS, WIDTH = 12, 40  # of the histogram
GREEN, BOLD_GREEN, DIM, PLAIN = "\033[32m", "\033[1;32m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class Colours:
    """How what is learned is told from the rest: by the terminal's colours or, without them, by brackets."""

    on: bool

    def piece(self, text: str, learned: bool, special: bool) -> str:
        if not self.on:
            return text
        colour = (BOLD_GREEN if special else GREEN) if learned else (DIM if special else "")
        return f"{colour}{text}{PLAIN}" if colour and text else text

    def edge(self, learned: bool) -> str:
        """What stands where learned text begins (`learned`) or ends."""
        return "" if self.on else "\u27e6" if learned else "\u27e7"


def numbered(samples: Iterable[Sample], lines: Collection[int]) -> list[Sample]:
    """Those of them whose records stand on `lines` of their files. Raises UsageError for a line that has none."""
    found = [sample for sample in samples if sample.source.rpartition(":")[2] in map(str, lines)]
    there = {sample.source.rpartition(":")[2] for sample in found}
    if absent := [line for line in lines if str(line) not in there]:
        told = "It is no record, was left out, or is plain text within a window that begins before it."
        raise UsageError(f"--index {absent[0]}: no sample begins there. {told}")
    return found


def record(sample: Sample, tokenizer: Tokenizer, labels: Sequence[str], colours: Colours, whole: bool) -> str:
    """A line about it, and its text with special tokens written out; of a classifier, the text and its class."""
    count, learned = len(sample.tokens), int((sample.labels[1:] != IGNORE).sum())
    if labels:
        text = _text(sample.prompt_tokens, [False] * count, tokenizer, colours, whole)
        answer = (
            colours.edge(True) + colours.piece(printable(labels[sample.labels[-1]]), True, False) + colours.edge(False)
        )
        return f"{_rule(f'{sample.source}   {count - 1:,} tokens')}\n{text}\n\u2192 {answer}"
    told = "all" if learned >= count - 1 else f"{learned:,}"
    text = _text(sample.tokens, sample.labels != IGNORE, tokenizer, colours, whole)
    return f"{_rule(f'{sample.source}   {count:,} tokens, {told} learned')}\n{text}"


def _rule(head: str) -> str:
    return f"\u2500\u2500 {head} {chr(0x2500) * max(2, 76 - len(head))}"


def _text(tokens: Sequence[int], learned: Sequence[bool], tokenizer: Tokenizer, colours: Colours, whole: bool) -> str:
    """The text of `tokens`, marked; unless it is to be `whole`, without the middle of it where that is long."""
    pieces: list[tuple[str, bool, bool]] = []
    stream = tokenizer.stream(skip_special_tokens=False)
    for token, is_learned in zip(tokens, learned, strict=False):
        pieces.append((printable(stream.push(int(token))), bool(is_learned), int(token) in tokenizer.special_ids))
    pieces.append((printable(stream.finish()), bool(pieces and pieces[-1][1]), False))
    if not whole:
        pieces = _shortened(pieces)
    parts, inside = [], False
    for (is_learned, special), run in groupby((piece for piece in pieces if piece[0]), lambda piece: piece[1:]):
        if is_learned != inside:
            parts.append(colours.edge(is_learned))
            inside = is_learned
        parts.append(colours.piece("".join(text for text, *_ in run), is_learned, special))
    return "".join([*parts, colours.edge(False) if inside else ""]).rstrip("\n")


def _shortened(pieces: list[tuple[str, bool, bool]]) -> list[tuple[str, bool, bool]]:
    """Without what stands more than `HEAD` characters behind the beginning and `TAIL` before the end."""
    total, at, left_out = sum(len(text) for text, _, _ in pieces), 0, 0
    before, behind = [], []
    for piece in pieces:
        if at < HEAD:
            before.append(piece)
        elif at >= total - TAIL:
            behind.append(piece)
        else:
            left_out += len(piece[0])
        at += len(piece[0])
    if left_out < TAIL:
        return pieces
    return [*before, (f"\n\u2026 {left_out:,} characters \u2026\n", before[-1][1], False), *behind]


# ---- lengths ----


def describe_lengths(samples: Samples, limit: int, data: DataArgs, is_cut: bool) -> str:
    """A histogram of the records' lengths in tokens, and what becomes of those beyond `limit`: nothing, where plain
    text is cut into windows (`is_cut` false)."""
    lengths = samples.counts.lengths
    lines = [f"Each has {next(iter(lengths)):,} tokens."] if len(lengths) == 1 else _histogram(lengths, limit, is_cut)
    beyond, total = sum(count for length, count in lengths.items() if length > limit), lengths.total()
    if not is_cut:
        lines.append(f"Cut into windows of {limit:,} tokens (--data.max_seq_length).")
    elif beyond:
        what = "cut at their end" if data.overlong == "cut" else "dropped"
        lines.append(
            f"{beyond:,} of {total:,} ({100 * beyond / total:.1f} %) are longer than {limit:,} tokens, and {what}."
        )
    else:
        lines.append(f"None is longer than {limit:,} tokens (--data.max_seq_length).")
    return "\n".join(lines)


def _histogram(lengths: Counter[int], limit: int, is_cut: bool) -> list[str]:
    step = _step(max(lengths))
    buckets = Counter()
    for length, count in lengths.items():
        buckets[length // step] += count
    most, edge = max(buckets.values()), len(f"{(max(buckets) + 1) * step:,}")
    lines = [f"{'tokens':>{2 * edge + 3}}  records"]
    for i in range(min(buckets), max(buckets) + 1):
        over = is_cut and i * step >= limit
        bar = ("\u2592" if over else "\u2588") * -(-buckets[i] * WIDTH // most)
        lines.append(f"{i * step:>{edge},} - {(i + 1) * step - 1:>{edge},}  {buckets[i]:>7,}  {bar}".rstrip())
    ordered = sorted(lengths)
    lines.append(
        f"Shortest {ordered[0]:,}, half of them up to {_quantile(lengths, 0.5):,}, 95 % up to "
        f"{_quantile(lengths, 0.95):,}, longest {ordered[-1]:,} tokens."
    )
    return lines


def _step(longest: int) -> int:
    """A round width of about `BARS` buckets."""
    step = 1
    while longest // step >= BARS:
        step *= 2
    return step


def _quantile(lengths: Counter[int], share: float) -> int:
    left = share * lengths.total()
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            return length
    return max(lengths)


def draw_lengths(path: Path, lengths: Counter[int], limit: int) -> None:
    """The same as a picture."""
    from matplotlib.figure import Figure

    figure = Figure((8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(list(lengths), bins=min(60, max(lengths)), weights=list(lengths.values()), color="tab:green")
    if limit < 1.2 * max(lengths):
        axes.axvline(limit, color="tab:red", linewidth=1.2, label=f"max_seq_length {limit:,}")
        axes.legend()
    axes.set(xlabel="tokens", ylabel="records")
    axes.grid(alpha=0.3)
    save_picture(figure, path)
