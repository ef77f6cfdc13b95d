"""Records to messages or plain text: Alpaca, chat, prompt/completion and text, told by their keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from litfreeze.errors import UsageError

Message = dict[str, Any]  # role: system, user, assistant or tool; content: text; whatever else the record gives

_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}


def to_conversation(fields: Mapping[str, Any], format: str = "auto") -> list[Message] | str:
    """The messages of a record, or its plain text.

    A `system` key beside Alpaca, ShareGPT or prompt/completion keys, and `history` (pairs of an earlier prompt and its
    answer) beside Alpaca or prompt/completion keys, become messages before the others.

    Args:
        fields: The record. Keys that the format does not use are left aside: `used_keys` has the others.
        format: auto, alpaca, chat, completion or text. auto takes the first that fits, in the order chat, alpaca,
            completion, text.

    Raises:
        UsageError: Keys are missing, or a value has the wrong type.
    """
    formats = {"chat": _chat, "alpaca": _alpaca, "completion": _completion, "text": _text}
    for name in formats if format == "auto" else [format]:
        conversation = formats[name](fields)
        if conversation is not None:
            return conversation
    wanted = _KEYS if format == "auto" else {format: _KEYS[format]}
    raise UsageError(f"has the keys {', '.join(map(repr, fields)) or 'none'}; known are {'; '.join(wanted.values())}")


_KEYS = {
    "chat": "messages or conversations",
    "alpaca": "instruction and output",
    "completion": "prompt and completion (or response), question and answer",
    "text": "text",
}


def used_keys(fields: Mapping[str, Any], format: str = "auto") -> frozenset[str]:
    """The keys that `to_conversation` looks at in a record of which it made something."""
    if format in ("auto", "chat") and (key := next((k for k in ("messages", "conversations") if k in fields), None)):
        return frozenset((key, "system"))
    if format in ("auto", "alpaca") and "instruction" in fields and "output" in fields:
        return _ALPACA
    if format in ("auto", "completion"):
        for pair in _PAIRS:
            if fields.keys() >= set(pair):
                return frozenset((*pair, "system", *(["history"] if isinstance(fields.get("history"), list) else [])))
    return frozenset(("text",))


def lacking(given: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the keys `names` that a record has no value for, and of which it has the other half: 'output' beside an
    instruction. None where it is whole by other keys."""
    pairs = (("instruction", "output"), *_PAIRS)
    if given.keys() & {"messages", "conversations"} or any(given.keys() >= set(pair) for pair in pairs):
        return []
    return [
        absent
        for pair in pairs
        for here, absent in (pair, pair[::-1])
        if here in given and absent in names and absent not in given
    ]


_ALPACA = frozenset(("instruction", "input", "output", "system", "history"))


def _chat(fields: Mapping[str, Any]) -> list[Message] | None:
    if "messages" in fields:
        return _turns(fields, "messages", "role", "content")
    if "conversations" in fields:
        turns = fields["conversations"]
        # Both spellings are found under this key.
        openai = isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
        return _turns(fields, "conversations", *(("role", "content") if openai else ("from", "value")))
    return None


def _turns(fields: Mapping[str, Any], key: str, role_key: str, content_key: str) -> list[Message]:
    turns = fields[key]
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{key!r} should be a list of messages")
    messages = _system(fields)
    messages += [_turn(turn, f"message {i} of {key!r}", role_key, content_key) for i, turn in enumerate(turns, start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise UsageError(f"{key!r} holds no assistant message to learn from")
    return messages


def _turn(turn: Any, where: str, role_key: str = "role", content_key: str = "content") -> Message:
    if not isinstance(turn, dict):
        raise UsageError(f"{where} should be an object with {role_key!r} and {content_key!r}")
    role = _ROLES.get(text_in(turn, role_key, where))
    if role is None:
        raise UsageError(f"{where} has the unknown {role_key} {turn[role_key]!r}; known are {', '.join(_ROLES)}")
    others = {name: value for name, value in turn.items() if name not in (role_key, content_key)}
    if others.get("weight") not in (None, 0, 1):
        raise UsageError(f"{where} has the weight {others['weight']!r}; known are 0, not to be learned, and 1")
    return {"role": role, "content": text_in(turn, content_key, where), **others}


def to_messages(turns: Any) -> list[Message]:
    """`turns`, a list or tuple of messages with `role` and `content`, checked as those of a record are, but that none
    needs to be an answer. Raises UsageError for anything else."""
    if not isinstance(turns, (list, tuple)) or not turns:
        what = "an empty one" if isinstance(turns, (list, tuple)) else type(turns).__name__
        raise UsageError(f"messages should be a list, [{{'role': 'user', 'content': '...'}}], not {what}.")
    return [_turn(turn, f"message {number}") for number, turn in enumerate(turns, start=1)]


def _alpaca(fields: Mapping[str, Any]) -> list[Message] | None:
    if "instruction" not in fields or "output" not in fields:
        return None
    messages = [*_system(fields), *_history(fields)]
    instruction = text_in(fields, "instruction")
    user: Message = {"role": "user", "content": instruction}
    if fields.get("input"):
        # The alpaca style writes the two under headings of their own; every other style takes the content.
        given = text_in(fields, "input")
        user |= {"content": f"{instruction}\n\n{given}", "instruction": instruction, "input": given}
    return [*messages, user, {"role": "assistant", "content": text_in(fields, "output")}]


def _completion(fields: Mapping[str, Any]) -> list[Message] | None:
    for prompt, completion in _PAIRS:
        if prompt in fields and completion in fields:
            return [
                *_system(fields),
                *(_history(fields) if isinstance(fields.get("history"), list) else []),
                {"role": "user", "content": text_in(fields, prompt)},
                {"role": "assistant", "content": text_in(fields, completion)},
            ]
    return None


def _text(fields: Mapping[str, Any]) -> str | None:
    return text_in(fields, "text") if "text" in fields else None


def _system(fields: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": text_in(fields, "system")}] if fields.get("system") else []


def _history(fields: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise UsageError("'history' should be a list of [instruction, output] pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise UsageError("'history' should be a list of [instruction, output] pairs")
        earlier = {"instruction": pair[0], "output": pair[1]}
        messages.append({"role": "user", "content": text_in(earlier, "instruction", "'history'")})
        messages.append({"role": "assistant", "content": text_in(earlier, "output", "'history'")})
    return messages


def text_in(fields: Mapping[str, Any], key: str, where: str = "") -> str:
    """`fields[key]`, if it is text that can be written as UTF-8."""
    prefix = f"{where}: " if where else ""
    if key not in fields:
        raise UsageError(f"{prefix}{key!r} is missing")
    value = fields[key]
    if not isinstance(value, str):
        what = getattr(value, "what", "null" if value is None else type(value).__name__)
        raise UsageError(f"{prefix}{key!r} should be text, not {what}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{prefix}{key!r} holds half of a surrogate pair, which is no character") from None
    return value
