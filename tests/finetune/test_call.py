"""`litfreeze.finetune` and `litfreeze.load`: the command line's runs, as calls."""

import json
import os
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import litfreeze
from litfreeze.__main__ import main
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.cli import options_of
from litfreeze.demo import MODEL_DIR, TRAIN_FILE
from litfreeze.finetune.call import SCRIPTS, placed
from litfreeze.scripts.convert import to_hf, to_peft
from litfreeze.scripts.merge import merge_delta, merge_lora
from litfreeze.train.args import EvalArgs, TrainArgs

QUICK = {"max_steps": 3, "global_batch_size": 8, "eval": {"max_samples": 8, "max_new_tokens": 2}}
WORDS = ["--train.max_steps", "3", "--train.global_batch_size", "8"]
WORDS += ["--eval.max_samples", "8", "--eval.max_new_tokens", "2"]
RECORDS = [json.loads(line) for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:24]]


def weights(checkpoint_dir: Path) -> str:
    return open_checkpoint(checkpoint_dir).weights_hash


@pytest.mark.parametrize(
    ("method", "call", "words"),
    [
        ("full", {"trainable_layers": range(10, 12), "lr": 1e-3}, "--trainable_layers 10,11 --train.lr 1e-3"),
        ("lora", {"trainable_layers": "-2:", "lora_r": 4, "seed": 3}, "--trainable_layers -2: --lora_r 4 --seed 3"),
    ],
)
def test_a_call_is_the_command_to_the_bit(tmp_path, capsys, method, call, words):
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    line = ["finetune", method, "--data", str(tmp_path / "records.jsonl"), "--out_dir", str(tmp_path / "line")]
    assert main([*line, *words.split(), *WORDS]) == 0
    told = capsys.readouterr().out
    result = litfreeze.finetune(data=RECORDS, method=method, out_dir=tmp_path / "call", **call, **QUICK)
    assert capsys.readouterr().out.splitlines()[0] == told.splitlines()[0]
    assert weights(result.checkpoint_dir) == weights(tmp_path / "line/final")
    assert result.outcome.after.loss == json.loads((tmp_path / "line/results.json").read_text())["after"]["loss"]


