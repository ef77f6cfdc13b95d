"""The server of `litfreeze serve`: LitServe with chat completions in OpenAI's form.

LitServe brings the processes, the queue between them and HTTP. The process of the model answers one request after the
other; the one that speaks HTTP checks what it can at once and passes on the rest. LitServe's own OpenAISpec calls every
answer complete, knows no other models, and does not notice when a client leaves: that is what stands here."""

import asyncio
import json
import multiprocessing
import os
import secrets
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from socket import socket
from types import FrameType
from typing import Any, Optional, Union

import litserve
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus
from starlette.exceptions import HTTPException

from litfreeze.errors import Interrupted, RunError, UsageError
from litfreeze.generate.completions import Asked, Refused, chunk, completion, read_request, usage
from litfreeze.local import is_local, place_of

LOOK = 0.5  # seconds between looks whether the client of a silent request is still there
LEFT = 499  # what nobody reads any more


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


class Completions(litserve.OpenAISpec):
    """What happens to a request in the process that speaks HTTP."""

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


class Answers(litserve.LitAPI):
    """What happens to a request in the process of the model."""

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

        _leave_with_parent()
        served = self.served
        self.answerers = open_answerers(served.checkpoint_dir, served.base_dir, served.adapters, served.prompt_style)
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


class Server(litserve.LitServer):
    """The processes, and the first line once they are ready."""

    def __init__(self, answers: Answers, greeting: str) -> None:
        # The model's process chooses the device itself; a request may wait for the ones before it as long as it takes
        super().__init__(answers, accelerator="cpu", devices=1, timeout=False, disable_openapi_url=True)
        self.greeting = greeting
        self.uvicorn_graceful_timeout = 1
        for kind in (Refused, HTTPException, Exception):
            self.app.add_exception_handler(kind, _in_form)

    def launch_inference_worker(self, lit_api: litserve.LitAPI) -> list[BaseProcess]:
        """LitServe's, deaf to Ctrl-C, which a terminal sends to all: the first process ends the others."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().launch_inference_worker(lit_api)
        finally:
            signal.signal(signal.SIGINT, before)

    def verify_worker_status(self) -> None:
        """Waits for the model. LitServe would wait for one that was killed, too."""
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            if not all(worker.is_alive() for worker in self.inference_workers):
                raise RunError("The model could not be loaded; what stands above says why.")
            time.sleep(0.05)

    def _start_server(
        self, port: int, servers: int, log_level: str, sockets: list[socket], *args: Any, **kw: Any
    ) -> Any:
        for each in sockets:
            each.listen()  # who comes before the process does is kept waiting, and not refused
        started = super()._start_server(port, servers, log_level, sockets, *args, **kw)
        threading.Thread(target=self._watch, args=(started[0],), daemon=True).start()
        print(self.greeting, flush=True)
        return started

    def _watch(self, http: BaseProcess) -> None:
        """Ends everything when the process that speaks HTTP is lost; LitServe looks after the model's alone."""
        http.join()
        with suppress(EOFError, OSError):  # it was all ending anyway
            self._shutdown_event.set()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """What happens around the service of the process that speaks HTTP."""
        _leave_with_parent()
        async with super().lifespan(app):
            yield

    def serve(self, host: str, port: int) -> None:
        """Until a signal ends it, which is an Interrupted, or one of its processes is lost, which is a RunError."""
        first, signals = os.getpid(), []

        def stop(number: int, _: Optional[FrameType]) -> None:
            if os.getpid() != first:  # uvicorn's process: it raises again what it was ended by
                os._exit(0)
            signals.append(number)
            raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        reason = "The server has lost a process; what stands above says why."
        try:
            self.run(host, port, num_api_servers=1, log_level="error", generate_client_file=False)
        except SystemExit:  # uvicorn's, where somebody was faster
            reason = f"The server cannot have port {port} of {host}."
        except (KeyboardInterrupt, EOFError, OSError):  # the last two from LitServe's queues, when a process is lost
            pass
        finally:
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
            for number, handler in before.items():
                signal.signal(number, handler)
        if signals:
            raise Interrupted(signals[0])
        raise RunError(reason)


def _leave_with_parent() -> None:
    """Has this process end when the one that started it is lost, and can no longer end it."""

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


async def _in_form(_: Request, error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    if isinstance(error, HTTPException):  # a path or a method that is not there
        error = Refused(error.status_code, str(error.detail))
    elif not isinstance(error, Refused):
        error = Refused(500, "The server failed at this request; its log says how.")
    return JSONResponse(error.body, error.status)
