"""Paths stay inside of the root, whatever links there are."""

import pytest
from litfreeze_board.places import Root

from litfreeze.errors import UsageError


@pytest.fixture
def root(tmp_path):
    inner = tmp_path / "root"
    (inner / "data").mkdir(parents=True)
    (inner / "data" / "a.jsonl").write_text("{}", encoding="utf-8")
    (inner / "model").mkdir()
    (inner / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "b.jsonl").write_text("{}", encoding="utf-8")
    (inner / "out").symlink_to(tmp_path / "secret")
    (inner / "in").symlink_to(inner / "data")
    (inner / ".hidden").mkdir()
    return Root(inner.resolve())


@pytest.mark.parametrize("given", ["data/a.jsonl", "data", ".", "in", "in/a.jsonl", "not/there/yet", "data/../model"])
def test_inside(root, given):
    if given != ".":  # which holds a link that leads outside
        assert root.inside(given, "data").is_relative_to(root.path)


@pytest.mark.parametrize(
    "given", ["..", "../secret/b.jsonl", "/etc/passwd", "out", "out/b.jsonl", "data/../..", "~", "."]
)
def test_outside(root, given):
    with pytest.raises(UsageError, match="outside of this board's root"):
        root.inside(given, "data")


def test_a_link_inside_of_a_folder_counts(root):
    (root.path / "data" / "x.jsonl").symlink_to(root.path.parent / "secret" / "b.jsonl")
    with pytest.raises(UsageError, match="holds a link"):
        root.inside("data", "data")


def test_nonsense_is_told(root):
    with pytest.raises(UsageError):
        root.inside("a\0b", "data")


def test_only_path_options_are_checked(root):
    root.check({"layer_lr": "../..", "cache_dir": "null", "data.path": ""}, {"cache_dir", "data.path", "out_dir"})
    with pytest.raises(UsageError):
        root.check({"out_dir": "/tmp/elsewhere"}, {"out_dir"})


def test_what_is_listed(root):
    found = {entry.name: entry.kind for entry in root.list(".")}
    assert found == {"data": "folder", "in": "folder", "model": "checkpoint"}
    assert [entry.kind for entry in root.list("data")] == ["data"]
    for folder in ("..", "out", "data/a.jsonl", "nowhere"):
        with pytest.raises(UsageError):
            root.list(folder)
