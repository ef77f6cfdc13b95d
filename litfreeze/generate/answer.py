"""From messages to an answer: what generate, chat and serve share.

Several checkpoints over one base answer side by side. Each has a model of its own, whose parameters are the base's, the
same objects, but for those that the checkpoint holds itself: an adapter, or the weights of a delta. So nothing is read
or moved to go from one to another, and none can leave a trace in another."""

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Optional, Union

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.convert.peft_config import PEFT_CONFIG
from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.data.formats import Message, to_messages
from litfreeze.data.prompt import Prompt
from litfreeze.errors import UsageError
from litfreeze.generate.sample import Sampling, generate_tokens
from litfreeze.generate.text import until
from litfreeze.hub import is_hub_name
from litfreeze.json_file import read_json
from litfreeze.launch import one_device
from litfreeze.model import GPT
from litfreeze.outputs import FINAL

BASE = "base"  # the name of the model that the others stand over


class Answerer:
    """A checkpoint that answers: with its tokenizer, the style its prompts are put in, and the model that `load_models`
    gives it.

    The style is `prompt_style`, else the one saved with the checkpoint, else its chat template, else plain. Raises
    UsageError for a classifier, or a style that the checkpoint cannot have."""

    model: GPT

    def __init__(self, checkpoint: Checkpoint, prompt_style: Optional[str] = None) -> None:
        if checkpoint.config.labels:
            raise UsageError(
                f"{checkpoint.path} is a classifier and writes nothing: litfreeze classify --checkpoint_dir "
                f"{checkpoint.path} --text '…' tells the class of a text."
            )
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer()
        if prompt_style is None and checkpoint.prompt is None and self.tokenizer.chat_template is None:
            prompt_style = "plain"
        self.prompt = Prompt.choose(prompt_style, checkpoint.prompt, self.tokenizer)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """What the model reads before it answers `messages`. Raises UsageError if they are no messages, or the style
        cannot put them."""
        tokens = self.prompt.encode([self.prompt.for_generation(to_messages(messages))])[0]
        self.checkpoint.check_tokens(tokens)
        return tokens


