"""A GGUF file: its metadata and its tensors, read and written one tensor at a time.

The gguf package knows the formats of tensors and writes the file. Its reader is not used: it makes an array of every
token (Gemma's vocabulary: 11 s, 700 MB), and what it reads beyond the end of a damaged file it takes for empty."""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from litfreeze.checkpoint.tensors import PIECE, map_bytes, pieces
from litfreeze.errors import UsageError
from litfreeze.whole import whole_file

try:  # whoever uses GGUF comes by here first
    import gguf
    from gguf import GGMLQuantizationType as Kind
except ImportError:
    raise UsageError("GGUF needs the gguf package. Install it: pip install 'litfreeze[gguf]'.") from None

# Value types of the metadata, by number
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # uint8 … bool; uint64, int64, float64
STRING, ARRAY = 8, 9
FLOATS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file, and how. `shape` is torch's, rows first."""

    kind: Kind
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """An opened file. `metadata` is by key, `places` by tensor name; `read` gives a tensor as floats.

    Everything is checked on opening: UsageError if it is absent, truncated, of another version, or holds tensors in a
    format that the gguf package does not turn into floats."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            kind = "is a directory, no GGUF file" if path.is_dir() else "does not exist, or is no file"
            raise UsageError(f"{path} {kind}.")
        try:
            data = np.memmap(path, mode="r")
            self.metadata, self.places = _Header(data).read()
        except (ValueError, OverflowError, struct.error) as error:
            raise UsageError(f"{path} is truncated or no GGUF file ({error}). Download it again.") from None
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise UsageError(f"{path} is one part of a split model. Join its parts first: llama-gguf-split --merge.")
        for kind in {place.kind: None for place in self.places.values()}:
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                name = next(name for name, place in self.places.items() if place.kind is kind)
                raise UsageError(f"{path}: {name} is stored as {kind.name}, which litfreeze cannot read.") from None

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that holds the tensor `name`: its own, or bfloat16 for what is quantised to fewer bits."""
        return FLOATS.get(self.places[name].kind, torch.bfloat16)

    def read(self, name: str, dtype: torch.dtype, part: Optional[int] = None) -> Tensor:
        """The tensor `name`, or of several matrices in one, (E, …), that with the number `part`, in `dtype`; mapped, if
        that is how it is stored. Memory holds it and 64 MiB."""
        place = self.places[name]
        if part is not None:
            nbytes = place.nbytes // place.shape[0]
            place = Place(place.kind, place.shape[1:], place.start + part * nbytes, nbytes)
        stored = map_bytes(self.path, place.start, place.nbytes)
        if place.kind in FLOATS:
            return stored.view(FLOATS[place.kind]).view(place.shape).to(dtype)
        rows = stored.view(-1, place.nbytes * place.shape[-1] // math.prod(place.shape))
        result = torch.empty(len(rows), place.shape[-1], dtype=dtype)
        step = max(1, PIECE // (4 * place.shape[-1]))
        for part, target in zip(rows.split(step), result.split(step), strict=True):
            target.copy_(torch.from_numpy(gguf.dequantize(part.numpy(), place.kind)))
        return result.view(place.shape)


class _Header:
    """What stands before the tensors, read from front to back. Raises ValueError or struct.error."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Place]]:
        magic, version = self.bytes(4), self.number("I")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported, 2 and 3 are")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in metadata:
                raise ValueError(f"it has {key} twice")
            metadata[key] = self.value(self.number("I"))
        infos = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        data_at = -(-self.at // alignment) * alignment
        places: dict[str, Place] = {}
        for name, kind, shape, offset in infos:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if name in places:
                raise ValueError(f"it has the tensor {name} twice")
            if not shape or 0 in shape or shape[-1] % block:
                raise ValueError(f"{name} of shape {list(shape)} cannot be {kind.name}")
            n, start = math.prod(shape) // block * size, data_at + offset
            if start + n > len(self.data):
                raise ValueError(f"{name} lies beyond its end")
            places[name] = Place(kind, shape, start, n)
        return metadata, places

    def bytes(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))
        # A float32 as the shortest decimal that it is: 1e-05, and not 9.999999747378752e-06
        return float(str(np.float32(value))) if code == "f" else value

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"it has a value of type {kind}")
        kind, n = self.number("I"), self.number("Q")
        if kind in SCALARS:
            code = np.dtype(f"<{SCALARS[kind]}" if SCALARS[kind] != "?" else "?")
            return np.frombuffer(self.bytes(n * code.itemsize), code).tolist()
        if kind != STRING:
            raise ValueError(f"it has an array of type {kind}")
        return [self.text() for _ in range(n)]

    def tensor(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name, n_dims = self.text(), self.number("I")
        if n_dims > 4:
            raise ValueError(f"{name} has {n_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dims))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if number not in set(Kind):
            raise ValueError(f"{name} has the unknown quantisation {number}")
        return name, Kind(number), shape, offset


# --- writing ---------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    arch: str,
    metadata: Mapping[str, Any],
    layout: Mapping[str, tuple[Kind, tuple[int, ...]]],
    read: Callable[[str], Tensor],
) -> None:
    """Writes a GGUF file, whole or not at all. `read(name)` gives each tensor of `layout` when its turn comes; memory
    holds it, what it becomes, and 64 MiB.

    Whole numbers are written as uint32, others as float32. Raises UsageError if `path` exists."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory. Name a file in it: --out_file {path / 'model.gguf'}.")
    if path.exists():
        raise UsageError(f"{path} exists. Choose another --out_file, or move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        try:
            for key, value in metadata.items():
                _add(writer, key, value)
            for name, (kind, shape) in layout.items():
                block, size = gguf.GGML_QUANT_SIZES[kind]
                nbytes = math.prod(shape) // block * size
                writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, (kind, shape) in layout.items():
                tensor = read(name)
                assert tuple(tensor.shape) == tuple(shape), f"{name}: {tuple(tensor.shape)} is not {tuple(shape)}"
                writer.write_tensor_data(_encoded(name, tensor, kind))
        finally:
            writer.close()


def _add(writer: "gguf.GGUFWriter", key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        # Not add_string, which leaves an empty one out
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING)
    else:
        writer.add_array(key, value)


def _encoded(name: str, tensor: Tensor, kind: Kind) -> np.ndarray:
    """The bytes of `tensor` as `kind`: (n,) uint8."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    result, at = np.empty(tensor.numel() // block * size, np.uint8), 0
    for part in pieces(tensor, FLOATS.get(kind, torch.float32)):
        if kind not in FLOATS:
            part = gguf.quantize(part.view(torch.float32).view(-1, tensor.shape[-1]).numpy(), kind).reshape(-1)
        result[at : at + len(part)] = part
        at += len(part)
    if kind is Kind.F16 and tensor.dtype != torch.float16 and np.isinf(result.view(np.float16)).any():
        raise UsageError(f"{name} has values beyond those of f16. Choose --dtype bf16 or f32.")
    return result
