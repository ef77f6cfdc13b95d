"""Layer specs: the words a person uses for blocks, and the block ids they mean.

    10,11   0-3,8   -2:   -1   last:8   first:4   every:4   20%-80%   new   all   none

One grammar for the command line, YAML (list, int, string) and Python. `rank:spectrum:4` asks for more than a look at
the words: choose/words.py puts ids in its place first, where an option takes it. No heavy import here."""

import re
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import SupportsIndex, Union

from litfreeze.errors import UsageError, did_you_mean

Spec = Union[int, str, Iterable[Union[int, str]]]
# As the commands take them; text comes first, so that a command line's 010 stays what was typed
Layers = Union[str, int, list[Union[str, int]], None]
Names = Union[str, list[str], None]

GRAMMAR = "10,11  0-3  -1  -2:  last:8  first:4  every:4  20%-80%  new  all  none"
WORDS = ("all", "none", "new", "first", "last", "every", "rank")


def parse_layers(spec: Spec, n_layer: int, option: str = "trainable_layers", new: Sequence[int] = ()) -> list[int]:
    """The sorted block ids that `spec` names in a model of `n_layer` blocks, of which `new` were put in by
    `litfreeze expand`.

    Parts are joined by commas (or are the elements of a list), and a block named twice counts once:
    `10` and `-1` are single ids; `0-3` and `20%-80%` are ranges (ids inclusive; percents of the depth, the end
    exclusive); `-2:` is from there to the top; `first:4` and `last:8` count from an end; `every:4` is the 4th, 8th, …
    block, as LLaMA-Pro spaces its own; `new` is those put in; `all`; `none` stands alone.

    Raises UsageError for anything else: out of range, falling or empty ranges, empty parts, nonsense, a ranking. Its
    text names `option`, where the words came from."""
    parts = split_layers(spec, option)
    if "none" in parts:
        if len(parts) > 1:
            raise UsageError(f"--{option} {_show(spec)}: 'none' stands alone.")
        return []
    chosen: set[int] = set()
    for part in parts:
        chosen.update(_new(new) if part == "new" else _parse_part(part, n_layer))
    return sorted(chosen)


def format_layers(ids: Iterable[int]) -> str:
    """The shortest spec of these ids: [0, 1, 2, 8] is '0-2,8'; nothing is 'none'."""
    runs: list[list[int]] = []
    for i in sorted(set(ids)):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    shown = [",".join(map(str, run)) if len(run) < 3 else f"{run[0]}-{run[-1]}" for run in runs]
    return ",".join(shown) or "none"


def spread(n_layer: int, count: int, option: str) -> list[int]:
    """The last block of each of `count` equal groups. Raises UsageError, naming `option`, if they cannot be."""
    if count < 1 or n_layer % count:
        fits = ", ".join(str(n) for n in range(1, n_layer + 1) if n_layer % n == 0)
        raise UsageError(f"--{option} {count}: {n_layer} blocks do not make so many equal groups. Choose from {fits}.")
    return list(range(n_layer // count - 1, n_layer, n_layer // count))


def split_layers(spec: Spec, option: str = "trainable_layers") -> list[str]:
    """The parts of `spec`, as they were written. Raises UsageError for what has none, or an empty one."""
    single = isinstance(spec, (str, SupportsIndex)) and not getattr(spec, "shape", ())  # an array is a list
    if not single and (not isinstance(spec, Iterable) or isinstance(spec, (dict, bytes))):
        raise UsageError(f"--{option} takes {GRAMMAR}, not {spec!r}.")
    items = [spec] if single else list(spec)
    if not items:
        raise UsageError(f"--{option} is an empty list. Say none for no block.")
    parts: list[str] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, SupportsIndex)):
            raise UsageError(f"--{option} takes ids and ranges, not {item!r}. Examples: {GRAMMAR}.")
        parts += [part.strip() for part in (item if isinstance(item, str) else str(index(item))).split(",")]
    if "" in parts:
        raise UsageError(f"--{option} {_show(spec)} has an empty part. Examples: {GRAMMAR}.")
    return parts