class Answer:
    """One answer to a prompt of `tokens`. Iterate, once, over its pieces of text as they come; leaving ends it.

    Attributes:
        tokens: How many have come so far.
        finish_reason: Once it is complete: "stop" at the model's own end or at one of `stops`, which is not written;
            "length" after `max_new_tokens`, or where the context is full.
    """

    def __init__(
        self,
        answerer: Answerer,
        tokens: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        stops: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.tokens = 0
        self.finish_reason: Optional[str] = None
        self._most = min(max_new_tokens, answerer.checkpoint.config.block_size - len(tokens))
        stop_ids, texts = answerer.tokenizer.ends(stops)
        drawn = generate_tokens(answerer.model, tokens, self._most, stop_ids, sampling, seed)
        self._pieces = until(answerer.tokenizer.stream(), self._counted(drawn), texts)

    def __iter__(self) -> Iterator[str]:
        stopped = yield from self._pieces
        self.finish_reason = "length" if self.tokens == self._most and not stopped else "stop"

    def _counted(self, drawn: Iterable[int]) -> Iterator[int]:
        for token in drawn:
            self.tokens += 1
            yield token


def open_answerers(
    checkpoint_dir: Union[Path, str],
    base_dir: Optional[Path] = None,
    adapters: Union[str, Collection[str], None] = None,
    prompt_style: Optional[str] = None,
    tell: bool = True,
) -> dict[str, Answerer]:
    """By name: the checkpoint, its base if it stands over one, and the adapters or deltas over that base. The first is
    the one to ask by default. No weights are loaded.

    A checkpoint that is whole is called base. One over a base goes by the name of its folder, or of its run's, if that
    is `final`. `adapters` are texts NAME=DIR. Raises UsageError if one of them has another base, or a name is taken.
    With `tell`, standard error gets a note of each PEFT adapter whose base cannot be known for this one."""
    first = open_checkpoint(checkpoint_dir, base_dir)
    opened = {BASE: first}
    if first.base is not None:
        place = first.path.resolve()
        opened = {place.parent.name if place.name == FINAL else place.name: first}
        if BASE in opened:
            raise UsageError(f"{place} would be called {BASE}, as what it stands over. Rename the folder.")
        opened[BASE] = open_checkpoint(first.base.path)
    for name, path in _named(adapters).items():
        if name in opened:
            raise UsageError(f"--adapters: the name {name} is taken. Taken are {', '.join(opened)}.")
        try:
            opened[name] = open_checkpoint(path, opened[BASE].path)
            note = _stranger(opened[name], opened[BASE])
        except UsageError as error:
            raise UsageError(f"--adapters {name}: {error}") from None
        if note and tell:
            print(f"Note      --adapters {name}: {note}", file=sys.stderr, flush=True)
    return {name: Answerer(checkpoint, prompt_style) for name, checkpoint in opened.items()}


def _stranger(adapter: Checkpoint, base: Checkpoint) -> str:
    """Why it cannot be known that a PEFT adapter belongs over `base`: PEFT has its base's name, and no hash. Raises
    UsageError if it names another one."""
    if adapter.manifest is not None:
        return ""
    named = read_json(adapter.path / PEFT_CONFIG).get("base_model_name_or_path")
    known = [name for name in (origin(base.path), (base.manifest or {}).get("source")) if name]
    if not isinstance(named, str) or not named:
        return f"{adapter.path} names no base; it is put over {base.path}."
    here = Path(named)
    if (here / "config.json").is_file():
        places = {base.path.resolve(), *(Path(name).resolve() for name in known if not is_hub_name(name))}
        same = here.resolve() in places or open_checkpoint(here).weights_hash == base.weights_hash
    elif named in known:
        same = True
    elif is_hub_name(named) and any(map(is_hub_name, known)):
        same = named.partition("@")[0] in {name.partition("@")[0] for name in known}
    else:
        return f"{adapter.path} names {named} as its base; whether {base.path} is that cannot be known."
    if not same:
        raise UsageError(
            f"{adapter.path} was trained over {named}, and not over {base.path}. If it belongs there all the "
            f"same: --checkpoint_dir {adapter.path} --base_dir {base.path}."
        )
    return ""


def _named(adapters: Union[str, Collection[str], None]) -> dict[str, Path]:
    """'a=x,b=y' or ['a=x', 'b=y'] as {'a': x, 'b': y}."""
    words = [part.strip() for part in adapters.split(",")] if isinstance(adapters, str) else list(adapters or [])
    found: dict[str, Path] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path or any(c.isspace() or not c.isprintable() for c in name):
            raise UsageError(f"--adapters {word!r}: write NAME=DIR, several as a=DIR,b=DIR. A name has no blanks.")
        if name in found:
            raise UsageError(f"--adapters gives the name {name} twice.")
        found[name] = Path(path).expanduser()
    return found


def load_models(answerers: Collection[Answerer], accelerator: str, precision: Optional[str]) -> None:
    """Gives each of `answerers` its model, on the device. What they have in common is there once.

    `precision` is 32-true or bf16-true, by default what the device is good at. Raises UsageError if the device is not
    there or cannot do it."""
    fabric, kept = one_device(accelerator, precision)
    base = None
    for answerer in sorted(answerers, key=lambda each: each.checkpoint.base is not None):  # the base before the others
        model = load_model(answerer.checkpoint, lambda _: kept.frozen, over=base)
        answerer.model = model.to(fabric.device)
        base = answerer.model if answerer.checkpoint.base is None else base


def check_options(max_new_tokens: int, stop: Union[str, Sequence[str], None]) -> list[str]:
    """The stop texts as a list. Raises UsageError for one that is empty or no text, or for no tokens at all."""
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {max_new_tokens!r} must be at least 1, a whole number.")
    stops = stop if isinstance(stop, (list, tuple)) else [] if stop is None else [stop]
    if "" in stops:
        raise UsageError("--stop is empty.")
    if strange := [one for one in stops if not isinstance(one, str)]:
        raise UsageError(f"--stop {strange[0]!r} must be a text, or a list of texts.")
    return list(stops)
