"""A checkpoint to ask from Python: what `litfreeze.load` gives."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from operator import index
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Optional, Union

import torch
from torch import Tensor

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.data.formats import Message, to_messages
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.generate.answer import Answer, Answerer, check_options, load_models
from litfreeze.generate.sample import Sampling
from litfreeze.model import GPT
from litfreeze.tokenizer import Tokenizer


class Model:
    """A checkpoint with its weights on the device; an adapter or a delta over its base.

    Attributes:
        module: The model itself, a `torch.nn.Module`; called with tokens (B, T), it gives logits (B, T, V).
        tokenizer: `encode` and `decode`.
        checkpoint: Where it came from: `config`, `path`, `manifest`, `base`.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self.module: GPT = answerer.model
        self.tokenizer: Tokenizer = answerer.tokenizer
        self.checkpoint: Checkpoint = answerer.checkpoint

    def __repr__(self) -> str:
        return f"<litfreeze model {self.checkpoint.path.name}, {self.checkpoint.config.n_layer} blocks>"

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: Optional[int] = None,
        top_p: float = 1.0,
        stop: Union[str, Sequence[str], None] = None,
        system: Optional[str] = None,
        seed: int = 1337,
    ) -> str:
        """The answer to a prompt, put the way the checkpoint was trained. The options are those of `litfreeze
        generate`. Raises UsageError for those out of range, and for a prompt that is no text or does not fit."""
        if not isinstance(prompt, str):
            raise UsageError(f"The prompt should be text, not {type(prompt).__name__}: one prompt a call.")
        before: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        messages = [*before, {"role": "user", "content": prompt}]
        return self.chat(messages, max_new_tokens, temperature, top_k, top_p, stop, seed)

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: Optional[int] = None,
        top_p: float = 1.0,
        stop: Union[str, Sequence[str], None] = None,
        seed: int = 1337,
    ) -> str:
        """The answer to messages, `[{"role": "user", "content": "…"}]`, of which the last is the user's. Raises
        UsageError as `generate` does."""
        return "".join(self.stream(messages, max_new_tokens, temperature, top_k, top_p, stop, seed))

    def stream(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: Optional[int] = None,
        top_p: float = 1.0,
        stop: Union[str, Sequence[str], None] = None,
        seed: int = 1337,
    ) -> Iterator[str]:
        """The same in pieces, as they come."""
        stops = check_options(max_new_tokens, stop)
        if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
            raise UsageError(f"--seed {seed!r} must be a whole number of 64 bits.")
        messages = to_messages(messages)
        if messages[-1]["role"] == "assistant":
            raise UsageError("The last message is the assistant's; put the user's after it, to be answered.")
        tokens = self._answerer.tokens(messages)
        sampling = Sampling(temperature, top_k, top_p)
        return iter(Answer(self._answerer, tokens, max_new_tokens, sampling, stops, seed))

    @torch.no_grad()
    def logits(self, text: Union[str, Sequence[int]]) -> Tensor:
        """The logits (T, V) fp32, on the CPU, behind each of the T tokens of a text, which is taken as it is, or given
        as tokens. Raises UsageError for one that is empty or does not fit."""
        try:
            tokens = self.tokenizer.encode(text) if isinstance(text, str) else [index(token) for token in text]
            known = not isinstance(text, bytes) and min(tokens, default=0) >= 0
        except TypeError:
            known = False
        if not known:
            raise UsageError(f"logits takes a text, or a list of tokens, which are 0 or more; not {text!r:.80}.")
        most = self.checkpoint.config.block_size
        if not 1 <= len(tokens) <= most:
            raise UsageError(f"The text has {len(tokens)} tokens; this model reads 1 to {most}.")
        self.checkpoint.check_tokens(tokens)
        return self.module(torch.tensor([tokens], device=self.module.embed.weight.device))[0].float().cpu()


def loaded(
    checkpoint_dir: Union[Path, str, None],
    base_dir: Union[Path, str, None],
    prompt_style: Optional[str],
    precision: Optional[str],
    accelerator: str,
) -> Model:
    """What `litfreeze.load` says."""
    for name, path in {"checkpoint_dir": checkpoint_dir, "base_dir": base_dir}.items():
        if not isinstance(path, (str, PathLike, NoneType)):
            raise UsageError(f"{name}: {path!r} is not a path.")
    place = MODEL_DIR if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
    base = None if base_dir is None else Path(base_dir).expanduser()
    answerer = Answerer(open_checkpoint(place, base), prompt_style)
    load_models([answerer], accelerator, precision)
    return Model(answerer)
