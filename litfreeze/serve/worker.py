"""What happens to a request in the process of the model, which answers one after the other."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import litserve
from fastapi import Request

from litfreeze.errors import UsageError
from litfreeze.local import is_local, place_of
from litfreeze.serve.completions import Asked, Refused
from litfreeze.serve.http import Completions
from litfreeze.serve.parent import leave_with_parent


@dataclass(frozen=True)
class Served:
    """What is served, for the process of the model to open and load."""

    checkpoint_dir: Path
    base_dir: Optional[Path]
    adapters: Union[str, list[str], None]
    prompt_style: Optional[str]
    max_new_tokens: int
    accelerator: str
    precision: Optional[str]


class Answers(litserve.LitAPI):
    """The model's process, and who may ask it."""

    def __init__(self, served: Served, models: list[str], api_key: Optional[str]) -> None:
        super().__init__(spec=Completions(models))
        self.served = served
        self.api_key = api_key
        self.gone: set[int] = set()

    async def authorize(self, request: Request) -> None:
        """What every request has to pass: with a key, that; without one, it comes from this machine."""
        given = request.headers.get("Authorization", "")
        places = request.headers.get("Host", ""), place_of(request.headers.get("Origin"))
        if not self.api_key and not all(place is None or is_local(place) for place in places):
            raise Refused(403, "Without an --api_key this server answers to programs and pages of this machine alone.")
        if self.api_key and not secrets.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise Refused(401, "The API key is missing or wrong (Authorization: Bearer …).", None, "invalid_api_key")

    def setup(self, device: str) -> None:
        """Opens and loads everything, once."""
        from litfreeze.generate.answer import load_models, open_answerers

        leave_with_parent()
        served = self.served
        what = served.checkpoint_dir, served.base_dir, served.adapters, served.prompt_style
        self.answerers = open_answerers(*what, tell=False)  # the first process has told
        load_models(self.answerers.values(), served.accelerator, served.precision)

    def predict(self, request: tuple[int, Asked]) -> Iterator[dict[str, Any]]:
        """How long the prompt is, the text piece by piece, and how it ended; or why there is no answer."""
        from litfreeze.generate.answer import Answer
        from litfreeze.generate.sample import Sampling

        number, asked = request
        self.gone = {left for left in self.gone if left >= number}  # earlier ones have been answered
        answerer = self.answerers[asked.model]
        size = answerer.checkpoint.config.block_size
        try:
            tokens = answerer.tokens(asked.messages)
        except UsageError as error:
            yield {"refused": {"message": str(error), "param": "messages"}}
            return
        if not tokens:
            yield {"refused": {"message": "The prompt is empty.", "param": "messages"}}
            return
        if len(tokens) + (asked.max_tokens or 1) > size:
            told = f"This model's context is {size} tokens; the messages are {len(tokens)}"
            told += f", and {asked.max_tokens} are asked for." if asked.max_tokens else "."
            yield {"refused": {"message": told, "param": "messages", "code": "context_length_exceeded"}}
            return
        if self._has_left(number):
            return
        yield {"prompt_tokens": len(tokens)}
        most = asked.max_tokens or self.served.max_new_tokens
        sampling = Sampling(asked.temperature, asked.top_k, asked.top_p)
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        answer = Answer(answerer, tokens, most, sampling, asked.stops, seed)
        for piece in answer:
            if self._has_left(number):
                return
            if piece:
                yield {"text": piece}
        yield {"finish_reason": answer.finish_reason, "completion_tokens": answer.tokens}

    def _has_left(self, number: int) -> bool:
        while not self.spec.left.empty():
            self.gone.add(self.spec.left.get())
        return number in self.gone
