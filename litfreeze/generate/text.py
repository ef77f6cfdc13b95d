"""New tokens as text, piece by piece."""

from collections.abc import Generator, Iterable, Iterator

from litfreeze.tokenizer import TextStream


def until(stream: TextStream, tokens: Iterable[int], stops: list[str]) -> Generator[str, None, bool]:
    """The text of `tokens` as it comes, ending before the first of `stops`. It returns whether it came to one.

    What could be the beginning of a stop text is held back until it is decided."""
    held = ""

    def pieces() -> Iterator[str]:
        for token in tokens:
            yield stream.push(token)
        yield stream.finish()

    for piece in pieces():
        held += piece
        if found := [held.index(stop) for stop in stops if stop in held]:
            yield held[: min(found)]
            return True
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        yield held[:safe]
        held = held[safe:]
    yield held
    return False


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
