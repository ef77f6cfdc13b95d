"""Models by their name on the Hub, with the real client and a server that speaks the Hub's protocol."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import huggingface_hub.constants as settings
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stops import ctrl_c_in_step
from transformers import AutoModelForCausalLM

from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.generate.base import setup as generate
from litfreeze.hub import is_hub_name
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=1e-3, max_steps=2, global_batch_size=4, watch_interval=0)
QUICK = EvalArgs(max_samples=4, max_new_tokens=2)
NEVER = {
    "README.md": b"# a card",
    "picture.png": b"png",
    "original/consolidated.00.pth": b"x",
    "consolidated.safetensors": b"x",
    "onnx/model.onnx": b"x",
    "model.gguf": b"x",
    "flax_model.msgpack": b"x",
    "training_args.bin": b"x",
    "runs/tokenizer.json": b"{}",
}


def cached(tmp_path, name="org/base") -> Path:
    [snapshot] = (tmp_path / "hf" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return snapshot


# --- what is downloaded ----------------------------------------------------------------------------------------------


def in_shards(repo):
    folder = Path("shards")
    folder.mkdir()
    Path("one.safetensors").write_bytes(repo.files.pop("model.safetensors"))
    save_torch_state_dict(load_file("one.safetensors"), folder, max_shard_size="2MB")
    repo.files |= {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(repo.files) > 5


def in_bin(repo):
    Path("one.safetensors").write_bytes(repo.files.pop("model.safetensors"))
    torch.save(load_file("one.safetensors"), "pytorch_model.bin")
    repo.files["pytorch_model.bin"] = Path("pytorch_model.bin").read_bytes()


@pytest.mark.parametrize("form", [lambda repo: None, in_shards, in_bin])
def test_only_what_a_checkpoint_needs_is_fetched(hub, base, run, tmp_path, form):
    repo = hub.repos["org/base"]
    form(repo)
    needed = set(repo.files)
    repo.files |= NEVER
    if "pytorch_model.bin" not in needed:
        repo.files |= {"pytorch_model.bin": b"x", "pytorch_model-00001-of-00002.bin": b"x"}
    code, out, err = run("download", "org/base")
    assert code == 0 and sorted(hub.fetched()) == sorted(needed)  # each once
    assert err.count("\n") == 1 and "org/base" in err and " MB, into the Hub" in err
    assert "litfreeze generate --prompt Hello --checkpoint_dir org/base" in out
    opened = open_checkpoint(cached(tmp_path))
    assert opened.weights_hash == open_checkpoint(base).weights_hash


def test_a_plain_directory_appears_whole(hub, base, run):
    code, out, _ = run("download", "org/base", "--out_dir", "plain")
    assert code == 0 and {f.name for f in Path("plain").iterdir()} == {f.name for f in base.iterdir()}
    assert all((Path("plain") / f.name).read_bytes() == f.read_bytes() for f in base.iterdir())
    assert list(Path().iterdir()) == [Path("plain")] and "--checkpoint_dir plain" in out
    code, _, err = run("download", "org/base", "--out_dir", "plain")
    assert code == 2 and "not empty" in err and not hub.requests


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "DOWNLOAD_CHUNK_SIZE", 100_000)  # bytes that are written at a time
    hub.cuts["model.safetensors"] = [1_000_000]
    assert run("download", "org/base")[0] == 0
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    first, second = ranges
    assert first is None and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 1_000_000
    assert (cached(tmp_path) / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("out_dir", [None, "plain"])
def test_a_download_that_was_cut_goes_on_with_what_is_missing(hub, base, run, monkeypatch, out_dir):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    in_shards(hub.repos["org/base"])
    last = max(name for name in hub.repos["org/base"].files if name.startswith("model-"))
    hub.cuts[last] = [0] * 50
    words = ["download", "org/base", *(["--out_dir", out_dir] if out_dir else [])]
    code, _, err = run(*words)
    assert code == 1 and "was cut" in err and "goes on" in err and len(err.strip().splitlines()) <= 3
    assert not Path("plain").exists()
    code, _, err = run("generate", "--checkpoint_dir", "org/base") if out_dir is None else (1, "", "was cut")
    assert code == 1 and "was cut" in err  # half a model is no model
    hub.cuts.clear()
    assert run(*words)[0] == 0
    assert hub.fetched() == [last]


def test_a_model_that_litfreeze_does_not_know_is_told_before_its_weights_come(hub, base, run):
    repo = hub.repos["org/base"]
    repo.files["config.json"] = repo.files["config.json"].replace(b'"llama"', b'"mamba"')
    code, _, err = run("download", "org/base")
    assert code == 2 and "mamba" in err and "model.safetensors" not in hub.fetched()


def test_there_must_be_room(hub, base, run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    code, _, err = run("download", "org/base")
    assert code == 2 and "needs 4.8 MB more, and 1.0 MB are free" in err and "model.safetensors" not in hub.fetched()


# --- on demand -------------------------------------------------------------------------------------------------------


def test_a_name_is_a_checkpoint(hub, base, run, tmp_path, monkeypatch):
    code, out, err = run("generate", "--checkpoint_dir", "org/base", "--prompt", "Hello", "--max_new_tokens", "8")
    assert code == 0 and out.strip() == generate("Hello", base, max_new_tokens=8).strip() != ""
    assert "Download  org/base" in err and hub.fetched()
    code, again, err = run(
        "generate", "--checkpoint_dir", "org/base@main", "--prompt", "Hello", "--max_new_tokens", "8"
    )
    assert (code, again, err) == (0, out, "") and not hub.requests  # from the cache
    assert origin(cached(tmp_path)) == f"org/base@{cached(tmp_path).name}"
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    assert run("layers", "--checkpoint_dir", "org/base", "--trainable_layers", "-1")[0] == 0


def test_a_directory_comes_before_a_name(hub, base, run, demo_hf):
    shutil.copytree(demo_hf, "org/base")
    assert run("generate", "--checkpoint_dir", "org/base", "--max_new_tokens", "2")[0] == 0 and not hub.requests


def test_a_newer_model_is_taken_by_download_alone(hub, base, run, tmp_path):
    run("download", "org/base")
    hub.repos["org/base"].branches["v1"] = dict(hub.repos["org/base"].files)
    hub.repos["org/base"].files["generation_config.json"] = b'{"eos_token_id": 2}'
    layers = ["layers", "--trainable_layers", "-1", "--checkpoint_dir"]
    assert run(*layers, "org/base")[0] == 0 and not hub.requests
    assert run("download", "org/base")[0] == 0 and hub.fetched() == ["generation_config.json"]
    code, out, _ = run(*layers, "org/base@v1")
    assert code == 0 and not any(path.endswith("model.safetensors") for m, path, _ in hub.requests if m == "GET")
    assert not (Path(out.splitlines()[0]) / "generation_config.json").exists()


def test_what_transformers_cached_without_a_tokenizer_is_completed(hub, base, run):
    AutoModelForCausalLM.from_pretrained("org/base")
    assert run("generate", "--checkpoint_dir", "org/base", "--max_new_tokens", "2")[0] == 0
    assert "tokenizer.json" in hub.fetched() and "model.safetensors" not in hub.fetched()


def test_finetune_on_a_name_can_be_gone_on_with(hub, base, run, tmp_path, monkeypatch):
    train = TrainArgs(lr=1e-3, max_steps=3, global_batch_size=4, save_interval=1)
    options = {"checkpoint_dir": Path("org/base"), "trainable_layers": "-1", "data": "data.jsonl", "save": "delta"}
    records = [{"prompt": f"play song {i}", "completion": "PlayMusic"} for i in range(12)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), ctrl_c_in_step(3):
        finetune_full(out_dir=Path("run"), train=train, eval=QUICK, **options)
    name = f"org/base@{cached(tmp_path).name}"
    assert f"checkpoint_dir: {name}\n" in Path("run/recipe.yaml").read_text(encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a relative path would mean another place
    result = finetune_full(resume=tmp_path / "work" / "run")
    whole = finetune_full(
        out_dir=Path("twin"), train=train, eval=QUICK, **options | {"data": tmp_path / "work" / "data.jsonl"}
    )
    assert open_checkpoint(result.checkpoint_dir).weights_hash == open_checkpoint(whole.checkpoint_dir).weights_hash
    base_of = json.loads((result.checkpoint_dir / "litfreeze.json").read_text(encoding="utf-8"))["base"]
    assert base_of["hub"] == name
    # And a delta's base comes again where it is gone, that very commit
    shutil.rmtree(tmp_path / "hf")
    hub.repos["org/base"].branches["old"] = dict(hub.repos["org/base"].files)
    hub.repos["org/base"].files["config.json"] += b"\n"
    code, _, err = run("generate", "--checkpoint_dir", result.checkpoint_dir, "--max_new_tokens", "2")
    assert code == 0 and f"Download  {name}" in err


def test_an_adapter_whose_base_lies_elsewhere_is_told_with_what_came(hub, base, run, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "./models/llama"}
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    Path("adapter/adapter_model.safetensors").write_bytes(b"")
    hub.add("me/adapter", Path("adapter"))
    code, _, err = run("download", "me/adapter", "--out_dir", "here")
    *_, told, more = err.splitlines()
    assert code == 2 and "its base models/llama" in told and "--base_dir" in told
    assert more.startswith("The adapter is here, here: --base_dir goes with --checkpoint_dir")


def test_an_adapter_brings_its_base(hub, base, run, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained("adapter")
    hub.add("me/adapter", Path("adapter"))
    code, out, err = run("download", "me/adapter")
    assert code == 0 and [line.split()[1] for line in err.splitlines()] == ["me/adapter", "org/base"]
    assert "LoRA r 2" in out and "README.md" not in hub.fetched()
    assert run("generate", "--checkpoint_dir", "me/adapter", "--max_new_tokens", "2")[0] == 0 and not hub.requests
    ours = finetune_lora(Path("me/adapter"), out_dir=Path("run"), train=FEW, eval=QUICK)
    assert open_checkpoint(ours.checkpoint_dir).base.path == cached(tmp_path)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def gated(hub):
    hub.repos["org/base"].gated = True


def private(hub):
    hub.repos["org/base"].private = True


def lacks_a_shard(hub):
    in_shards(hub.repos["org/base"])
    del hub.repos["org/base"].files["model-00001-of-00003.safetensors"]


WRONG = {
    "absent": (None, ["org/bas"], 2, ["org/bas is no directory here", "has no model org/bas, or a private one"]),
    "private": (private, ["org/base"], 2, ["or a private one", "HF_TOKEN"]),
    "gated": (gated, ["org/base"], 2, ["is gated: ask for access at http", "/org/base", "HF_TOKEN"]),
    "no revision": (None, ["org/base@v9"], 2, ["has no revision 'v9'"]),
    "no weights": (lambda hub: hub.repos["org/base"].files.pop("model.safetensors"), ["org/base"], 2, ["holds no"]),
    "no path": (None, ["a/b/c"], 2, ["a/b/c is no directory here", "ORG/NAME"]),
    "no name": (None, ["org/.."], 2, ["org/.. is no directory here"]),
    "missing shard": (lacks_a_shard, ["org/base"], 2, ["lacks model-00001-of-00003.safetensors"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_a_line(hub, base, run, case):
    change, words, expected, told = WRONG[case]
    if change is not None:
        change(hub)
    code, out, err = run("generate", "--checkpoint_dir", *words)
    assert code == expected and out == "" and len(err.strip().splitlines()) <= 2
    assert all(words in err for words in told), err


def test_a_token_opens_what_is_closed_and_a_wrong_one_is_told(hub, base, run, monkeypatch):
    private(hub)
    gated(hub)
    hub.tokens["hf_secret"] = "read"
    code, _, err = run("download", "org/base", "--token", "hf_wrong")
    assert code == 2 and "refuses the token" in err and "hf_wrong" not in err
    assert run("download", "org/base", "--out_dir", "a", "--token", "hf_secret")[0] == 0
    assert "HF_TOKEN" not in os.environ
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run("download", "org/base", "--out_dir", "b")[0] == 0


def test_the_token_is_kept_nowhere(hub, base, run, tmp_path, monkeypatch):
    private(hub)
    hub.tokens["hf_secret"] = "write"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = ["--checkpoint_dir", "org/base", "--out_dir", "run", "--train.max_steps", "1", "--eval.max_samples", "2"]
    code, out, err = run("finetune", "full", "--trainable_layers", "-1", "--train.save_interval", "1", *words)
    assert code == 0
    assert run("upload", "run/final", "me/tuned", "--token", "hf_secret", "--out_dir", "up")[0] == 0
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 20 and not [file for file in files if b"hf_secret" in file.read_bytes()]
    assert "hf_secret" not in out + err
    assert b"hf_secret" not in b"".join(hub.repos["me/tuned"].files.values())


def test_without_a_network_it_is_said_and_what_would_work(hub, base, run, monkeypatch):
    monkeypatch.setattr(settings, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = run("generate", "--checkpoint_dir", "org/base")
    assert code == 1 and "cannot be reached" in err and "There is no network" in err
    assert "HF_HOME" in err and settings.HF_HUB_CACHE in err and len(err.strip().splitlines()) == 1
    monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    code, _, err = run("generate", "--checkpoint_dir", "org/base")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err and settings.HF_HUB_CACHE in err


def test_without_the_library_it_is_said_how_to_install_it(hub, base, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for words in (["download", "org/base"], ["generate", "--checkpoint_dir", "org/base"]):
        code, _, err = run(*words)
        assert code == 2 and "pip install 'litfreeze[hub]'" in err
    assert run("generate", "--checkpoint_dir", base, "--max_new_tokens", "2")[0] == 0


@pytest.mark.parametrize(
    "word", ["gpt2", "/org/name", "org/", "a/b/c", "org/na me", "~/x", "../x", "", "org/name@", "-/x"]
)
def test_what_is_no_name(word):
    assert not is_hub_name(word)


# --- processes -------------------------------------------------------------------------------------------------------


def test_of_two_processes_one_downloads(hub, base, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    words = ["layers", "--checkpoint_dir", "org/base", "--trainable_layers", "-1"]
    command = [sys.executable, "-m", "litfreeze", *words]
    started = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "".join(told).count("Download  org/base") == 1 == "".join(told).count("\n")
    assert sorted(hub.fetched()) == sorted(hub.repos["org/base"].files)
