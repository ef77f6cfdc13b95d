"""A chat's next answer. The one place where the board generates text: `answer`, in the helper process."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Optional

from litfreeze.checkpoint.directory import Checkpoint, load_model, open_checkpoint
from litfreeze.data.prompt import Prompt
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.generate.sample import Sampling, generate_tokens
from litfreeze.generate.text import until
from litfreeze.launch import build_fabric
from litfreeze.precision import default_precision


def answer(
    checkpoint: Optional[str], messages: Sequence[dict[str, str]], max_new_tokens: int, temperature: float
) -> Iterator[str]:
    """What the checkpoint (None: the embedded model) says to `messages`, piece by piece as it comes, put the way it was
    trained, as `litfreeze generate` does."""
    sampling = Sampling(temperature)
    opened, model = _loaded(checkpoint or str(MODEL_DIR))
    tokenizer = opened.tokenizer()
    plain = opened.prompt is None and tokenizer.chat_template is None
    style = Prompt.choose("plain" if plain else None, opened.prompt, tokenizer)
    ids = tokenizer.encode(style.for_generation(list(messages)))
    opened.check_tokens(ids)
    tokens = generate_tokens(model, ids, max_new_tokens, tokenizer.eos_ids, sampling, seed=len(messages))
    yield from until(tokenizer.stream(), tokens, [])


@lru_cache(maxsize=1)
def _loaded(checkpoint: str) -> tuple[Checkpoint, Any]:
    opened = open_checkpoint(checkpoint)
    if opened.config.labels:
        raise UsageError(f"{opened.path} is a classifier and writes nothing; litfreeze classify tells a text's class.")
    fabric, kept = build_fabric("auto", 1, 1, default_precision("auto").replace("mixed", "true"))
    return opened, load_model(opened, lambda _: kept.frozen).to(fabric.device)
