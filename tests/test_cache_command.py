"""`litfreeze cache`: what is printed, what is removed, what is refused; without torch."""

import os
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from litfreeze.cli import parse
from litfreeze.errors import RunError, UsageError
from litfreeze.prefix.store import ActivationStore

COMMANDS = {"cache ls": "litfreeze.scripts.cache:ls", "cache rm": "litfreeze.scripts.cache:rm"}
LONG = "3fa9c0d1e2f3" + "0" * 52


@pytest.fixture(autouse=True)
def cache_dir(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("LITFREEZE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "litfreeze" / "prefix"


def cache(*words):
    function, arguments = parse(["cache", *words], COMMANDS)
    function(**arguments)


def keep(root, key, last_used=1e9, **about):
    with closing(ActivationStore(root, key, 8, torch.bfloat16, about)) as store:
        for i in range(3):
            store.add(bytes([i]) * 32, torch.zeros(20_000, 8))
    os.utime(root / key / "lock", (last_used, last_used))


def there(root):
    return sorted(path.name for path in root.iterdir())


def test_ls_says_what_is_kept(cache_dir, capsys):
    keep(cache_dir, LONG, 1e9, model="SmolLM2-135M", layers=28)
    keep(cache_dir, "00e5", 2e9)
    with closing(ActivationStore(cache_dir, "00e5", 8, torch.bfloat16)):
        os.utime(cache_dir / "00e5" / "lock", (2e9, 2e9))
        cache("ls")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "model", "blocks", "dtype", "records", "size", "last", "used"]
    assert lines[1].split()[:6] == ["00e5", "?", "?", "bfloat16", "3", "1.0"] and lines[1].endswith("in use")
    assert lines[2].split()[:6] == [LONG[:12], "SmolLM2-135M", "28", "bfloat16", "3", "1.0"]
    assert "2001-09-0" in lines[2] and not lines[2].endswith(" ")
    assert lines[3:] == ["", f"2 caches, 1.9 MB in {cache_dir}"]


def test_ls_of_nothing_says_where_it_looked(cache_dir, capsys, tmp_path):
    cache("ls")
    cache("ls", f"--cache_dir={tmp_path / 'empty'}")
    assert capsys.readouterr().out == f"{cache_dir} holds no caches.\n{tmp_path / 'empty'} holds no caches.\n"


def test_rm_takes_beginnings_of_keys(tmp_path, capsys):
    for key in (LONG, "3fb", "00e5", "1e5", "12345678", "null"):  # some of them look like numbers
        keep(tmp_path / "c", key)
    cache("rm", "3fa9", f"--cache_dir={tmp_path / 'c'}")
    assert there(tmp_path / "c") == ["00e5", "12345678", "1e5", "3fb", "null"]
    assert capsys.readouterr().out == f"Removed 1 cache, 1.0 MB, from {tmp_path / 'c'}\n"
    cache("rm", "1e5, 00,1e5,12345678", f"--cache_dir={tmp_path / 'c'}")
    assert there(tmp_path / "c") == ["3fb", "null"]
    cache("rm", "null", f"--cache_dir={tmp_path / 'c'}")
    cache("rm", "all", f"--cache_dir={tmp_path / 'c'}")
    assert there(tmp_path / "c") == []
    cache("rm", "all", f"--cache_dir={tmp_path / 'c'}")
    assert capsys.readouterr().out.endswith(f"Removed 0 caches, 0.0 MB, from {tmp_path / 'c'}\n")


def test_a_key_that_is_the_beginning_of_another_is_itself(cache_dir):
    keep(cache_dir, "3f")
    keep(cache_dir, "3fb")
    cache("rm", "3f")
    assert there(cache_dir) == ["3fb"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["3f"], r"'3f' begins 2 keys: 3f\w+, 3f\w+\. Write more"),
        (["3fb9c0d1e2f3"], r"no cache that begins with '3fb9c0d1e2f3'\. Did you mean '3fa9c0d1e2f3'\? Caches: "),
        (["3fb,x"], r"begins with 'x'\. Caches: "),
        (["3fb,"], r"begins with ''\."),
        ([], "--keys must be given"),
    ],
)
def test_a_word_that_is_not_one_cache_removes_none(cache_dir, words, told):
    keep(cache_dir, LONG)
    keep(cache_dir, "3fb")
    with pytest.raises(UsageError, match=told):
        cache("rm", *words)
    assert there(cache_dir) == [LONG, "3fb"]


def test_what_is_in_use_stays_and_is_told(cache_dir, capsys):
    keep(cache_dir, LONG)
    keep(cache_dir, "00")
    with closing(ActivationStore(cache_dir, LONG, 8, torch.bfloat16)):
        for word in ("all", "3f"):
            with pytest.raises(RunError, match=r"^3fa9c0d1e2f3: in use by a run"):
                cache("rm", word)
    assert there(cache_dir) == [LONG]
    assert capsys.readouterr().out.startswith("Removed 1 cache, 1.0 MB")


def test_no_heavy_import(cache_dir):
    keep(cache_dir, "a")
    script = (
        "import sys; from litfreeze.scripts.cache import ls, rm; ls(); rm('a');"
        "print(sorted({'torch', 'lightning_fabric', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "[]"
