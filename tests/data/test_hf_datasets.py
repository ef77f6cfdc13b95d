"""Sets of Hugging Face's `datasets`, by the real library: saved in a folder, and from a server that speaks the Hub's
protocol."""

import json
from pathlib import Path

import pytest
from hub_fixtures import hub, run  # noqa: F401
from hub_server import Repo

from litfreeze.data import hf_datasets
from litfreeze.data.args import DataArgs, TextArgs
from litfreeze.data.classes import labels_of, read_labelled
from litfreeze.data.counts import Counts
from litfreeze.data.prompt import Prompt
from litfreeze.data.records import read_records
from litfreeze.data.samples import load_samples
from litfreeze.errors import RunError, UsageError
from litfreeze.finetune.setting import with_pins

datasets = pytest.importorskip("datasets", reason="pip install 'litfreeze[data]'")

PAIRS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(20)]
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: data/train.jsonl}
  - {split: test, path: data/test.jsonl}
- {config_name: other, data_files: data/test.jsonl}
---
"""


@pytest.fixture
def load(make_tokenizer):
    tokenizer = make_tokenizer()
    prompt = Prompt("plain", tokenizer)
    return lambda path, **more: load_samples(DataArgs(path=Path(path), **more), tokenizer, prompt, 64)


@pytest.fixture
def saved(tmp_path):
    """A folder with the splits train (20), validation (3) and test (2)."""
    parts = {"train": PAIRS, "validation": PAIRS[:3], "test": PAIRS[3:5]}
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    made.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def on_hub(hub, tmp_path, monkeypatch):  # noqa: F811
    """org/pairs on a Hub of this test's own, with the subsets main (train, test) and other (train)."""
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:4]))
    hub.add("org/pairs", folder)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    hf_datasets._from_hub.cache_clear()
    yield hub
    hf_datasets._from_hub.cache_clear()


# In a folder


def test_splits_of_a_folder(load, saved):
    samples = load(saved)
    assert (len(samples.train), len(samples.val)) == (20, 3)
    assert samples.train[16].source == f"{saved}[train]:17"
    assert "20 records of the split train; validation: 3 records of the split validation" in samples.describe()
    assert [len(load(saved, val_split="test").val), len(load(saved, val_split_fraction=0.5).val)] == [2, 10]
    assert len(load(saved, split="test", val_split_fraction=0.0).train) == 2
    assert len(load(saved, val_path=saved, val_split="test").val) == 2
    assert len(load(saved, val_path=saved).val) == 3


def test_a_folder_without_splits(load, tmp_path):
    made = datasets.Dataset.from_list(PAIRS).shuffle(seed=1).select(range(15))  # through indices, not as it lies
    made.save_to_disk(tmp_path / "one")
    samples = load(tmp_path / "one", val_split_fraction=0.0)
    assert samples.train[2].source == f"{tmp_path / 'one'}:3"
    assert [record.fields for record in read_records(tmp_path / "one")] == made.to_list()


def test_numbers_of_classes_become_their_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t{i}" for i in range(8)], "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "classes")
    assert labels_of(DataArgs(path=tmp_path / "classes")) == ("no", "yes")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "tset"}, r"no split 'tset'; its splits: train, validation, test\. Did you mean 'test'"),
        ({"subset": "main"}, "--data.subset main is for sets on the Hub"),
        ({"val_split": "train"}, "--data.val_split train is what is trained on. Name another of train, valid"),
        ({"val_split": "test", "val_split_fraction": 0.1}, "both choose validation records"),
    ],
)
def test_options_that_do_not_fit_are_told(load, saved, options, told):
    with pytest.raises(UsageError, match=told):
        load(saved, **options)


