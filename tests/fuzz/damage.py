"""What can be wrong with a file: bytes that are lost, flipped or added, values of another kind, and no file at all."""

import json
import math
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

DEEP: Any = None
for _ in range(200):
    DEEP = [DEEP]
# What stands in the place of a value, or beside one
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**62, -(2**63), 10**30, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf,
    -math.inf, "", "x", "0", "1e400", "../../etc/passwd", "a\nb\nc", "\x1b[31m", "\ud800", "\0", "é" * 50, "x" * 5000,
    [], {}, [[]], [None], ["x"], [1, 2], [-1, 2**40], {"x": 1}, {"": None}, {"0": {"0": 0}}, DEEP,
]  # fmt: skip
# What stands in the place of a few bytes, or between two
BYTES = [
    b"", b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",",
    b":", b"\n", b"\r", b"\t", b"-", b"e9", b"9" * 5000, b"1" * 40, b"NaN", b"null", b" " * 3000, b"[" * 3000,
    b'{"a":' * 2000, b"x" * 100_000, b"&a *a", b"!!python/object:os.system", b"{{", b"{%", b"\\ud800", b"\\u0000",
    b"<|end|>",
]  # fmt: skip


def break_bytes(data: bytes, rng: Random) -> bytes:
    """`data` with some of it lost, flipped, moved or replaced."""
    i = rng.randrange(len(data) + 1)
    j = min(len(data), i + rng.choice((1, 1, 2, 8, 64, 1000)))
    kind = rng.choice(("cut", "cut", "flip", "flip", "put", "put", "put", "lose", "twice", "tail", "whole", "encode"))
    if kind == "cut":
        return data[:i]
    if kind == "flip":
        return data[:i] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[i:j]) + data[j:]
    if kind == "put":
        return data[:i] + rng.choice(BYTES) + data[i if rng.random() < 0.5 else j :]
    if kind == "lose":
        return data[:i] + data[j:]
    if kind == "twice":
        return data[:j] + data[i:]
    if kind == "tail":
        return data[i:]
    if kind == "whole":
        return rng.choice((b"", b"\n", rng.randbytes(200), b"[" * 100_000, b"\xef\xbb\xbf" + data, data + data))
    return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-7")))


def break_start(data: bytes, rng: Random) -> bytes:
    """`data` with its first tenth or so broken: what stands before a file's tensors."""
    i = rng.choice((100, 2000, len(data) // 50, len(data) // 10))
    return break_bytes(data[:i], rng) + data[i:]


def break_value(value: Any, rng: Random) -> Any:
    """A JSON value with something in it missing, of another kind, in another place or there twice."""
    holders = list(_holders(value))
    if not holders:
        return _any(rng)
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key, other = rng.choice(keys), rng.choice(keys)
    kind = rng.choice(
        ("replace", "replace", "replace", "near", "near", "lose", "swap", "add", "wrap", "rename", "order")
    )
    if kind == "replace":
        holder[key] = _any(rng)
    elif kind == "near":
        holder[key] = _near(holder[key], rng)
    elif kind == "lose":
        del holder[key]
    elif kind == "swap":
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "wrap":
        holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3, str(holder[key])))
    elif isinstance(holder, list):
        holder.insert(key, rng.choice((deepcopy(holder[other]), _any(rng)))) if kind == "add" else holder.reverse()
    elif kind == "order":
        held = list(holder.items())
        rng.shuffle(held)
        holder.clear()
        holder.update(held)
    else:
        new = rng.choice(("", "x", "\n\n\n", "\x1b[2J", "\ud800", f"{key}s", key[:-1], key.upper(), "__class__"))
        holder[new] = holder.pop(key) if kind == "rename" else _any(rng)
    return value


def _any(rng: Random) -> Any:
    return deepcopy(rng.choice(VALUES))


def _holders(value: Any):
    """Every list and object in `value` that holds something; what is nested deep below is passed over."""
    found = [value]
    for each in found:
        if isinstance(each, dict | list) and each and len(found) < 2000:
            yield each
            found += each.values() if isinstance(each, dict) else each


def _near(value: Any, rng: Random) -> Any:
    """Something of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, value / 3, str(value), float(value)))
    if isinstance(value, str):
        i = rng.randrange(len(value) + 1)
        return rng.choice(
            (value[:i], value[i:], value + value, value[:i] + "\n" + value[i:], value.upper(), value[::-1])
        )
    return _any(rng)


def break_json(data: bytes, rng: Random) -> bytes:
    """The bytes of a JSON file, with one to three things in it changed, or with bytes broken."""
    if rng.random() < 0.25:
        return break_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = break_value(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.1 and text.startswith("{"):  # a key that is there twice
        text = f"{text[:-1]}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


def break_tensors(data: bytes, rng: Random) -> bytes:
    """The bytes of a safetensors file, with its header changed, or with bytes of header or tensors broken."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.choice(("entry", "entry", "entry", "json", "length", "head", "rest"))
    if kind == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, length + len(rest), 2**31, 2**40, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    if kind == "rest":
        return data[: 8 + length] + break_bytes(rest[:50_000], rng) + rest[50_000 * rng.randrange(2) :]
    if kind == "head":
        header = break_bytes(header, rng)
    elif kind == "json":
        header = break_json(header, rng)
    else:
        entries = json.loads(header)
        names = [name for name in entries if name != "__metadata__"]
        name, other = rng.choice(names), rng.choice(names)
        entry = entries[name]
        start, stop = entry["data_offsets"]
        change = rng.choice(("dtype", "shape", "offsets", "same", "extra", "lose"))
        if change == "dtype":
            entry["dtype"] = rng.choice(
                ("F64", "F32", "F16", "I16", "U8", "BOOL", "F8_E4M3", "C64", "F4", "bf16", "X", None)
            )
        elif change == "shape":
            shape = entry["shape"]
            entry["shape"] = rng.choice((shape[::-1], [*shape, 1], shape[:-1], [-1], [0], [2**62, 4], [1.5], "x", []))
        elif change == "offsets":
            far = rng.choice((0, 1, -1, -start, 2**40, 2**63, 2**64))
            entry["data_offsets"] = rng.choice(
                ([start + far, stop + far], [start, stop + far], [stop, start], [start], [])
            )
        elif change == "same":
            entries[name] = entries[other]
        elif change == "extra":
            entries[rng.choice(("x", "", "../x", "a\nb", "model.embed_tokens.weight"))] = entry
        else:
            del entries[name]
        header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + rest


def break_file(path: Path, data: bytes) -> None:
    """Puts `data` in the place of the file `path`, which may be a link to a good one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def no_file(path: Path, rng: Random) -> None:
    """Puts something in the place of `path` that is no file."""
    path.unlink(missing_ok=True)
    kind = rng.choice(("nothing", "folder", "loop", "dangling"))
    if kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to(path.name if kind == "loop" else "nowhere")
