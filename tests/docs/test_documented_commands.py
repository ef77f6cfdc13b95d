"""Every command that README and docs show runs, in the order of its page, and ends with exit code 0.

A fence is left out only where the line before it says what it needs: `<!-- needs: network -->`. The model of the
examples, SmolLM2 with its 30 blocks, is a small one of as many; runs are cut to a few steps."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from litfreeze.__main__ import COMMANDS, commands, main
from litfreeze.cli import load, options_of
from litfreeze.demo import MODEL_DIR
from litfreeze.presets import PRESETS
from litfreeze.scripts.convert import to_hf
from litfreeze.scripts.init import setup as init

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"network", "the extra", "GPUs", "several machines", "SLURM", "an interrupted run"}
FENCE = re.compile(r"(?:<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.M | re.S)
ELSEWHERE = ("pip install", "pytest")  # .ci/run does
SERVERS = ("serve", "board")
FEW = {"TRAIN__GLOBAL_BATCH_SIZE": "2", "TRAIN__MICRO_BATCH_SIZE": "2"}
FEW |= {
    "TRAIN__WATCH_INTERVAL": "0",
    "TRAIN__MAX_STEPS": "2",
    "EVAL__MAX_NEW_TOKENS": "1",
    "EVAL__MAX_SAMPLES": "4",
    "MAX_NEW_TOKENS": "2",
}
LONGER = {"40:8,9": "100", "gradual": "8"}  # steps of those that tell when something happens


def sections() -> list:
    """(where, commands) of each section of the README, which stands for itself, and of each page of docs."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        parts = re.split(r"^## ", text, flags=re.M) if page.name == "README.md" else [text]
        for part in parts:
            title = part.partition("\n")[0].strip("# ")
            lines = [words for fence in FENCE.finditer(part) for words in in_fence(fence, page.name)]
            if lines:
                found.append(pytest.param(lines, id=f"{page.stem}-{title.replace(' ', '_')}"))
    return found


def in_fence(fence: re.Match, page: str) -> list[list[str]]:
    """The words of each command of a fence that is run here."""
    if fence["kind"] or not re.search(r"^(litfreeze|torchrun|fabric|srun|python) ", fence["text"], re.M):
        return []
    if fence["needs"]:
        assert fence["needs"] in NEEDS, f"{page}: who knows what '{fence['needs']}' needs?"
        return []
    lines = fence["text"].replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    words = [shlex.split(part, comments=True) for part in parts if part and not part.startswith(ELSEWHERE)]
    return words if words and words[0][:1] == ["litfreeze"] else []  # what a run prints begins otherwise


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """What the examples speak of: a model of 30 blocks, some records, and runs over it."""
    shelf = tmp_path_factory.mktemp("shelf")
    shape = {**PRESETS["demo"], "num_hidden_layers": 30, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    (shelf / "shape.json").write_text(json.dumps(shape), encoding="utf-8")
    init(out_dir=shelf / "drawn", config_file=shelf / "shape.json")
    to_hf(shelf / "drawn", shelf / "SmolLM2-135M-Instruct")
    records = (MODEL_DIR.parent / "data/train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    for name in ("records", "a", "b", "held_out"):
        (shelf / f"{name}.jsonl").write_text("\n".join(records), encoding="utf-8")
    rows = [(f"please play some {i}", "music") if i % 2 else (f"book a table for {i}", "food") for i in range(40)]
    (shelf / "intents.csv").write_text("text,label\n" + "\n".join(map(",".join, rows)), encoding="utf-8")
    return shelf


@pytest.mark.parametrize("lines", sections())
def test_it_runs(lines, shelf, tmp_path, monkeypatch, capsys):
    for item in shelf.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    given_before(lines, tmp_path)
    for words in lines:
        told = " ".join(words)
        few = FEW | next(({"TRAIN__MAX_STEPS": steps} for word, steps in LONGER.items() if word in told), {})
        if "--task classification" in told:
            del few["EVAL__MAX_NEW_TOKENS"]
        for name in FEW:
            monkeypatch.delenv(f"LITFREEZE_{name}", raising=False)
        for name, value in few.items():
            monkeypatch.setenv(f"LITFREEZE_{name}", value)
        if words[1] in SERVERS:
            serve(words[1:])
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        code = main(words[1:])
        assert code == 0, f"{told}: {capsys.readouterr().err}"
        capsys.readouterr()


def given_before(lines: list[list[str]], here: Path) -> None:
    """Runs that a section speaks of, and another one has shown how to make."""
    text = "\n".join(map(" ".join, lines))
    made = {"full": "finetune full", "lora": "finetune lora"}
    for path in sorted(set(re.findall(r"out/(?:finetune/(?:full|lora)|sql|tone)(?=/|\s|$)", text))):
        first = text.index(path)
        if not any(f"litfreeze {command}" in text[:first] for command in made.values()):
            model = ["--checkpoint_dir", str(here / "SmolLM2-135M-Instruct"), "--data", str(here / "records.jsonl")]
            few = ["--train.max_steps", "1", "--eval.max_samples", "2", "--eval.max_new_tokens", "1"]
            kept = ["--trainable_layers", "28,29", "--save", "delta"]
            assert main(["finetune", "full", *model, *few, *kept, "--out_dir", path]) == 0


def serve(words: list[str]) -> None:
    """Starts it, waits for its address, and ends it as Ctrl-C does."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "litfreeze", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=dict(os.environ),
    ) as server:  # fmt: skip
        told = ""
        try:
            while "http://127.0.0.1" not in told:
                line = server.stdout.readline()
                assert line, told
                told += line
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode in (0, 130), told


def test_every_command_of_ours_is_shown():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [command for command in COMMANDS if f"litfreeze {command}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_fence_is_missed(page):
    """A line that begins as a command does stands in a fence that is run, or says what it needs."""
    text = page.read_text(encoding="utf-8")
    fenced = "".join(fence["text"] for fence in FENCE.finditer(text))
    lines = re.findall(r"^(?:litfreeze|torchrun|fabric|srun) .*", text, re.M)
    assert [line for line in lines if line not in fenced] == []
    assert not re.search(r"\\\n```", text)  # the rest of a command beside its fence


OTHERS = {
    "nproc",
    "nnodes",
    "node",
    "rdzv",
    "signal",
    "devices",
    "version",
    "help",
    "config",
    "debug",
    "print_config",
    "data",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_is_one(page):
    text = page.read_text(encoding="utf-8")
    if page.stem == "moving":  # ours stand in the second column
        text = "\n".join(line.split(" | ")[-1] for line in text.splitlines())
    known = {option for spec in commands().values() for option in options_of(load(spec))} | OTHERS
    known |= {f"{option.rpartition('.')[0]}.…" for option in known}
    named = set(re.findall(r"`--([a-z_]+(?:\.[a-z_…]+)?)", text))
    assert sorted(named - known) == []


@pytest.mark.skipif(not find_spec("material"), reason="needs litfreeze[docs]: mkdocs-material")
def test_the_site_is_built_without_a_warning(tmp_path):
    run = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site/commands").glob("*/index.html")}
    assert pages >= {command.replace(" ", "-") for command in COMMANDS}
    assert "--trainable_layers" in (tmp_path / "site/commands/finetune-full/index.html").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "site")