def test_options_of_sets_do_not_fit_files(load, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    for name in ("subset", "split", "val_split"):
        with pytest.raises(UsageError, match=rf"--data\.{name} x is for Hugging Face datasets"):
            load(tmp_path / "a.jsonl", **{name: "x"})


def test_other_commands_ask_which_split(saved, run):  # noqa: F811
    code, _, err = run("evaluate", "--data", saved)
    assert code == 2 and "has the splits train, validation, test. Say with --data.split which." in err
    texts = read_labelled(saved, TextArgs(text_key="prompt"), counts := Counts(), "test", needs_label=False)
    assert [one.text for one in texts] == ["q3", "q4"] and counts.read == 2


def test_a_broken_folder_is_told(saved, load):
    next((saved / "train").glob("*.arrow")).unlink()
    with pytest.raises(UsageError, match="is a broken folder"):
        load(saved)


# On the Hub


def test_a_set_on_the_hub_is_downloaded_once(on_hub, load):
    samples = load("org/pairs", subset="main")  # a test split is not taken for validation
    assert len(samples.train) + len(samples.val) == 20 and samples.val_counts is None
    assert {sample.source.split(":")[0] for sample in samples.train} == {"org/pairs[train]"}
    assert len(load("org/pairs", subset="main", val_split="test").val) == 4
    on_hub.requests.clear()
    hf_datasets._from_hub.cache_clear()
    pin = with_pins(DataArgs(path=Path("org/pairs"), subset="main")).path
    assert len(str(pin)) == len("org/pairs@") + 40
    again = load(pin, subset="main")
    assert [s.tokens.tolist() for s in again.train] == [s.tokens.tolist() for s in samples.train]
    assert not on_hub.requests  # what is in the cache is taken as it is


def without_network(monkeypatch):
    hf_datasets._from_hub.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")


def test_what_the_cache_has_is_found_without_a_network(on_hub, tmp_path, load, monkeypatch):
    """Of a set whose only subset has a name of its own, and of an earlier commit than the newest there."""
    (tmp_path / "repo/README.md").write_text(CARD.replace("- {config_name: other, data_files: data/test.jsonl}\n", ""))
    pins = []
    for pairs in (PAIRS, PAIRS[:10]):
        (tmp_path / "repo/data/train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        on_hub.add("org/one", tmp_path / "repo")
        pins.append(hf_datasets.pinned(Path("org/one@main"), None))
        hf_datasets._from_hub.cache_clear()
    load("org/pairs", subset="main"), load("org/pairs", subset="other")
    without_network(monkeypatch)
    assert [len(load(name, val_split_fraction=0).train) for name in (*pins, "org/one")] == [20, 10, 10]
    assert hf_datasets.pinned(Path("org/one"), None) == pins[1] != pins[0]
    with pytest.raises(RunError, match=r"There is no network.* org/pairs is not in the cache"):  # which of the two?
        load("org/pairs")


def test_what_is_wrong_with_a_name_is_told(on_hub, load, monkeypatch):
    cases = {
        ("org/pairs", None): (UsageError, "org/pairs has several subsets: main, other. Say with --data.subset"),
        ("org/pairs", "mian"): (UsageError, r"has no subset 'mian'; its subsets: main, other.*Did you mean 'main'"),
        ("org/none", None): (UsageError, "org/none is no file or folder here.*has no dataset org/none"),
        ("org/pairs@old", None): (UsageError, "has no revision 'old'"),
    }
    for (name, subset), (kind, told) in cases.items():
        with pytest.raises(kind, match=told):
            load(name, subset=subset)
    on_hub.repos["org/code"] = Repo({"code.py": b"raise SystemExit('it ran')"})
    with pytest.raises(UsageError, match=r"`datasets` cannot read org/code: .*scripts are no longer supported"):
        load("org/code")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="There is no network") as error:
        load("org/other")
    assert len(str(error.value).splitlines()) == 1


def test_a_run_on_a_set_by_its_name(on_hub, run, tmp_path):  # noqa: F811
    words = ["finetune", "full", "--trainable_layers", "11", "--train.max_steps", "1", "--data", "org/pairs"]
    code, out, err = run(*words, "--data.subset", "main", "--out_dir", tmp_path / "run", "--eval.max_new_tokens", "1")
    assert code == 0, err
    assert "of the split train" in out
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "path: org/pairs@" in recipe and "subset: main" in recipe
