"""Uploading to a server that speaks the Hub's protocol: what arrives, what its card says, and what stays here."""

import getpass
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from families import write_json
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from litfreeze.__main__ import COMMANDS
from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.cli import parse
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.finetune.recipe import recipe_yaml
from litfreeze.freeze.args import FrozenArgs
from litfreeze.publish.card import command
from litfreeze.publish.public import without_places
from litfreeze.scripts.merge import merge_delta, merge_lora
from litfreeze.train.args import EvalArgs, TrainArgs

FEW = TrainArgs(lr=2e-3, max_steps=2, global_batch_size=4, watch_interval=0)
QUICK = EvalArgs(max_samples=4, max_new_tokens=2)
TOKENS = torch.arange(3, 20)[None]


@pytest.fixture
def writer(hub, monkeypatch):
    hub.tokens |= {"hf_writer": "write", "hf_reader": "read"}
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


def records(folder: Path) -> Path:
    file = folder / "secret-place" / "songs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"play song {i}", "completion": "PlayMusic"}) for i in range(12)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def tuned(script=finetune_full, checkpoint="org/base", **options) -> Path:
    """A run of two steps, in blocks 10 and 11."""
    options = {"trainable_layers": "10,11", "data": records(Path.cwd()), "out_dir": Path("run"), **options}
    return script(checkpoint_dir=Path(checkpoint), train=FEW, eval=QUICK, **options).checkpoint_dir


def card_of(hub, name) -> tuple[dict, str]:
    _, front, text = hub.repos[name].files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), text