def test_a_config_stands_below_what_is_given(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("trainable_layers: 3\ntrain:\n  lr: 1e-3\n  max_steps: 9\n", encoding="utf-8")
    named = {}
    monkeypatch.setattr("litfreeze.finetune.full.made", lambda given: named.update(given) or (None, None))
    monkeypatch.setattr("litfreeze.launch.launch", lambda *_: None)
    monkeypatch.setenv("LITFREEZE_TRAIN__EPOCHS", "7")  # the environment is the command line's
    litfreeze.finetune(config=tmp_path / "a.yaml", max_steps=2, eval=EvalArgs(patience=4), frozen={"cache": "off"})
    assert str(named["trainable_layers"]) == "3" and named["train"] == TrainArgs(lr=1e-3, max_steps=2)
    assert named["eval"] == EvalArgs(patience=4) and named["frozen"].cache == "off"


@pytest.fixture
def read(monkeypatch):
    """What a call would give the script, in place of running it."""
    named = {}
    monkeypatch.setattr("litfreeze.finetune.full.made", lambda given: named.update(given) or (None, None))
    monkeypatch.setattr("litfreeze.launch.launch", lambda *_: None)
    return lambda **call: litfreeze.finetune(**call) or named


@pytest.mark.parametrize("layers", [np.array([10, 11]), torch.tensor([10, 11]), {10, 11}, (np.int64(10), 11)])
def test_numbers_of_numpy_and_torch_are_numbers(read, layers):
    named = read(trainable_layers=layers, lr=np.float64(1e-4), max_steps=torch.tensor(3), mask_prompt=np.bool_(False))
    assert named["trainable_layers"] == [10, 11] and named["train"] == TrainArgs(lr=1e-4, max_steps=3)
    assert named["data"].mask_prompt is False


def test_text_stays_text_and_a_config_may_be_a_dict(read):
    config = {"log": {"run": "31e4921"}, "seed": 3, "train": {"lr": 1e-3}}
    named = read(config=config, out_dir="1e5", seed=4, data={"prompt_args": {"version": "1.10"}})
    assert (named["log"].run, named["out_dir"], named["seed"]) == ("31e4921", Path("1e5"), 4)
    assert named["data"].prompt_args == {"version": "1.10"} and named["train"] == TrainArgs(lr=1e-3)


@given(st.data())
@pytest.mark.parametrize("method", SCRIPTS)
def test_every_option_has_a_name_in_a_call(method, data):
    options = options_of(SCRIPTS[method])
    name = data.draw(st.sampled_from(sorted(options)))
    assert placed({name: 1}, SCRIPTS[method]) == {name: 1}
    group, _, leaf = name.rpartition(".")
    if group:
        assert placed({group: {leaf: 1}}, SCRIPTS[method]) == {name: 1}
        alone = [o for o in options if o.rpartition(".")[2] == leaf]
        if alone == [name]:
            assert placed({leaf: 1}, SCRIPTS[method]) == {name: 1}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"trainable_layer": 1}, "unknown option 'trainable_layer'. Did you mean 'trainable_layers'?"),
        ({"max_step": 1}, "unknown option 'max_step'. Did you mean 'max_steps'?"),
        ({"train": {"max_step": 1}}, "unknown option 'train.max_step'. Did you mean 'train.max_steps'?"),
        ({"lora_r": 4}, "lora_r is an option of method='lora' alone."),
        ({"method": "loar"}, "method: 'loar' is not one of full, lora. Did you mean 'lora'?"),
        ({"max_steps": 1, "train": {"max_steps": 1}}, "train.max_steps is given twice."),
        ({"max_steps": "many"}, "train.max_steps: 'many' is not a whole number."),
        ({"seed": None}, "seed: None is not a whole number."),
        ({"trainable_layers": "99"}, "99"),
        ({"data": [1]}, "data.path: record 1 is a int; records are dicts, in a list."),
        ({"data": [{"a": object()}]}, "data.path: record 1 is nothing that JSON can say"),
        ({"data": []}, "data.path: no records."),
        ({"data": 5}, "data.path: 5 is not a path, nor records"),
        ({"method": ["full"]}, "method: ['full'] is not one of full, lora."),
        ({"config": 5}, "config: 5 is not a path, nor a dict of options."),
        ({"lr": Decimal("1e-4")}, "train.lr: Decimal('0.0001') is not a number."),
        ({"log": {"run": b"x"}}, "log.run: b'x' is not text."),
        ({"data": "nowhere.jsonl"}, "There is no data at nowhere.jsonl."),
        ({"config": "nowhere.yaml"}, "config: nowhere.yaml cannot be read"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_begins(tmp_path, monkeypatch, call, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(litfreeze.UsageError) as refused:
        litfreeze.finetune(**call)
    assert told in str(refused.value) and not (tmp_path / "out").exists()


def test_the_name_is_function_and_package_whatever_is_imported_first():
    """All orders of the ways to import, each time as if nothing had been."""
    ways = ["import litfreeze", "import litfreeze.finetune.full", "from litfreeze.finetune import lora"]
    program = f"""
import inspect, itertools, sys, types
for order in itertools.permutations({ways}):
    for name in [name for name in sys.modules if name.partition(".")[0] == "litfreeze"]:
        del sys.modules[name]
    for way in order:
        exec(way)
        exec("import litfreeze")
        assert callable(litfreeze.finetune) and isinstance(litfreeze.finetune, types.ModuleType), order
    assert litfreeze.finetune.full.setup and litfreeze.finetune.lora.setup, order
    assert "method" in inspect.signature(litfreeze.finetune).parameters, order
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_import_is_light():
    heavy = ["torch", "numpy", "lightning_fabric", "jsonargparse", "yaml", "matplotlib", "wandb", "mlflow"]
    code = f"import sys, litfreeze; litfreeze.load, litfreeze.finetune; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_it_runs_in_another_thread_and_is_quiet_if_asked(tmp_path, capsys):
    found = []
    work = {"trainable_layers": "11", "out_dir": tmp_path / "run", "quiet": True, **QUICK}
    thread = threading.Thread(target=lambda: found.append(litfreeze.finetune(**work)))
    thread.start()
    thread.join()
    assert found[0].checkpoint_dir.is_dir() and capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def demo():
    return litfreeze.load(prompt_style="alpaca")


@pytest.mark.parametrize("prompt", [["hello", "play"], None, b"play", 5])
def test_one_prompt_a_call(demo, prompt):
    with pytest.raises(litfreeze.UsageError, match=r"The prompt should be text, not .*: one prompt a call"):
        demo.generate(prompt)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hello", "messages should be a list.* not str"),
        ([], "messages should be a list.* not an empty one"),
        ([{"role": "user"}], "message 1: 'content' is missing"),
        ([{"role": "user", "content": None}], "message 1: 'content' should be text, not null"),
        ([{"role": "User", "content": "a"}], "message 1 has the unknown role 'User'; known are system, user"),
        ([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], "The last message is the assistant's"),
    ],
)
def test_messages_are_checked_as_those_of_records_are(demo, messages, told):
    with pytest.raises(litfreeze.UsageError, match=told):
        demo.chat(messages)


def test_the_names_that_records_have_for_roles_mean_the_same_here(demo):
    turns = [("human", "user", "a"), ("gpt", "assistant", "b"), ("human", "user", "c")]
    ours, theirs = ([{"role": turn[i], "content": turn[2]} for turn in turns] for i in (1, 0))
    assert demo._answerer.tokens(ours) == demo._answerer.tokens(theirs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("top_p", None),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("max_new_tokens", 2.5),
        ("top_k", "3"),
        ("seed", 2**70),
        ("stop", [None]),
        ("stop", b"x"),
    ],
)
def test_options_of_an_answer_have_a_type(demo, option, value):
    with pytest.raises(litfreeze.UsageError, match=f"--{option} .* must be "):
        demo.generate("a", **{option: value})


def test_a_run_goes_by_none_of_the_modes_that_its_caller_is_in(tmp_path, monkeypatch):
    work = {"trainable_layers": "11", "max_seq_length": 64, "quiet": True, **QUICK, "max_steps": 1}
    monkeypatch.setattr("litfreeze.train.speed._measured", measured := {})  # nothing is known of this machine yet
    with torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = litfreeze.finetune(out_dir=tmp_path / "inside", **work)
    assert measured and all(rate > 0 for rates in measured.values() for rate in rates)
    outside = litfreeze.finetune(out_dir=tmp_path / "outside", **work)
    assert inside.outcome.after.loss == outside.outcome.after.loss


def test_one_run_at_a_time(monkeypatch):
    """Two would take each other's standard output, and each other's draws."""
    inside, go = threading.Event(), threading.Event()
    monkeypatch.setattr("litfreeze.finetune.full.made", lambda _: (inside.set(), go.wait(9)))
    monkeypatch.setattr("litfreeze.launch.launch", lambda *_: None)
    before = sys.stdout
    first = threading.Thread(target=lambda: litfreeze.finetune(quiet=True))
    first.start()
    assert inside.wait(9)
    with pytest.raises(litfreeze.UsageError, match="Another run is under way in this process"):
        litfreeze.finetune(quiet=True)
    go.set()
    first.join()
    assert sys.stdout is before and litfreeze.finetune() is None


def test_several_devices_are_refused_at_a_prompt(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    if (os.cpu_count() or 1) < 2:
        pytest.skip("this machine has one processor")
    with pytest.raises(litfreeze.UsageError, match="a notebook runs on one device; say devices=1"):
        litfreeze.finetune(devices=2, accelerator="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    adapter = litfreeze.finetune(method="lora", lr=2e-2, out_dir=folder / "lora", quiet=True, **QUICK).checkpoint_dir
    more = {"trainable_layers": "10,11", "lr": 2e-2, "save": "delta", "quiet": True}
    delta = litfreeze.finetune(out_dir=folder / "delta", **more, **QUICK).checkpoint_dir
    to_hf(checkpoint_dir=MODEL_DIR, out_dir=folder / "hf")
    to_peft(checkpoint_dir=adapter, out_dir=folder / "peft")
    whole = {"merged": merge_lora(str(adapter)), "whole": merge_delta(delta)}
    return {"adapter": adapter, "delta": delta, "hf": folder / "hf", "peft": folder / "peft", **whole}


def test_load_takes_every_kind(runs):
    models = {name: litfreeze.load(path) for name, path in runs.items()} | {"base": litfreeze.load()}
    texts = {name: model.logits("play some jazz") for name, model in models.items()}
    assert texts["base"].shape == (len(models["base"].tokenizer.encode("play some jazz")), 1536)
    assert torch.equal(texts["hf"], texts["base"])
    assert torch.equal(texts["delta"], texts["whole"])
    assert torch.allclose(texts["adapter"], texts["peft"], atol=1e-4)
    assert torch.allclose(texts["adapter"], texts["merged"], atol=0.3)  # bf16 rounds what is merged
    for name in ("adapter", "delta"):
        assert not torch.allclose(texts[name], texts["base"], atol=0.3)


def test_generate_and_chat_are_the_command(runs, capsys):
    model = litfreeze.load(runs["delta"])
    line = ["generate", "--checkpoint_dir", str(runs["delta"]), "--prompt", "play some jazz", "--max_new_tokens", "12"]
    assert main([*line, "--temperature", "0.8", "--seed", "5"]) == 0
    said = capsys.readouterr().out.rstrip("\n")
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5}
    assert model.generate("play some jazz", **options) == said
    messages = [{"role": "user", "content": "play some jazz"}]
    assert model.chat(messages, **options) == "".join(model.stream(messages, **options)) == said
    tokens = torch.tensor([model.tokenizer.encode("play some jazz")])
    assert torch.equal(model.module(tokens)[0], model.logits(tokens[0].tolist()))


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda: litfreeze.load("no/such/place"), "no/such/place"),
        (lambda: litfreeze.load(precision="16-false"), "--precision"),
        (lambda: litfreeze.load().generate("a", max_new_tokens=0), "--max_new_tokens 0"),
        (lambda: litfreeze.load().logits(""), "The text has 0 tokens"),
        (lambda: litfreeze.load().logits([10**6]), "1000000"),
        (lambda: litfreeze.load().logits([-1]), "which are 0 or more; not .-1"),
        (lambda: litfreeze.load().logits([1.7]), "logits takes a text, or a list of tokens"),
        (lambda: litfreeze.load(5), "checkpoint_dir: 5 is not a path"),
        (lambda: litfreeze.load(accelerator=5), "accelerator"),
    ],
)
def test_what_load_refuses(ask, told):
    with pytest.raises(litfreeze.UsageError, match=told):
        ask()
