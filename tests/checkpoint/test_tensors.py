"""Tensor files: what is written is what the safetensors library reads, and what is broken is named."""

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from litfreeze.checkpoint import tensors as module
from litfreeze.checkpoint.tensors import (
    SAFETENSORS_DTYPES,
    TensorDirectory,
    TensorFile,
    is_mapped,
    pieces,
    sha256,
    write_tensors,
)
from litfreeze.errors import UsageError
from litfreeze.whole import replace_directory, settle_directory, whole_directory, write_text


def raw(tensor):
    """The tensor's bytes, row-major, whatever they mean (NaNs compare too)."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def any_tensor(draw):
    """Any dtype, 0 to 3 dimensions, perhaps empty, perhaps a view that does not lie row by row in memory."""
    dtype = draw(st.sampled_from(list(SAFETENSORS_DTYPES)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(high, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = data.view(dtype).view(shape)
    view = draw(st.sampled_from(["as it is", "transposed", "every other", "expanded"]))
    if view == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.ndim))))
    if view == "every other" and tensor.ndim:
        return tensor[..., ::2]
    if view == "expanded":
        return tensor.expand(3, *tensor.shape)
    return tensor


def layout_of(weights):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


named_tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), any_tensor(), max_size=6
)


@settings(max_examples=100)
@given(weights=named_tensors, limit=st.sampled_from([1, 100, 10**9]))
def test_the_safetensors_library_reads_what_was_written(weights, limit):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        hashes = write_tensors(folder, "model", layout_of(weights), weights.__getitem__, max_shard_bytes=limit)
        files = sorted(folder.glob("*.safetensors"))
        read = {}
        for file in files:
            read |= safetensors.torch.load_file(file)
            header = int.from_bytes(file.read_bytes()[:8], "little")
            assert (8 + header) % 64 == 0, "the data does not begin at a multiple of 64"
        assert {name: (t.dtype, t.shape) for name, t in read.items()} == layout_of(weights)
        assert {name: raw(t) for name, t in read.items()} == {name: raw(t) for name, t in weights.items()}
        assert hashes == {name: hashlib.sha256(raw(t)).hexdigest() for name, t in weights.items()}
        assert hashes == {name: sha256(t, t.dtype) for name, t in weights.items()}

        for file in files:
            sizes = [tensor.nbytes for tensor in safetensors.torch.load_file(file).values()]
            assert sum(sizes) <= limit or sum(size > 0 for size in sizes) == 1
        index = folder / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1)
        ours = TensorDirectory(folder, ["model.safetensors"])
        assert {name: ours.layout(name) for name in ours} == layout_of(weights)
        assert all(raw(ours[name]) == raw(weights[name]) for name in weights)
        if index.exists():
            content = json.loads(index.read_text("utf-8"))
            assert content["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
            assert {*content["weight_map"].values()} == {file.name for file in files}


def test_metadata_tells_transformers_that_the_tensors_are_torchs(tmp_path):
    write_tensors(tmp_path, "model", {}, {}.__getitem__)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_cast_to_the_dtype_of_the_layout(tmp_path):
    weight = torch.randn(5, 3)
    hashes = write_tensors(tmp_path, "model", {"w": (torch.bfloat16, (5, 3))}, {"w": weight}.__getitem__)
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")["w"]
    assert torch.equal(written, weight.bfloat16())
    assert hashes["w"] == sha256(written, torch.bfloat16) == sha256(weight, torch.bfloat16)


@pytest.mark.parametrize("tensor", [torch.randn(7, 5), torch.randn(5, 7).T, torch.randn(35), torch.randn(2, 3, 5)])
@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_the_size_of_the_pieces_changes_nothing(tensor, size, monkeypatch):
    monkeypatch.setattr(module, "PIECE", size)
    assert b"".join(piece.numpy().tobytes() for piece in pieces(tensor, torch.float32)) == raw(tensor)


# --- broken and hostile files ----------------------------------------------------------------------------------------

WEIGHTS = {"a.weight": torch.randn(20, 7), "b": torch.randn(3).bfloat16()}


def zipped(content=WEIGHTS):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def legacy(content=WEIGHTS):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


WHOLE = {
    "model.safetensors": safetensors.torch.save(WEIGHTS),
    "pytorch_model.bin": zipped(),
    "before torch 1.6.bin": legacy(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_kind_of_file_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(WHOLE[name])
    file = TensorFile(tmp_path / name)
    assert file.layout == layout_of(WEIGHTS)
    assert all(torch.equal(file.read(key), tensor) for key, tensor in WEIGHTS.items())


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60)
@given(data=st.data())
def test_a_truncated_file_is_refused_by_name(name, data):
    content = WHOLE[name][: data.draw(st.integers(0, len(WHOLE[name]) - 1))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        with pytest.raises(UsageError) as refusal:
            TensorFile(path)
        assert str(path) in str(refusal.value)
        assert "truncated" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_read_or_refused(name, data):
    content = bytearray(WHOLE[name])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)):
        content[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            file = TensorFile(path)
        except UsageError as refusal:
            assert str(path) in str(refusal)
        else:
            assert all(file.read(key).shape == shape for key, (_, shape) in file.layout.items())


class Touch:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.mark.parametrize("written", [zipped, legacy])
def test_a_pickle_cannot_run_anything(written, tmp_path):
    path, touched = tmp_path / "pytorch_model.bin", tmp_path / "touched"
    path.write_bytes(written({"a": torch.ones(1), "b": Touch(touched)}))
    with pytest.raises(UsageError, match="holds more than plain tensors"):
        TensorFile(path)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists(), "the pickle was harmless, so the test showed nothing"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (torch.ones(1), "does not hold a flat dict of tensors"),
        ({"a": 1}, "does not hold a flat dict of tensors"),
        ({"model": {"a": torch.ones(1)}}, "does not hold a flat dict of tensors"),
        ({1: torch.ones(1)}, "does not hold a flat dict of tensors"),
        ({"a": torch.ones(2, 2).to_sparse()}, "does not hold a flat dict of tensors"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a is stored as torch.complex64"),
    ],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused(content, told, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zipped(content))
    with pytest.raises(UsageError, match=told):
        TensorFile(path)


def test_a_safetensors_dtype_that_we_cannot_use_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="a is stored as F8_E4M3"):
        TensorFile(tmp_path / "model.safetensors")


# --- an index of several files ---------------------------------------------------------------------------------------


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ({"a": "../outside.safetensors"}, "points outside its directory: '../outside.safetensors'"),
        ({"a": "/etc/passwd"}, "points outside its directory: '/etc/passwd'"),
        ({"a": ".."}, "does not exist"),
        ({"a": ""}, "does not exist"),
        ({"a": "gone.safetensors"}, "gone.safetensors does not exist"),
        (
            {"a": "one.safetensors", "c": "one.safetensors"},
            "one.safetensors lacks c, which model.safetensors.index.json",
        ),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "two.safetensors: a also stands in one.safetensors"),
        ({"a": 5}, "is no index of tensor files"),
        ({"a": ["one.safetensors"]}, "is no index of tensor files"),
        ([], "is no index of tensor files"),
        (None, "is no index of tensor files"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(index, told, tmp_path):
    inside = tmp_path / "model"
    inside.mkdir()
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, inside / "one.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1), "b": torch.ones(1)}, inside / "two.safetensors")
    write_index(inside, index)
    with pytest.raises(UsageError) as refusal:
        TensorDirectory(inside, ["model.safetensors"])
    assert str(inside) in str(refusal.value)
    assert told in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_a_broken_index_is_named(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=r"model\.safetensors\.index\.json"):
        TensorDirectory(tmp_path, ["model.safetensors"])


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"has no weights: looked for model\.safetensors, pytorch_model\.bin"):
        TensorDirectory(tmp_path, ["model.safetensors", "pytorch_model.bin"])


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there_before", [False, True])
def test_a_directory_appears_when_it_is_whole(tmp_path, there_before):
    path = tmp_path / "deep" / "out"
    if there_before:
        path.mkdir(parents=True)
    with whole_directory(path) as aside:
        (aside / "a").write_text("1", "utf-8")
        assert not path.exists() or not any(path.iterdir())
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_nothing(tmp_path, interruption):
    weights = {"a": torch.ones(3), "b": torch.ones(3)}

    def read(name):
        if name == "b":
            raise interruption
        return weights[name]

    with pytest.raises(interruption), whole_directory(tmp_path / "out") as aside:
        write_tensors(aside, "model", layout_of(weights), read, max_shard_bytes=12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("holding", ["a file", "a folder with a file"])
def test_what_is_there_is_not_overwritten(tmp_path, holding):
    path = tmp_path / "out"
    kept = path if holding == "a file" else path / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine", "utf-8")
    with pytest.raises(UsageError, match=r"out is not empty\. Choose another --out_dir"), whole_directory(path):
        pytest.fail("the block ran")
    assert kept.read_text("utf-8") == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_the_current_directory_can_be_written_to(tmp_path, monkeypatch):
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    with whole_directory(Path()) as aside:
        (aside / "a").touch()
    assert (path / "a").exists()


def test_a_link_to_an_empty_directory_can_be_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with whole_directory(tmp_path / "out") as aside:
        (aside / "a").touch()
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "a").exists()


def test_a_directory_is_replaced_by_a_finished_one(tmp_path):
    path = tmp_path / "best"
    for leftover in (".best.old", ".best.new"):  # what a killed run left behind
        (tmp_path / leftover).mkdir()

        def write(place, name=leftover):
            with whole_directory(place) as aside:
                (aside / name).touch()

        replace_directory(path, write)
        assert [file.name for file in path.iterdir()] == [leftover]
        assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_cut_short_at_any_moment_is_settled(tmp_path, monkeypatch):
    """Ended before each rename and each removal in turn."""

    class Killed(BaseException):
        pass

    def write(place, name="new"):
        with whole_directory(place) as aside:
            (aside / name).touch()

    def ends_after(moment, patch):
        done = []
        for owner, name in ((Path, "rename"), (shutil, "rmtree")):

            def step(*args, plain=getattr(owner, name), **kwargs):
                done.append(1)
                if len(done) > moment:
                    raise Killed
                return plain(*args, **kwargs)

            patch.setattr(owner, name, step)

    ended = []
    for moment in range(12):
        path = tmp_path / str(moment) / "best"
        write(path, "old")
        try:
            with monkeypatch.context() as patch:
                ends_after(moment, patch)
                replace_directory(path, write)
                ended.append(moment)
        except Killed:
            pass
        settle_directory(path)
        found = [file.name for file in path.iterdir()]
        assert found == ["new"] if moment in ended else found in (["old"], ["new"])
        assert not {".best.new", ".best.old"} & {child.name for child in path.parent.iterdir()}
    assert 0 < len(ended) < 10


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before", "utf-8")
    write_text(path, "naïve 你好\n")
    assert path.read_bytes() == "naïve 你好\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == "naïve 你好\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_was_read_may_be_changed_and_the_file_reads_as_before(tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    tensors = {"a": torch.ones(3, 4), "b": torch.zeros(2)}
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(tensors, path)
    file = TensorFile(path)
    file.read("a").add_(1)
    assert torch.equal(file.read("a"), torch.ones(3, 4)) and torch.equal(file.read("b"), torch.zeros(2))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted as Linux shows them")
def test_what_is_mapped_holds_no_file_open_and_knows_itself(tmp_path):
    """A large model has more tensors than a process may have files."""
    weights = {f"w{i}": torch.full((3, i + 1), float(i)) for i in range(40)}
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    file, before = TensorFile(tmp_path / "w.safetensors"), len(list(Path("/proc/self/fd").iterdir()))
    read = {name: file.read(name) for name in weights}
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(torch.equal(read[name], weights[name]) and is_mapped(read[name]) for name in weights)
    assert not any(is_mapped(tensor.double()) or is_mapped(tensor.clone()) for tensor in read.values())
