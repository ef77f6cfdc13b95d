"""Tensor files: read one tensor at a time, write one tensor at a time.

Reading maps the file, so a tensor costs memory only where it is touched and only while it is held. Writing follows the
safetensors format by hand because its library wants every tensor at once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litfreeze.errors import UsageError
from litfreeze.json_file import read_json
from litfreeze.whole import write_text

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype, shape

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

PIECE = 64 * 1024**2  # bytes in memory at once when a tensor is cast, hashed and written


class TensorFile:
    """One .safetensors file, or one pickled .bin/.pth read with `weights_only=True`.

    `layout` is known on opening; `read(name)` maps the file and returns the tensor, backed by the file. Raises
    UsageError, naming the file, if it is absent, truncated or not what its name says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}  # of a .safetensors: first byte of a tensor, and how many
        self.unpickled: dict[str, Tensor] = {}  # of a .bin: mapped, and what was read of it
        self.touched = 0
        try:
            if not path.is_file():
                raise UsageError(f"{path} does not exist.")
            self.layout = self._safetensors_layout() if path.suffix == ".safetensors" else self._pickle_layout()
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is truncated or no safetensors file ({error}). Download it again.") from None

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, mapped (changing it in memory leaves the file alone). It has a mapping of its
        own, so that letting go of it frees what of it was touched."""
        if self.path.suffix == ".safetensors":
            (dtype, shape), (start, size) = self.layout[name], self.places[name]
            mapped = map_bytes(self.path, start, size)
            aligned = mapped if start % dtype.itemsize == 0 else mapped.clone()
            return aligned.view(dtype).view(shape)
        # Unpickling takes a while, so it serves several tensors; what they read stays in memory until the next time.
        # Each is handed out once: whoever has it may change it
        if name not in self.unpickled or self.touched > PIECE:
            self.unpickled, self.touched = self._unpickle(), 0
        self.touched += nbytes(*self.layout[name])
        return self.unpickled.pop(name)

    def _safetensors_layout(self) -> Layout:
        with safe_open(self.path, framework="pt") as file:
            layout: Layout = {}
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UsageError(
                        f"{self.path}: {name} is stored as {part.get_dtype()}, which litfreeze cannot use."
                    )
                layout[name] = DTYPES[part.get_dtype()], tuple(part.get_shape())
        with self.path.open("rb") as file:  # the library has checked the header, but tells no places
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name in layout:
            start, stop = header[name]["data_offsets"]
            self.places[name] = 8 + length + start, stop - start
        return layout

    def _pickle_layout(self) -> Layout:
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._unpickle().items()}
        for name, (dtype, _) in layout.items():
            if dtype not in SAFETENSORS_DTYPES:
                raise UsageError(f"{self.path}: {name} is stored as {dtype}, which litfreeze cannot use.")
        return layout

    def _unpickle(self) -> dict[str, Tensor]:
        try:
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(self.path, map_location="cpu", weights_only=True)  # a file from before torch 1.6
        except Exception as error:  # a broken pickle fails in whatever way its bytes happen to mean
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UsageError(f"{self.path} is truncated, or holds more than plain tensors ({reason}).") from None
        flat = isinstance(content, dict) and all(
            isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
            for name, value in content.items()
        )
        if not flat:
            raise UsageError(f"{self.path} does not hold a flat dict of tensors.")
        return content


def map_bytes(path: Path, start: int, size: int) -> Tensor:
    """`size` bytes of a file from `start` on, mapped: (size,) uint8. Changing them in memory leaves the file alone."""
    # Not numpy's mapping, which holds a file descriptor as long as it lives
    return torch.from_file(str(path), shared=False, size=start + size, dtype=torch.uint8)[start:]


def is_mapped(tensor: Tensor) -> bool:
    """Whether `tensor`, as `TensorFile.read` gave it, still is a piece of the mapped file and no copy: its storage then
    begins with the file's header."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() > tensor.nbytes


