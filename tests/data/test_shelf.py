"""Samples in memory and on disk are the same; a file of them goes with whoever uses it; memory does not grow."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.data import filling
from litfreeze.data.filling import Filling
from litfreeze.data.shelf import IGNORE, Sample, Shelf, learned_of, lengths_of
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError

ids = st.integers(0, 2**31 - 1)


@st.composite
def samples(draw) -> Sample:
    tokens = np.array(draw(st.lists(ids, min_size=2, max_size=12)), np.int32)
    learned = np.array([False, *draw(st.lists(st.booleans(), min_size=len(tokens) - 1, max_size=len(tokens) - 1))])
    source = draw(st.sampled_from(["a.jsonl:1", "a b:x[train]:3000000000", "/p/ä.csv:7", "nowhere"]))
    response = tuple(sorted(draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens))))))
    return Sample(tokens, np.where(learned, tokens, IGNORE).astype(np.int32), source, response)


def filled(keep: str, folder: Path, given) -> Shelf:
    made = Filling(keep, folder)
    for sample, late in given:
        made.add(sample, late)
    return made.shelf()


def facts(sample: Sample) -> tuple:
    return sample.tokens.tolist(), sample.labels.tolist(), sample.source, sample.response, sample.digest


@given(given_=st.lists(st.tuples(samples(), st.booleans()), min_size=1, max_size=8), data=st.data())
def test_what_comes_out_is_what_went_in(tmp_path_factory, given_, data):
    folder = tmp_path_factory.getbasetemp() / "shelf"
    plain = [sample for late in (False, True) for sample, is_late in given_ if is_late == late]
    order = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=6))
    for keep in ("memory", "disk"):
        made = filled(keep, folder, given_)
        there = pickle.loads(pickle.dumps(made))  # as it goes to another process
        made.numbers.unname()
        for one in (made, there):
            assert [facts(sample) for sample in one] == [facts(sample) for sample in plain]
            assert [facts(sample) for sample in one.chosen(order)[:4]] == [facts(plain[i]) for i in order[:4]]
            assert [facts(sample) for sample in one + one[-1:]] == [facts(sample) for sample in [*plain, plain[-1]]]
            assert lengths_of(one).tolist() == lengths_of(plain).tolist()
            assert learned_of(one.chosen(order)).tolist() == learned_of([plain[i] for i in order]).tolist()
            assert one.prompts.tolist() == [sample.response[0] for sample in plain]
            assert one.highest == max(int(sample.tokens.max()) for sample in plain)
    assert not list(folder.iterdir())


def many(count: int):
    tokens = np.arange(100, dtype=np.int32)
    return [(Sample(tokens, tokens, f"x:{i}", (0, 100)), False) for i in range(count)]


def test_many_go_to_disk_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "IN_MEMORY", 20_000)
    few, more = (filled("auto", tmp_path, many(count)) for count in (10, 3000))
    assert [type(one.numbers).__name__ for one in (few, more)] == ["InMemory", "OnDisk"]
    assert [sample.source for sample in more] == [f"x:{i}" for i in range(3000)]


def test_what_a_killed_process_left_goes_and_what_is_used_stays(tmp_path):
    used = filled("disk", tmp_path, many(3))
    left, other = tmp_path / f"old{filling.SUFFIX}", tmp_path / "precious"
    for file in (left, other, used.numbers.path):
        file.touch()
        os.utime(file, (0, 0))
    filled("disk", tmp_path, many(1)).numbers.unname()
    assert sorted(tmp_path.iterdir()) == sorted([other, used.numbers.path])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UsageError, match=r"--data\.keep_dir .* of samples did not fit .* Make room"):
        filled("disk", tmp_path, many(3))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"these samples take 1000000\.00 GB or more"):
        Filling("disk", tmp_path, expected=10**15)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--data\.keep_dir .* cannot be used"):
        Filling("disk", tmp_path / "file")


GROWTH = """
import sys
from pathlib import Path
from litfreeze.data.args import DataArgs
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import load_samples
from litfreeze.tokenizer import Tokenizer

model, path, keep, folder = sys.argv[1:]
tokenizer = Tokenizer.from_dir(model)
args = DataArgs(path=Path(path), keep=keep, keep_dir=Path(folder))
samples = load_samples(args, tokenizer, Prompt("plain", tokenizer), 1024)
samples.unname()
assert sum(len(sample.tokens) for sample in samples.train) == int(samples.train.lengths.sum())
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_a_set_on_disk(tmp_path):
    """Eight times the records."""
    lines = [json.dumps({"prompt": f"{i}", "completion": "to be or not to be " * 60}) + "\n" for i in range(12_000)]
    for name, count in (("small", 1500), ("large", 12_000)):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:count]))
    peak = {}
    for name, keep in (("small", "memory"), ("large", "memory"), ("small", "disk"), ("large", "disk")):
        words = [sys.executable, "-c", GROWTH, MODEL_DIR, tmp_path / f"{name}.jsonl", keep, tmp_path / "kept"]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
        peak[name, keep] = int(done.stdout) / 1024
    grown = {keep: peak["large", keep] - peak["small", keep] for keep in ("memory", "disk")}
    assert grown["memory"] > 10 and grown["disk"] < grown["memory"] / 4, (peak, grown)
