"""Chat completions in OpenAI's form: what a client asks, checked to the last word, and what it is told."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Optional

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
READ = (
    "model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "stop", "seed",
    "stream", "stream_options",
)  # fmt: skip
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # who asks: the answer is the same
# What cannot be done, and the values that do not ask for it. null never does.
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "web_search_options": (),
}


class Refused(Exception):
    """A request that is not answered, with the status and the object that OpenAI's clients make an error of."""

    def __init__(self, status: int, message: str, param: Optional[str] = None, code: Optional[str] = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that goes with the status."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request for one answer. None: the client leaves it to the server."""

    model: str
    messages: list[dict[str, str]]
    temperature: float
    top_p: float
    top_k: Optional[int]
    max_tokens: Optional[int]
    stops: list[str]
    seed: Optional[int]
    stream: bool
    include_usage: bool


def read_request(body: Any, models: Collection[str]) -> Asked:
    """The request in a parsed JSON body. What it leaves out is as OpenAI has it: temperature 1, top_p 1.

    Raises Refused for whatever is unknown, out of range, of the wrong type, or asks for something that is not done."""
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in REFUSED and not any(value == one and type(value) is type(one) for one in REFUSED[name]):
            raise Refused(400, f"{name}: this server cannot do it; leave it out.", name, "unsupported_parameter")
    if unknown := given.keys() - {*READ, *LABELS, *REFUSED}:
        raise Refused(400, f"{min(unknown)}: there is no such parameter here.", min(unknown), "unknown_parameter")
    most = _number(given, "max_tokens", int, "1 or more", lambda n: n >= 1)
    newer = _number(given, "max_completion_tokens", int, "1 or more", lambda n: n >= 1)
    if None not in (most, newer) and most != newer:
        raise Refused(400, "max_tokens and max_completion_tokens differ; give one of them.", "max_tokens")
    stream, options = _switch(given, "stream"), given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise Refused(400, "stream_options: only include_usage is known here.", "stream_options")
    if options and not stream:
        raise Refused(400, "stream_options goes with stream: true.", "stream_options")
    return Asked(
        model=_model(given.get("model"), models),
        messages=_messages(given.get("messages")),
        temperature=_number(given, "temperature", float, "from 0 to 2", lambda t: 0 <= t <= 2, 1.0),
        top_p=_number(given, "top_p", float, "above 0 and at most 1", lambda p: 0 < p <= 1, 1.0),
        top_k=_number(given, "top_k", int, "1 or more", lambda k: k >= 1),
        max_tokens=newer if most is None else most,
        stops=_stops(given.get("stop", [])),
        seed=_number(given, "seed", int, "a 64-bit number", lambda s: -(2**63) <= s < 2**63),
        stream=stream,
        include_usage=_switch(options, "include_usage"),
    )


def _number(
    given: Mapping[str, Any], name: str, kind: type, range: str, fits: Callable[[Any], bool], otherwise: Any = None
) -> Any:
    value = given.get(name, otherwise)
    if value is None:
        return None
    if type(value) not in (int, kind) or not fits(value):
        raise Refused(400, f"{name} must be a {'whole ' if kind is int else ''}number, {range}.", name)
    return value


def _switch(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} must be true or false.", name)
    return bool(value)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop must be a text or a list of texts, none of them empty.", "stop")
    return stops


def _model(name: Any, models: Collection[str]) -> str:
    served = f"Served here: {', '.join(models)}."
    if not isinstance(name, str):
        raise Refused(400, f"model must name a model. {served}", "model")
    if name not in models:
        raise Refused(404, f"There is no model {name[:80]!r}. {served}", "model", "model_not_found")
    return name


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages must be a list of one message or more.", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, str]:
    """Its role and its text; parts of text are put together."""
    given = message if isinstance(message, dict) else {}
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(400, f"{place}: a role must be one of {', '.join(ROLES)}.", place)
    if more := [name for name, value in given.items() if value is not None and name not in ("role", "content")]:
        raise Refused(400, f"{place}: this server cannot use {more[0]}; leave it out.", place)
    content = given.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if strange := [part for part in parts if not isinstance(part, dict) or part.get("type") != "text"]:
        kind = strange[0].get("type") if isinstance(strange[0], dict) else strange[0]
        raise Refused(400, f"{place}: this server reads text alone, and no {str(kind)[:40]!r}.", place)
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise Refused(400, f"{place}: its content must be a text.", place)
    text = "".join(part["text"] for part in parts)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused(400, f"{place}: its content has half a character (a lone surrogate).", place)
    return {"role": ROLES[role], "content": text}


# ---- what is sent back ----


def completion(id: str, model: str, created: int, text: str, finish_reason: str, usage: Mapping[str, int]) -> dict:
    """The whole answer in one object."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": dict(usage),
    }


def chunk(
    id: str,
    model: str,
    created: int,
    delta: Optional[Mapping[str, str]],
    finish_reason: Optional[str] = None,
    usage: Optional[Mapping[str, int]] = None,
) -> dict:
    """A piece of an answer; without a `delta`, the last one, which has no choice but the `usage`."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [] if delta is None else [choice],
        "usage": usage,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The tokens that a model has read and written, its end token not among them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
