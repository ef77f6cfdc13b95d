"""A test's own Hub, as the settings of huggingface_hub name it, and its own cache."""

from pathlib import Path

import hub_server
import huggingface_hub.constants as settings
import pytest

from litfreeze.__main__ import main
from litfreeze.scripts.convert import to_hf


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub; the test runs in a folder of its own, without a token and with nothing in the cache."""
    with hub_server.running() as running:
        cache = tmp_path / "hf" / "hub"
        # What HF_ENDPOINT and HF_HOME set when huggingface_hub is imported
        monkeypatch.setattr(settings, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(settings, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(settings, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(settings, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(settings, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield running


@pytest.fixture(scope="session")
def demo_hf(tmp_path_factory) -> Path:
    """The embedded model as a Hugging Face directory."""
    return to_hf(out_dir=tmp_path_factory.mktemp("demo") / "hf")


@pytest.fixture
def base(hub, demo_hf) -> Path:
    """It is on the Hub too, as org/base."""
    hub.add("org/base", demo_hf)
    return demo_hf


@pytest.fixture
def run(hub, capsys):
    """Runs a command line: its exit code, what it said, and what it said of errors. The Hub's requests are those since
    then."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        hub.requests.clear()
        return main([str(word) for word in words]), *capsys.readouterr()

    return run
