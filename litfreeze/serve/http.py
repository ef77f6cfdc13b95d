"""What happens to a request in the process that speaks HTTP: it checks what it can at once, and passes on the rest.

LitServe's own OpenAISpec calls every answer complete, knows no other models, and does not notice when a client leaves:
that is what stands here."""

import asyncio
import json
import multiprocessing
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from itertools import count
from typing import Any

import litserve
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from litserve.utils import LitAPIStatus, ResponseBufferItem
from starlette.exceptions import HTTPException

from litfreeze.serve.completions import Asked, Refused, chunk, completion, read_request, usage

LOOK = 0.5  # seconds between looks whether the client of a silent request is still there
LEFT = 499  # what nobody reads any more


class Completions(litserve.OpenAISpec):
    """The endpoints."""

    def __init__(self, models: list[str]) -> None:
        super().__init__()
        self.models = models
        self.created = int(time.time())
        self.numbers = count()
        self.left = multiprocessing.get_context("spawn").SimpleQueue()  # numbers of requests whose clients have left

    def pre_setup(self, lit_api: litserve.LitAPI) -> None:
        """Registers what is served beside the completions."""
        super().pre_setup(lit_api)
        self.add_endpoint("/v1/models", self.list_models, ["GET"])
        self.add_endpoint("/v1/models/{name:path}", self.get_model, ["GET"])

    async def list_models(self) -> Response:
        """The models a request can name, the one to take by default first."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.models]})

    async def get_model(self, name: str) -> Response:
        """One of them."""
        if name not in self.models:
            raise Refused(404, f"There is no model {name[:80]!r}.", "model", "model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "litfreeze"}

    async def chat_completion(self, request: Request) -> Response:
        """One answer, whole or as it comes."""
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise Refused(400, "The body is not JSON.") from None
        asked = read_request(body, self.models)
        head = f"chatcmpl-{uuid.uuid4().hex}", asked.model, int(time.time())
        parts = self._parts(asked, request)
        first = await anext(parts, None)  # with which it is known that there will be an answer
        if first is None:
            return Response(status_code=LEFT)
        if asked.stream:
            events = self._events(asked, head, first["prompt_tokens"], parts)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        text, last = "", None
        async with aclosing(parts):
            async for part in parts:
                text += part.get("text", "")
                last = part
        if last is None or "finish_reason" not in last:
            return Response(status_code=LEFT)
        used = usage(first["prompt_tokens"], last["completion_tokens"])
        return JSONResponse(completion(*head, text, last["finish_reason"], used))

    async def _events(
        self, asked: Asked, head: tuple[str, str, int], prompt_tokens: int, parts: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            async with aclosing(parts):
                yield _event(chunk(*head, {"role": "assistant", "content": ""}))
                async for part in parts:
                    if "text" in part:
                        yield _event(chunk(*head, {"content": part["text"]}))
                    else:
                        yield _event(chunk(*head, {}, part["finish_reason"]))
                        if asked.include_usage:
                            used = usage(prompt_tokens, part["completion_tokens"])
                            yield _event(chunk(*head, None, usage=used))
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _event(error.body)

    async def _parts(self, asked: Asked, request: Request) -> AsyncIterator[dict[str, Any]]:
        """What the model's process says to a request, until it is complete or the client has left. Raises Refused."""
        number, arrived, said = next(self.numbers), asyncio.Event(), deque()
        self.response_buffer[number] = ResponseBufferItem(arrived, said)
        self.request_queue.put((self.response_queue_id, number, time.monotonic(), (number, asked)))
        complete = False
        try:
            while not complete and not await request.is_disconnected():
                with suppress(TimeoutError):
                    await asyncio.wait_for(arrived.wait(), LOOK)
                arrived.clear()
                while said and not complete:
                    part, status = said.popleft()
                    complete = status != LitAPIStatus.OK
                    if status == LitAPIStatus.ERROR:
                        raise Refused(500, "The server failed at this request; its log says how.")
                    if not complete:
                        part = json.loads(part)
                        if "refused" in part:
                            complete = True
                            raise Refused(400, **part["refused"])
                        yield part
        finally:
            del self.response_buffer[number]
            if not complete:
                self.left.put(number)

    # In the model's process, what goes in and comes out is passed on as it is

    def populate_context(self, context: dict[str, Any], request: Any) -> None:
        """Nothing is needed."""

    def encode_response(self, output: Iterator[dict[str, Any]], context: Any = None) -> Iterator[dict[str, Any]]:
        """As it is."""
        yield from output


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def in_form(_: Request, error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    if isinstance(error, HTTPException):  # a path or a method that is not there
        error = Refused(error.status_code, str(error.detail))
    elif not isinstance(error, Refused):
        error = Refused(500, "The server failed at this request; its log says how.")
    return JSONResponse(error.body, error.status)
