"""Settings for every test, and what several of them need: a tokenizer, and a real model."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from families import write_json
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils import logging

# Fixtures here hold what no example changes, so one for all examples is right
settings.register_profile(
    "litfreeze", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
settings.load_profile("litfreeze")
logging.set_verbosity_error()
logging.disable_progress_bar()
# Tensors are small and pytest-xdist fills the cores: more threads would only wait for each other
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so in the processes that tests start

# Each test has a ~/.cache of its own (see `own_cache`), in which fonts would have to be looked for again
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))

SMOLLM2_SCRIPT = Path(__file__).parents[2] / "shared" / "models" / "get_smollm2.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """What a run keeps for later ones is not in the home directory, and not there for the next test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """A word such as no/such may be a model's name on the Hub: no test asks the real one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch) -> None:
    """A run's pictures are composed, and painted where a test is about them (`painted`): that takes a third of a
    second each, and most runs here are shorter."""
    if request.node.get_closest_marker("painted") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: Path(file).write_bytes(b""))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A folder with a small tokenizer and most of the files that come beside one, none as json.dumps writes it."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "naïve": 3, "café": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"), pretty=True)
    write_json(path / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    (path / "special_tokens_map.json").write_bytes(b'{"unk_token":\t"<unk>"}\r\n')
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} naïve\n{% endfor %}", "utf-8")
    write_json(path / "generation_config.json", {"eos_token_id": [1, 2]})
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face directory: from $SMOLLM2_DIR, or made once by
    ../shared/models/get_smollm2.py and kept in ~/.cache."""
    ready = os.environ.get("SMOLLM2_DIR")
    if ready:
        return Path(ready)
    cached = Path.home() / ".cache" / "litfreeze-tests" / "smollm2"
    if not cached.is_dir() and not SMOLLM2_SCRIPT.is_file():
        pytest.skip(f"{SMOLLM2_SCRIPT} is not there, which makes the real model")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with cached.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of pytest-xdist wait for the one that makes it
        if not cached.is_dir():
            _make_smollm2(cached)
    return cached


def _make_smollm2(path: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        command = [sys.executable, SMOLLM2_SCRIPT, aside]
        made = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if made.returncode:
            pytest.fail(f"making SmolLM2 failed: {made.stderr.strip().splitlines()[-1:]}")
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
