"""A chat's next answer, in the helper process: by what `litfreeze chat` and `serve` answer with."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Optional

from litfreeze.checkpoint.directory import open_checkpoint
from litfreeze.demo import MODEL_DIR
from litfreeze.generate.answer import Answer, Answerer, load_models
from litfreeze.generate.sample import Sampling


def answer(
    checkpoint: Optional[str], messages: Sequence[dict[str, str]], max_new_tokens: int, temperature: float
) -> Iterator[str]:
    """What the checkpoint (None: the embedded model) says to `messages`, piece by piece as it comes."""
    answerer = _loaded(checkpoint or str(MODEL_DIR))
    tokens = answerer.tokens(messages)
    yield from Answer(answerer, tokens, max_new_tokens, Sampling(temperature), seed=len(messages))


@lru_cache(maxsize=1)
def _loaded(checkpoint: str) -> Answerer:
    answerer = Answerer(open_checkpoint(checkpoint))
    load_models([answerer], "auto", None)
    return answerer