@torch.no_grad()
def logits(path) -> torch.Tensor:
    return load_model(open_checkpoint(path), lambda name: torch.float32)(TOKENS)


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_a_model_comes_back_as_it_went(hub, base, run, writer, tmp_path):
    final = tuned()
    code, out, _ = run("upload", final, "me/tuned")
    assert code == 0 and f"Written   {hub.url}/me/tuned" in out and "model.safetensors, 4.8 MB" in out
    assert not hub.repos["me/tuned"].private and not list(Path().glob(".upload*"))
    assert run("download", "me/tuned", "--out_dir", "back")[0] == 0
    assert open_checkpoint("back").weights_hash == open_checkpoint(final).weights_hash
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained("back", dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(theirs, logits(final), rtol=1e-4, atol=1e-4)
    front, text = card_of(hub, "me/tuned")
    assert front["base_model"] == "org/base" and front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation" and "litfreeze" in front["tags"]
    commit = origin(open_checkpoint("org/base").path).partition("@")[2]
    scores = open_checkpoint(final).manifest["training"]
    for said in (
        f"[org/base](https://huggingface.co/org/base) (revision {commit})",
        "blocks 10,11 changed (18 tensors); 92 tensors are bit-identical.",
        "| layers trained | blocks 10,11 |",
        "| data | `songs.jsonl`: 11 samples for training, 1 for validation |",
        f"| validation loss | {scores['before']['loss']:.4f} before, {scores['after']['loss']:.4f} after |",
        "| lr | `0.002` |",
        f"litfreeze finetune full --checkpoint_dir org/base@{commit} --trainable_layers 10,11 --data songs.jsonl",
        "--train.max_steps 2",
    ):
        assert said in text, text


def test_an_adapter_goes_as_peft_loads_it(hub, base, run, writer, tmp_path, demo_hf):
    final = tuned(finetune_lora)
    code, _, err = run("upload", final, "me/adapter", "--private")
    assert code == 0, err
    assert hub.repos["me/adapter"].private
    files = hub.repos["me/adapter"].files
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} < set(
        files
    ) and "model.safetensors" not in files
    settings = json.loads(files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "org/base"
    assert settings["revision"] == open_checkpoint("org/base").path.name
    front, text = card_of(hub, "me/adapter")
    assert front["base_model"] == "org/base" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft" and "LoRA r 8, alpha 16" in text
    expected = logits(final)
    shutil.rmtree(tmp_path / "hf")  # as on another machine
    torch.testing.assert_close(logits("me/adapter"), expected)
    shutil.copytree(open_checkpoint("me/adapter").path, "theirs")
    settings = {**settings, "base_model_name_or_path": str(demo_hf), "revision": None}
    write_json(Path("theirs/adapter_config.json"), settings)
    with torch.no_grad():
        theirs = AutoPeftModelForCausalLM.from_pretrained("theirs", dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("script", [finetune_full, finetune_lora])
def test_as_it_is_with_what_it_stands_over(hub, base, run, writer, tmp_path, script):
    final = tuned(script, **({"save": "delta"} if script is finetune_full else {}))
    assert run("upload", final, "me/as-it-is", "--format", "litfreeze")[0] == 0
    expected = logits(final)
    shutil.rmtree(tmp_path / "hf")
    torch.testing.assert_close(logits("me/as-it-is"), expected)
    assert run("download", "me/as-it-is", "--out_dir", "back")[0] == 0
    code, out, err = run("verify", "back")
    assert code == 0 and out.startswith("whole"), out + err
    assert open_checkpoint("back").history[-1]["step"] == 2


def test_what_lies_between_is_told_of_what_was_merged(hub, base, run, writer):
    first = tuned(finetune_lora)
    second = tuned(finetune_lora, first, out_dir=Path("second"), trainable_layers=None)
    assert run("upload", merge_lora(second, Path("merged")), "me/merged")[0] == 0
    front, text = card_of(hub, "me/merged")
    assert front["base_model"] == "org/base" and "## Training, run 2 of 2" in text
    assert text.count("litfreeze finetune lora") == 2 and "blocks 10,11 changed (14 tensors)" in text
    delta = tuned(save="delta", out_dir=Path("third"))
    assert run("upload", merge_delta(delta, Path("whole")), "me/whole", "--revision", "v2")[0] == 0
    assert (
        "model.safetensors" in hub.repos["me/whole"].branches["v2"] and "README.md" not in hub.repos["me/whole"].files
    )


def test_an_adapter_of_a_tuned_model_is_none_of_the_model_on_the_hub(hub, base, run, writer):
    """PEFT would put it over other weights than it was trained on, and say nothing."""
    full = tuned()
    adapter = tuned(finetune_lora, full, out_dir=Path("lora"))
    code, _, err = run("upload", adapter, "me/adapter")
    assert code == 2 and "--base_model ORG/NAME" in err and not hub.requests
    run("upload", full, "me/tuned")
    assert run("upload", adapter, "me/adapter", "--base_model", "me/tuned")[0] == 0
    torch.testing.assert_close(logits("me/adapter"), logits(adapter), rtol=1e-5, atol=1e-5)
    assert run("upload", merge_lora(adapter, Path("merged")), "me/merged")[0] == 0
    assert card_of(hub, "me/merged")[0]["base_model"] == "org/base"  # under all that was trained


def test_nothing_tells_of_this_machine(hub, base, run, writer, tmp_path, demo_hf):
    """Not even what other tools had noted in the base's files."""
    there = tmp_path / "a-private-folder" / "my-base"
    shutil.copytree(demo_hf, there)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((there / name).read_text(encoding="utf-8"))
        noted = {"tokenizer_file": "secret-place/x.json", "name_or_path": "../../secret-place/llama"}
        noted = noted | {"files": {"a": ["/home/a", "file:///home/a"]}} if name.startswith("tokenizer") else {}
        write_json(there / name, content | {"_name_or_path": str(there)} | noted)
    full, lora = tuned(checkpoint=there), tuned(finetune_lora, there, out_dir=Path("lora"))
    continued = tuned(finetune_lora, lora, out_dir=Path("more"), trainable_layers=None)
    merged = merge_lora(continued, Path("merged"))
    words = [
        ["upload", full, "me/a"],
        ["upload", full, "me/b", "--format", "litfreeze"],
        ["upload", continued, "me/c", "--base_model", "org/base"],
        ["upload", continued, "me/d", "--format", "litfreeze", "--base_model", "org/base"],
        ["upload", merged, "me/e", "--format", "litfreeze"],
        ["upload", there, "me/f"],
    ]
    for each in words:
        assert run(*each)[0] == 0
    private = [str(tmp_path), "a-private-folder", "secret-place", "/home/", f"/{getpass.getuser()}/"]
    for name in "abcdef":
        for file, content in hub.repos[f"me/{name}"].files.items():
            told = [word for word in private if word.encode() in content]
            assert not told or file == "tokenizer.json", (name, file, told)
    assert "over `my-base`" in card_of(hub, "me/a")[1] and "base_model" not in card_of(hub, "me/a")[0]
    torch.testing.assert_close(logits("me/d"), logits(continued))
    # Beside a base of its name a directory without a name on the Hub is whole too
    run("download", "me/b", "--out_dir", "back")
    assert run("verify", "back")[0] == 0


@pytest.mark.parametrize(
    "place",
    [
        "/home/alice/x",
        "~/x",
        "~alice/x",
        "./x",
        "../../alice/x",
        r"..\x",
        r"C:\Users\alice",
        "c:/x",
        "file:/x",
        r"\\pc\x",
    ],
)
def test_a_place_is_left_out_at_any_depth(place):
    """What is read stays, even if it looks like one: a token, a class, a template."""
    read = {"id2label": {"0": "/r/news"}, "eos_token": "/end", "added_tokens_decoder": {"7": {"content": "//x"}}}
    read |= {"chat_template": "/think {{ x }}", "additional_special_tokens": ["//"]}
    read |= {"a": ["/", "a/b", "1/2", "https://x/y", 3, None]}
    noted = {"_name_or_path": "org/name", "b": place, "vocab_file": None}
    assert without_places({**read, **noted, "d": {"e": [place, {"f": place}], **noted}}) == {**read, "d": {"e": [{}]}}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_nothing_and_shows_all(hub, base, run, writer):
    final = tuned()
    code, out, _ = run("upload", final, "me/tuned", "--dry_run", "--out_dir", "look")
    assert code == 0 and not hub.requests and "me/tuned" not in hub.repos
    assert Path("look/README.md").read_text(encoding="utf-8").strip() in out and "Would be  model.safetensors" in out
    assert open_checkpoint("look").weights_hash == open_checkpoint(final).weights_hash


def test_what_cannot_be_uploaded_is_told_before_anything_is(hub, base, run, writer, monkeypatch):
    full, lora = tuned(), tuned(finetune_lora, base, out_dir=Path("lora"))
    for words, told in {
        (lora, "me/x", "--format", "hf"): "merge_lora",
        (full, "me/x", "--format", "peft"): "carries no adapter",
        (base, "me/x", "--format", "litfreeze"): "no litfreeze.json",
        (lora, "me/x"): "--base_model ORG/NAME",
        (full, "x"): "is no name on the Hub",
        (full, "me/x@v1"): "--revision names a branch",
        (full, "me/x", "--out_dir", "run"): "is not empty",
    }.items():
        code, _, err = run("upload", *words)
        assert code == 2 and told in err and not hub.requests
    hub.add("me/public", base)
    for words, told in {
        (full, "me/x", "--token", "hf_reader"): "refuses the token for me/x (403)",
        (full, "me/x", "--token", "hf_nobody"): "refuses the token for me/x (401)",
        (full, "me/public", "--private"): "there already and public",
        (lora, "me/public", "--base_model", "org/base"): "holds model.safetensors",
    }.items():
        code, _, err = run("upload", *words)
        assert code == 2 and told in err and len(err.strip().splitlines()) == 1, err
    assert "me/x" not in hub.repos
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = run("upload", full, "me/x")
    assert code == 2 and "needs a token" in err and not hub.requests


# --- the command in the card -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["-2:", "20%-80%", [1, 2, 10], None])
def test_the_command_says_what_the_recipe_says(layers):
    options = parse(["finetune", "full"], COMMANDS)[1]
    options |= {"trainable_layers": layers, "train": TrainArgs(lr=1e-4, max_norm=None), "seed": 3}
    options["frozen"] = FrozenArgs(fused_backward=True)
    options["data"].prompt_args = {"a": True, "it's": "x y", "--n": 3}
    options["data"].path = Path("some data.jsonl")
    recipe = recipe_yaml(finetune_full, options)
    words = command("full", recipe)
    assert recipe_yaml(finetune_full, parse(words[1:], COMMANDS)[1]) == recipe
