"""A chat's next answer, in the helper process: by what `litfreeze chat` and `serve` answer with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.demo import MODEL_DIR
from litfreeze.generate.answer import Answer, Answerer, load_models
from litfreeze.generate.sample import Sampling

_loaded: dict[str, Answerer] = {}  # the last one


def answer(
    checkpoint: Optional[str], messages: Sequence[dict[str, str]], max_new_tokens: int, temperature: float
) -> Iterator[str]:
    """What the checkpoint (None: the embedded model) says to `messages`, piece by piece as it comes."""
    answerer = _answerer(checkpoint or str(MODEL_DIR))
    tokens = answerer.tokens(messages)
    yield from Answer(answerer, tokens, max_new_tokens, Sampling(temperature), seed=len(messages))


def _answerer(checkpoint: str) -> Answerer:
    """With its model, which is read again if the directory holds other files than it did."""
    files = sorted(Path(checkpoint).glob("*")) if Path(checkpoint).is_dir() else []
    made_of = repr((checkpoint, [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]))
    if made_of not in _loaded:
        _loaded.clear()  # first: there may be no room for two
        answerer = Answerer(open_checkpoint(checkpoint))
        load_models([answerer], "auto", None)
        _loaded[made_of] = answerer
    return _loaded[made_of]
