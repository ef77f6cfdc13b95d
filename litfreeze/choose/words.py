"""`rank:spectrum:4` among the words for layers, and the ids that take its place. No heavy import: the command line
reads this file."""

import re
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

from litfreeze.errors import UsageError, did_you_mean
from litfreeze.freeze.layers import Layers, format_layers, parse_layers, split_layers

Method = Literal["spectrum", "gradient", "angular", "random"]
METHODS = get_args(Method)
NEED_DATA = ("gradient", "angular")
RECORDS = 64  # that a method looks at unless said


class Ranked(Protocol):
    """What these words need of a `Ranking`."""

    def best(self, count: int) -> list[int]: ...

    def told(self, count: int) -> str: ...


def has_ranks(layers: Layers) -> bool:
    """Whether `layers` names a ranking."""
    return layers is not None and any(_is_rank(part) for part in split_layers(layers))


def put_ids(
    layers: Layers, n_layer: int, new: Sequence[int], rank: Callable[[Method], Ranked]
) -> tuple[str, list[str]]:
    """The words for the blocks of `layers`, in which `rank:METHOD:COUNT` stands for the COUNT best of a ranking, as
    plain ids, and a line about each ranking for the person.

    `rank` is called for each method named, once all words are known to mean something. Raises UsageError for those that
    do not."""
    parts = split_layers(layers)
    asked = check_words(layers, n_layer, new)
    rankings = {method: rank(method) for method in dict.fromkeys(method for method, _ in asked.values())}
    chosen = set(parse_layers([part for part in parts if part not in asked] or "none", n_layer, new=new))
    chosen.update(*(rankings[method].best(count) for method, count in asked.values()))
    return format_layers(chosen), [rankings[method].told(count) for method, count in asked.values()]


def check_words(
    layers: Layers, n_layer: int, new: Sequence[int], option: str = "trainable_layers"
) -> dict[str, tuple[Method, int]]:
    """The rankings among `layers`, each with its method and count. Raises UsageError unless all words mean something,
    with `option` for where they came from."""
    parts = split_layers(layers, option)
    asked = {part: _method_and_count(part, n_layer) for part in parts if _is_rank(part)}
    stand_ins = [f"first:{asked[part][1]}" if part in asked else part for part in parts]
    parse_layers(stand_ins, n_layer, option, new)  # 'none,rank:random:1' and '99,rank:spectrum:4' are refused here
    return asked


def check_method(method: str, where: str) -> None:
    """Raises UsageError, which begins with `where`, if there is no such method."""
    if method not in METHODS:
        raise UsageError(
            f"{where}: no ranking is called {method!r}.{did_you_mean(method, METHODS)} "
            f"Choose from {', '.join(METHODS)}."
        )


def _is_rank(part: str) -> bool:
    return part.partition(":")[0] == "rank"


def _method_and_count(part: str, n_layer: int) -> tuple[Method, int]:
    _, _, rest = part.partition(":")
    method, _, count = rest.partition(":")
    if method:
        check_method(method, f"Layers {part!r}")
    if not method or not re.fullmatch(r"[0-9]{1,9}", count):
        raise UsageError(
            f"Layers {part!r}: rank takes a method and a count, as in rank:{method or METHODS[0]}:4. "
            f"Methods: {', '.join(METHODS)}."
        )
    if not 1 <= int(count) <= n_layer:
        raise UsageError(f"Layers {part!r}: this model has {n_layer} blocks, so the count is 1 to {n_layer}.")
    return method, int(count)
