"""The store of activations: what is read is to the bit what was added, or absent, whatever happened to the disk."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litfreeze.checkpoint.tensors import same_bits
from litfreeze.errors import UsageError
from litfreeze.prefix import folder as folder_module
from litfreeze.prefix import store as store_module
from litfreeze.prefix.folder import default_cache_dir, list_caches, make_room, remove
from litfreeze.prefix.store import ActivationStore

KEY, WIDTH = "0123abcd", 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def digest(i):
    return hashlib.sha256(str(i).encode()).digest()


def rows_of(i, dtype=torch.float32, width=WIDTH):
    """The rows of record `i`, (0 … 6, width): any bits, NaNs too."""
    draw = random.Random(i)
    bits = bytes(draw.randrange(256) for _ in range(draw.randrange(7) * width * dtype.itemsize))
    if not bits:
        return torch.empty(0, width, dtype=dtype)
    return torch.frombuffer(bytearray(bits), dtype=dtype).view(-1, width)


def opened(root, dtype=torch.float32, key=KEY, **more):
    return closing(ActivationStore(root, key, WIDTH, dtype, **more))


def shards(root, key=KEY):
    return sorted((root / key).glob("[!.]*.safetensors"))


def filled(root, records=range(6), key=KEY, dtype=torch.float32):
    """A closed cache with one shard of these records."""
    with opened(root, dtype, key) as store:
        for i in records:
            store.add(digest(i), rows_of(i, dtype))


def right(store, i):
    """Whether record `i` is there. If so, its rows are right."""
    try:
        rows = store.read(digest(i))
    except KeyError:
        assert digest(i) not in store
        return False
    assert same_bits(rows, rows_of(i, store.dtype), store.dtype) and rows.dtype == store.dtype
    return True


# ---- what is added is read ----

KINDS = st.sampled_from(["add", "add", "add", "flush", "refresh", "reopen"])
STEPS = st.lists(st.tuples(st.integers(0, 1), KINDS, st.integers(0, 9)), max_size=25)


@settings(max_examples=40)
@given(STEPS, st.sampled_from(DTYPES), st.sampled_from([1, 100, 10**6]))
def test_two_writers_read_what_either_added(tmp_path_factory, steps, dtype, shard):
    root = tmp_path_factory.mktemp("root")
    stores = [ActivationStore(root, KEY, WIDTH, dtype) for _ in range(2)]
    known, written = [set(), set()], set()  # records: what each must find, what must be on disk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD", shard)
        for who, step, i in steps:
            if step == "add":
                stores[who].add(digest(i), rows_of(i, dtype))
                known[who].add(i)
            elif step == "flush":
                stores[who].flush()
                written |= known[who]
            elif step == "refresh":
                stores[who].refresh()
                known[who] |= written
            else:
                stores[who].close()
                written |= known[who]
                stores[who] = ActivationStore(root, KEY, WIDTH, dtype)
                known[who] = set(written)
            for store, records in zip(stores, known, strict=True):
                assert records <= {i for i in range(10) if right(store, i)}
        for store in stores:
            store.close()
    with opened(root, dtype) as store:
        assert {i for i in range(10) if right(store, i)} == known[0] | known[1]
        assert store.nbytes == sum(path.stat().st_size for path in shards(root))
        assert not store.full


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_kept_belongs_to_the_store_and_what_is_read_to_the_reader(tmp_path, in_memory):
    with opened(None if in_memory else tmp_path) as store:
        batch = torch.arange(12.0).view(4, WIDTH).requires_grad_()
        store.add(digest("a"), batch[1:3])
        batch.data.zero_()
        for flush in (lambda: None, store.flush):
            flush()
            rows = store.read(digest("a"))
            assert rows.tolist() == [[3, 4, 5], [6, 7, 8]] and not rows.requires_grad
            rows.zero_()
        assert store.read(digest("a")).sum() == 33
        store.add(digest("a"), torch.ones(2, WIDTH))  # there already
        assert store.read(digest("a")).sum() == 33
        with pytest.raises(KeyError):
            store.read(digest("b"))


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store_module, "SHARD", 1)
    with opened(None, torch.bfloat16) as store:
        for i in range(10):
            store.add(digest(i), rows_of(i, torch.bfloat16))
        store.flush()
        store.refresh()
        assert all(right(store, i) for i in range(10))
        assert store.nbytes == sum(rows_of(i).numel() * 2 for i in range(10))
    assert not list(tmp_path.iterdir())


def test_rows_are_kept_in_the_dtype_of_the_store(tmp_path):
    rows = torch.randn(5, WIDTH, dtype=torch.float64)
    with opened(tmp_path, torch.bfloat16) as store:
        store.add(digest(0), rows)
        store.flush()
        assert same_bits(store.read(digest(0)), rows.to(torch.bfloat16), torch.bfloat16)


def test_shards_are_written_as_rows_come_and_an_older_one_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD", 4 * WIDTH * 10)
    stores = [ActivationStore(tmp_path, KEY, WIDTH, torch.float32) for _ in range(2)]
    for value, store in enumerate(stores):
        for i in range(5):
            store.add(digest(i), torch.full((4, WIDTH), float(value)))
        assert len(shards(tmp_path)) == 2 * value + 1  # records 0-2 are enough for one
        store.close()
    with opened(tmp_path) as store:
        assert all(store.read(digest(i)).unique().tolist() == [0.0] for i in range(5))


def test_reading_costs_the_rows_alone(tmp_path):
    rows = torch.randn(100_000, 64)  # 25.6 MB in each shard
    with closing(ActivationStore(tmp_path, KEY, 64, torch.float32)) as store:
        for shard in range(3):
            for i in range(1000):
                store.add(digest((shard, i)), rows[100 * i : 100 * i + 100])
            store.flush()

        def resident():
            return sum(map(int, Path("/proc/self/statm").read_text("utf-8").split()[1:2])) * os.sysconf("SC_PAGE_SIZE")

        if not Path("/proc/self/statm").exists():
            pytest.skip("/proc is not there")
        before = resident()
        for shard in range(3):
            for i in range(1000):
                assert store.read(digest((shard, i)))[0, 0] == rows[100 * i, 0]
        assert resident() - before < 10e6


def test_one_thread_reads_while_another_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD", 2000)
    n, added, wrong = 400, [], []
    with opened(tmp_path) as store:

        def look():
            while len(added) < n:
                for i in added[-50:]:
                    if not right(store, i):
                        wrong.append(i)

        reader = threading.Thread(target=look)
        reader.start()
        for i in range(n):
            store.add(digest(i), rows_of(i))
            added.append(i)
        reader.join()
        assert not wrong and len(shards(tmp_path)) > 5


def test_a_shard_on_its_way_in_is_left_alone_by_others(tmp_path):
    written = threading.Event()
    with opened(tmp_path) as writer, opened(tmp_path) as other:

        def look():
            while not written.is_set():
                other.refresh()

        reader = threading.Thread(target=look)
        reader.start()
        for i in range(8):
            writer.add(digest(i), torch.full((10**6, WIDTH), float(i)))  # 12 MB
            writer.flush()
        written.set()
        reader.join()
        other.refresh()
        assert not writer.full
        assert all(other.read(digest(i))[-1, 0] == i for i in range(8))


def test_about_json_says_whose_activations_these_are(tmp_path):
    with opened(tmp_path, torch.bfloat16, about={"model": "naïve", "layers": 28}):
        about = json.loads((tmp_path / KEY / "about.json").read_text(encoding="utf-8"))
    assert about.items() >= {"model": "naïve", "layers": 28, "dtype": "bfloat16", "width": WIDTH}.items()
    with opened(tmp_path, torch.bfloat16, about={"model": "another"}):  # the first one to write it was right
        assert json.loads((tmp_path / KEY / "about.json").read_text(encoding="utf-8")) == about


# ---- what is damaged is not used ----


@settings(max_examples=150)
@given(st.data())
def test_no_change_of_a_byte_gives_a_wrong_row(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("root")
    filled(root)
    path = shards(root)[0]
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with opened(root) as store:
        found = [right(store, i) for i in range(6)]
        for i in range(6):
            store.add(digest(i), rows_of(i))
        assert all(right(store, i) for i in range(6))
    with opened(root) as store:  # and the next run finds everything
        assert all(right(store, i) for i in range(6)), found


@settings(max_examples=60)
@given(st.data())
def test_a_truncated_shard_is_deleted_and_its_records_are_absent(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("root")
    filled(root)
    filled(root, range(6, 8))
    first, second = shards(root)
    os.truncate(first, data.draw(st.integers(0, first.stat().st_size - 1)))
    with opened(root) as store:
        assert [right(store, i) for i in range(8)] == [False] * 6 + [True] * 2
        assert shards(root) == [second]


@pytest.mark.parametrize("damage", ["truncated", "zeros", "gone"])
def test_damage_behind_the_back_of_an_open_store_is_an_absent_record(tmp_path, damage):
    filled(tmp_path)
    with opened(tmp_path) as store:
        path = shards(tmp_path)[0]
        size = path.stat().st_size
        if damage == "gone":
            path.unlink()
        else:
            os.truncate(path, size // 2)
            os.truncate(path, size if damage == "zeros" else size // 2)
        assert digest(5) in store and not right(store, 5)  # record 5 lies at the end, and has rows
        assert not shards(tmp_path) and store.nbytes == 0
        store.add(digest(5), rows_of(5))
        store.flush()
        assert right(store, 5)
    assert len(rows_of(5))


@pytest.mark.parametrize(
    "change",
    [
        {"starts": torch.tensor([0, 1, 2, 3, 4, 5, 1000])},
        {"starts": torch.tensor([0, 5, 4, 3, 2, 1, 0])},
        {"starts": torch.tensor([0])},
        {"starts": torch.tensor(0)},
        {"starts": torch.empty(0, dtype=torch.int64)},
        {"digests": torch.zeros(6, 31, dtype=torch.uint8)},
        {"digests": torch.zeros(5, 32, dtype=torch.uint8)},
        {"checksums": torch.zeros(6)},
        {"rows": torch.zeros(4)},
        {"more": torch.zeros(4)},
    ],
    ids=lambda change: " ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in change.items()),
)
def test_a_shard_that_contradicts_itself_is_deleted(tmp_path, change):
    filled(tmp_path)
    path = shards(tmp_path)[0]
    save_file(load_file(path) | change, path)
    with opened(tmp_path) as store:
        assert not any(digest(i) in store for i in range(6)) and not shards(tmp_path)


def test_rows_of_another_record_or_cache_or_shape_are_never_read(tmp_path):
    filled(tmp_path, range(4, 6))
    path = shards(tmp_path)[0]
    content = load_file(path)
    assert len(rows_of(4)) and len(rows_of(5))
    save_file(content | {"digests": content["digests"].flip(0)}, path)
    with opened(tmp_path) as store:
        assert not right(store, 4) and not right(store, 5)

    filled(tmp_path, key="other")
    source = shards(tmp_path, "other")[0]
    source.rename(tmp_path / KEY / source.name)
    with opened(tmp_path) as store:
        assert not right(store, 4) and not shards(tmp_path)

    for width, dtype in ((WIDTH + 1, torch.float32), (WIDTH, torch.float16)):
        filled(tmp_path)
        with closing(ActivationStore(tmp_path, KEY, width, dtype)) as store:
            assert digest(4) not in store and store.nbytes == 0
            store.add(digest(4), rows_of(4, dtype, width))
            store.flush()
            assert same_bits(store.read(digest(4)), rows_of(4, dtype, width), dtype)
        with opened(tmp_path) as store:
            assert right(store, 4)


# ---- a process that dies, a disk that is full ----


def test_what_a_dead_process_left_is_ignored_and_goes_after_a_day(tmp_path):
    filled(tmp_path)
    old, new = (tmp_path / KEY / f".{name}.safetensors" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(shards(tmp_path)[0].read_bytes()[:-1])
    long_ago = time.time() - 25 * 3600
    os.utime(old, (long_ago, long_ago))
    os.utime(shards(tmp_path)[-1], (long_ago, long_ago))
    with opened(tmp_path) as store:
        assert all(right(store, i) for i in range(6))
    assert not old.exists() and new.exists()


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_store import *
store_module.SHARD = 3000
store = ActivationStore(Path({root!r}), KEY, WIDTH, torch.float32)
for i in range({first}, 10**9):
    store.add(digest(i), rows_of(i))
    if i == {first} + 100:
        print("writing", flush=True)
"""