class TensorDirectory(Mapping):
    """The tensors of a directory by name, over one file or an index of several.

    `stems` are file names to look for, best first: "model.safetensors" also finds "model.safetensors.index.json".
    Raises UsageError if none is there, or a file of the index is missing or outside the directory."""

    def __init__(self, path: Path, stems: Iterable[str]) -> None:
        self.path = path
        self.files: dict[str, TensorFile] = {}  # tensor name -> file
        for file in self._find(list(stems)):
            for name in file.layout:
                if name in self.files:
                    raise UsageError(f"{file.path}: {name} also stands in {self.files[name].path.name}.")
                self.files[name] = file

    def _find(self, stems: list[str]) -> Iterator[TensorFile]:
        for stem in stems:
            if (self.path / stem).is_file():
                yield TensorFile(self.path / stem)
                return
            index = self.path / f"{stem}.index.json"
            if index.is_file():
                yield from self._indexed(index)
                return
        raise UsageError(f"{self.path} has no weights: looked for {', '.join(stems)} and their .index.json.")

    def _indexed(self, index: Path) -> Iterator[TensorFile]:
        weight_map = read_index(index)
        for name in sorted(set(weight_map.values())):
            file = TensorFile(self.path / name)
            if absent := [t for t, f in weight_map.items() if f == name and t not in file.layout]:
                raise UsageError(f"{file.path} lacks {absent[0]}, which {index.name} says it holds.")
            yield file

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.files[name].layout[name]


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index of several says. Raises UsageError if it is none, or names a file outside
    of its directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{index} is no index of tensor files: its weight_map must give each tensor a file.")
    if outside := [name for name in weight_map.values() if Path(name).name != name]:
        raise UsageError(f"{index} points outside its directory: {outside[0]!r}.")
    return weight_map


def write_tensors(
    directory: Path,
    stem: str,
    layout: Layout,
    read: Callable[[str], Tensor],
    max_shard_bytes: int = 5 * 10**9,
) -> dict[str, str]:
    """Writes `layout`, in its order, to `stem`.safetensors, or to numbered shards with an index.

    `read(name)` gives each tensor when its turn comes; it is cast to the layout's dtype piece by piece, so that memory
    holds one tensor and 64 MiB. Files are fsynced. Returns sha256 of each tensor's bytes, by name."""
    shards = _shards(layout, max_shard_bytes)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = directory / f"{stem}{part}.safetensors"
        _write_shard(file, {name: layout[name] for name in names}, read, hashes)
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        total = sum(nbytes(*entry) for entry in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(directory / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return hashes


def _shards(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + nbytes(*entry) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(*entry)
    return shards


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


def _write_shard(file: Path, layout: Layout, read: Callable[[str], Tensor], hashes: dict[str, str]) -> None:
    """safetensors: the header's length (8 bytes, little-endian), the header (JSON), the tensors' bytes."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + nbytes(dtype, shape)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # the data begins at a multiple of 64: a mapped tensor is aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            tensor = read(name)
            assert tuple(tensor.shape) == tuple(shape), f"{name}: {tuple(tensor.shape)} is not {tuple(shape)}"
            digest = hashlib.sha256()
            for piece in pieces(tensor, dtype):
                digest.update(piece.numpy())
                out.write(piece.numpy())
            hashes[name] = digest.hexdigest()
        out.flush()
        os.fsync(out.fileno())


def pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The bytes of `tensor` in `dtype`, row-major, about 64 MiB at a time: (n,) uint8 each, on the CPU."""
    rows = tensor.detach().reshape(-1) if tensor.ndim < 2 else tensor.detach()
    step = max(1, PIECE // max(1, rows[:1].numel() * dtype.itemsize))
    for part in rows.split(step):
        yield as_bytes(part.to(device="cpu", dtype=dtype))


def same_bits(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal to the bit once both are in `dtype`: -0.0 is not 0.0, and a NaN equals itself."""
    return a.shape == b.shape and all(map(torch.equal, pieces(a, dtype), pieces(b, dtype)))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of `tensor`, row-major: (n,) uint8, the same memory if it lies in order."""
    tensor = tensor.contiguous()
    # view(-1) would keep the stride of a single element, which may be anything
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def sha256(tensor: Tensor, dtype: torch.dtype) -> str:
    """sha256 of the tensor's bytes in `dtype`."""
    digest = hashlib.sha256()
    for piece in pieces(tensor, dtype):
        digest.update(piece.numpy())
    return digest.hexdigest()