def _show(spec: Spec) -> str:
    return repr(spec if isinstance(spec, (str, int)) else list(spec))


def _parse_part(part: str, n_layer: int) -> Iterable[int]:
    for pattern, meaning in _FORMS:
        if match := re.fullmatch(pattern, part):
            return meaning(part, n_layer, *match.groups())
    if match := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", part):
        raise UsageError(f"Layers {part!r}: write a range as {match[1]}-{match[2]} (both ends included).")
    word = part.partition(":")[0]
    if word == "rank":
        raise UsageError(
            f"Layers {part!r}: only --trainable_layers of finetune and of layers takes a ranking. "
            "For another option litfreeze rank tells the ids."
        )
    if word in ("first", "last", "every"):
        raise UsageError(f"Layers {part!r}: {word} takes a count, as in {word}:4.")
    raise UsageError(f"Layers {part!r} are not understood.{did_you_mean(word, WORDS)} Examples: {GRAMMAR}.")


def _new(new: Sequence[int]) -> Sequence[int]:
    if not new:
        raise UsageError("Layers 'new': this model has no new blocks. litfreeze expand puts them in.")
    return new


def _id(part: str, n_layer: int, text: str) -> int:
    i = int(text)
    if not -n_layer <= i < n_layer:
        raise UsageError(
            f"Layers {part!r}: this model has {n_layer} blocks, ids 0 to {n_layer - 1} (or -{n_layer} to -1)."
        )
    return i % n_layer


def _count(part: str, n_layer: int, text: str) -> int:
    count = int(text)
    if not 1 <= count <= n_layer:
        raise UsageError(f"Layers {part!r}: this model has {n_layer} blocks, so the count is 1 to {n_layer}.")
    return count


def _single(part: str, n_layer: int, text: str) -> Iterable[int]:
    return [_id(part, n_layer, text)]


def _range(part: str, n_layer: int, low: str, high: str) -> Iterable[int]:
    start, stop = _id(part, n_layer, low), _id(part, n_layer, high)
    if start > stop:
        raise UsageError(f"Layers {part!r} fall. Write {high}-{low}.")
    return range(start, stop + 1)


def _percents(part: str, n_layer: int, low: str, high: str) -> Iterable[int]:
    start, stop = int(low), int(high)
    if start >= stop or stop > 100:
        raise UsageError(f"Layers {part!r}: percents rise, within 0% to 100%.")
    ids = range((n_layer * start + 50) // 100, (n_layer * stop + 50) // 100)
    if not ids:
        raise UsageError(f"Layers {part!r} match no block of {n_layer}. Widen the range.")
    return ids


def _onward(part: str, n_layer: int, low: str) -> Iterable[int]:
    return range(_id(part, n_layer, low), n_layer)


def _first(part: str, n_layer: int, text: str) -> Iterable[int]:
    return range(_count(part, n_layer, text))


def _last(part: str, n_layer: int, text: str) -> Iterable[int]:
    return range(n_layer - _count(part, n_layer, text), n_layer)


def _every(part: str, n_layer: int, text: str) -> Iterable[int]:
    count = _count(part, n_layer, text)
    return range(count - 1, n_layer, count)


def _all(part: str, n_layer: int) -> Iterable[int]:
    return range(n_layer)


_FORMS: list[tuple[str, Callable[..., Iterable[int]]]] = [
    (r"([+-]?[0-9]{1,9})", _single),
    (r"([0-9]{1,9})\s*-\s*([0-9]{1,9})", _range),
    (r"([0-9]{1,9})%\s*-\s*([0-9]{1,9})%", _percents),
    (r"([+-]?[0-9]{1,9}):", _onward),
    (r"first:([0-9]{1,9})", _first),
    (r"last:([0-9]{1,9})", _last),
    (r"every:([0-9]{1,9})", _every),
    (r"all", _all),
]