def test_after_a_kill_every_record_that_is_there_is_right(tmp_path):
    draw, there = random.Random(0), 0
    for first in (0, 10**6, 2 * 10**6):
        script = WRITER.format(tests=str(Path(__file__).parent), root=str(tmp_path), first=first)
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"writing\n"
            time.sleep(draw.random() * 0.2)
            process.send_signal(signal.SIGKILL)
        with opened(tmp_path) as store:
            here = 0
            while right(store, first + here):  # what was added first was written first
                here += 1
            assert here >= 50 and not right(store, first + here + 1)
            there += here
        assert list_caches(tmp_path)[0].records == there


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_store import *
store_module.SHARD = 1000
with opened(Path({root!r})) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))
    for i in range(100):
        store.add(digest(i), rows_of(i))
    assert not store.full and len(shards(store.folder.parent)) > 1
    store_module.SHARD = 10**6
    for i in range(100, 1000):
        store.add(digest(i), rows_of(i))
    store.flush()
    print(store.full)
    written = shards(store.folder.parent)
    for i in range(1000, 1100):
        store.add(digest(i), rows_of(i))
    assert [right(store, i) for i in range(1100)] == 1000 * [True] + 100 * [False]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.flush()
    assert shards(store.folder.parent) == written
"""


def test_where_nothing_can_be_written_any_more_what_was_added_is_still_read(tmp_path):
    script = FULL.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert (done.stderr, done.stdout.strip()) == ("", f"{tmp_path / KEY}: File too large")
    with opened(tmp_path) as store:
        found = [right(store, i) for i in range(1100)]
        assert not any(found[100:]) and sum(found) > 50
    assert not [path for path in (tmp_path / KEY).iterdir() if path.name.startswith(".")]


def test_a_folder_that_goes_away_is_told_and_costs_what_was_on_disk(tmp_path):
    with opened(tmp_path) as store:
        store.add(digest(0), rows_of(0))
        store.flush()
        store.add(digest(5), rows_of(5))
        (tmp_path / KEY).rename(tmp_path / "elsewhere")
        store.flush()
        assert "No such file" in store.full
        assert right(store, 5) and not right(store, 0)


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"--cache_dir .*file cannot be used: .*"):
        ActivationStore(tmp_path / "file", KEY, WIDTH, torch.float32)


# ---- what lies there, and what may go ----

HOLDER = """
import sys
from pathlib import Path
from litfreeze.prefix.folder import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def sized(root, key, size, age):
    """A closed cache of about `size` bytes that was last used `age` seconds ago."""
    with closing(ActivationStore(root, key, 1, torch.float32, {"model": key})) as store:
        store.add(digest(key), torch.zeros(size // 4, 1))
    when = time.time() - age
    os.utime(root / key / "lock", (when, when))


def keys(root):
    return [entry.key for entry in list_caches(root)]


def test_caches_are_listed_as_they_were_used(tmp_path):
    assert list_caches(tmp_path / "absent") == []
    for key, age in (("b", 50), ("a", 100), ("c", 0)):
        sized(tmp_path, key, 4000, age)
    filled(tmp_path, range(3), key="b2")
    filled(tmp_path, range(1, 5), key="b2")  # two of them again
    os.utime(tmp_path / "b2" / "lock", (1, 1))
    with closing(ActivationStore(tmp_path, "a", 1, torch.float32)):
        entries = list_caches(tmp_path)
        assert [(entry.key, entry.records, entry.in_use) for entry in entries] == [
            ("a", 1, True),
            ("c", 1, False),
            ("b", 1, False),
            ("b2", 5, False),
        ]
        assert abs(entries[0].last_used - time.time()) < 30 and entries[0].about["model"] == "a"
    for entry in entries:
        assert entry.nbytes == sum(path.stat().st_size for path in (tmp_path / entry.key).iterdir())


def test_a_damaged_cache_is_listed_all_the_same(tmp_path):
    filled(tmp_path)
    os.truncate(shards(tmp_path)[0], 50)
    (tmp_path / KEY / "about.json").write_text("{", encoding="utf-8")
    (entry,) = list_caches(tmp_path)
    assert (entry.records, entry.about) == (0, {}) and entry.nbytes > 50


def test_what_is_no_cache_is_neither_listed_nor_removed(tmp_path):
    for name in ("model", ".hidden", "photos"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").write_bytes(b"mine")
    (tmp_path / "photos" / "lock").write_bytes(b"")
    (tmp_path / ".hidden" / "lock").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"mine")
    sized(tmp_path, "a", 4000, 0)
    assert keys(tmp_path) == ["a"]
    assert make_room(tmp_path, 0, 0, keep_key="")
    assert len(list(tmp_path.rglob("photo.png"))) == 3 and not (tmp_path / "a").exists()


def test_room_is_made_by_what_was_used_least_recently(tmp_path):
    for key, age in (("old", 300), ("kept", 400), ("middle", 200), ("new", 100)):
        sized(tmp_path, key, 100_000, age)
    total = sum(entry.nbytes for entry in list_caches(tmp_path))
    one = total // 4
    assert make_room(tmp_path, one, total + one, "kept")
    assert len(keys(tmp_path)) == 4
    assert not make_room(tmp_path, 4 * one, total, "kept")  # only three may go
    assert not make_room(tmp_path, 10**18, 10**19, "kept")  # no such disk
    assert len(keys(tmp_path)) == 4
    assert make_room(tmp_path, one - 1000, total, "kept")
    assert keys(tmp_path) == ["new", "middle", "kept"]
    with closing(ActivationStore(tmp_path, "middle", 1, torch.float32)):
        assert not make_room(tmp_path, 3 * one - 1000, total, "kept")
        assert keys(tmp_path) == ["middle", "new", "kept"]
        assert make_room(tmp_path, 2 * one - 1000, total, "kept")
    assert keys(tmp_path) == ["middle", "kept"]
    assert make_room(tmp_path / "absent", 1, 1, "kept") and not make_room(tmp_path / "absent", 2, 1, "kept")


def test_the_disk_keeps_something_to_spare(tmp_path, monkeypatch):
    disk = Counter(free=100_000)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: type("Usage", (), disk))
    sized(tmp_path, "a", 50_000, 0)
    assert make_room(tmp_path, 95_000, 10**9, "b") and keys(tmp_path) == ["a"]
    assert not make_room(tmp_path, 150_000, 10**9, "b") and keys(tmp_path) == ["a"]
    assert make_room(tmp_path, 96_000, 10**9, "b") and keys(tmp_path) == []


def test_what_another_process_uses_is_not_removed(tmp_path):
    sized(tmp_path, "a", 4000, 100)
    sized(tmp_path, "b", 4000, 200)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert [(entry.key, entry.in_use) for entry in list_caches(tmp_path)] == [("a", True), ("b", False)]
        assert not make_room(tmp_path, 0, 4000, "")
        assert remove(tmp_path, ["a", "b", "absent"]) == ["a"]
        with closing(ActivationStore(tmp_path, "a", 1, torch.float32)) as store:  # two may use one
            assert store.read(digest("a")).shape == (1000, 1)
        process.stdin.close()
    assert remove(tmp_path, ["a"]) == [] and not list(tmp_path.iterdir())


def test_a_removal_that_was_cut_short_is_finished_by_the_next(tmp_path):
    sized(tmp_path, "a", 4000, 0)
    (tmp_path / "a").rename(tmp_path / ".a.0.removed")
    assert keys(tmp_path) == []
    assert remove(tmp_path, []) == [] and not list(tmp_path.iterdir())


def test_caches_opened_while_they_are_removed_are_whole_or_gone(tmp_path):
    stop = threading.Event()

    def clear():
        while not stop.is_set():
            remove(tmp_path, [KEY])

    removers = [threading.Thread(target=clear) for _ in range(2)]
    for thread in removers:
        thread.start()
    try:
        for i in range(60):
            with opened(tmp_path) as store:
                store.add(digest(i), rows_of(i))
                store.flush()
                assert right(store, i) and not store.full
                assert (tmp_path / KEY / "about.json").exists() and len(shards(tmp_path)) >= 1
    finally:
        stop.set()
        for thread in removers:
            thread.join()


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "litfreeze" / "prefix"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_dir() == Path.home() / ".cache" / "litfreeze" / "prefix"
