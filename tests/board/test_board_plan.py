"""The numbers on the page are those that litfreeze itself tells, and so are the refusals."""

import json

import pytest
from litfreeze_board.figures import duration, looks_html, plan_html
from litfreeze_board.plan import plan, rank, set_rate

from litfreeze.__main__ import main

LAYERS = ["finetune", "full", "--trainable_layers", "10,11"]


def planned(*words, rankings=None):
    return plan(["finetune", *words], None, None, rankings or {})


def test_it_is_what_the_run_says_of_itself(tmp_path, capsys):
    found = planned("full", "--trainable_layers", "10,11", "--train.max_steps", "2")["plan"]
    assert main([*LAYERS, "--train.max_steps", "2", "--out_dir", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert f"Trains    {found['summary']}" in told and found["table"] in told
    memory = found["memory"]["plan"]
    parts = " + ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in memory.items())
    assert f"this plan: {parts} = {sum(memory.values()) / 1e6:.1f} MB" in told
    assert f"up to {found['memory']['tokens']:,} tokens" in told
    assert f"Run       {found['steps']} steps" in told and f"lr {found['lr']:g}" in told
    assert "blocks 0-9 and what is below" in told or "would save" in told
    assert found["stages"][0]["prefix"] == "0-9"
    final = tmp_path / "run" / "final" / "litfreeze.safetensors"
    assert found["disk"]["the final checkpoint"] == pytest.approx(final.stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    "words",
    [
        ["full", "--trainable_layers", "99"],
        ["full", "--trainable_layers", "10", "--layer_lr", "3:1e-4"],
        ["full", "--train.lr", "-1"],
        ["full", "--data", "no such file.jsonl"],
        ["full", "--save", "delta"],
        ["full", "--unfreeze", "0:1; 9e9:2"],
        ["full", "--frobnicate", "1"],
        ["lora", "--lora_r", "0"],
        ["lora", "--full_layers", "1", "--trainable_layers", "1"],
    ],
)
def test_the_refusal_is_the_command_lines_own(words, capsys):
    found = planned(*words)
    assert main(["finetune", *words]) == 2
    assert capsys.readouterr().err.strip() == f"error: {found['refused']}"
    assert found["model"]["n_layer"] == 12


def test_without_a_model_the_refusal_is_the_checkpoints():
    found = plan(LAYERS, "nowhere", None, {})
    assert found["model"] is None and "nowhere" in found["refused"]


def test_rates_reach_the_parts():
    found = planned("full", "--trainable_layers", "8-11", "--layer_lr", "8,9:1e-4", "--trainable_extra", "final_norm")
    parts = found["plan"]["parts"]
    assert parts["8"]["rates"] == pytest.approx([1e-4]) and parts["11"]["rates"] == pytest.approx([2e-3])
    assert parts["0"]["state"] == "frozen" and parts["final_norm"]["state"] == "trains"


def test_stages_of_a_timeline():
    found = planned("full", "--unfreeze", "gradual:3")["plan"]
    assert [stage["blocks"] for stage in found["stages"]] == [[11], [10, 11], [9, 10, 11]]
    assert found["stages"][0]["prefix"] == "0-10" and found["stages"][-1]["stop"] == found["steps"]


def test_a_ranking_is_asked_for_and_then_used():
    words = ["full", "--trainable_layers", "rank:spectrum:2"]
    assert planned(*words)["unranked"] == ["spectrum"]
    ranking = json.loads(json.dumps(rank(["finetune", *words], "spectrum")))  # as it comes through the pipe
    best = sorted(sorted(range(12), key=lambda i: -ranking["scores"][i])[:2])
    found = planned(*words, rankings={"spectrum": ranking})
    assert found["plan"]["layers"] == ",".join(map(str, best))
    assert any("Ranked by spectrum" in note for note in found["notes"])


def test_a_rate_is_set_changed_and_taken_back():
    text = set_rate("", 10, 1e-4, LAYERS)
    assert text == "10:0.0001"
    assert set_rate(text, 11, 1e-4, LAYERS) == "10,11:0.0001"
    assert set_rate("10,11:0.0001", 10, 2e-3, LAYERS) == "11:0.0001, 10:0.002"
    assert set_rate("10:0.0001", 10, None, LAYERS) == ""
    with pytest.raises(ValueError, match="does not train"):
        set_rate("", 3, 1e-4, LAYERS)


def test_html_is_escaped_and_whole():
    found = planned("full", "--unfreeze", "gradual:3")["plan"]
    found["disk"] = {"<script>": 10}
    html = plan_html(found)
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("lf-on") == 6 and "Thaws at" in html
    looks = {"10": {"step": 10.0, "grad_norm": 1.0, "update_ratio": 0.1, "drift": 0.2}}
    assert looks_html(looks, 12).count('class="lf-look"') == 36 and looks_html({}, 12) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8 s"), (42, "42 s"), (200, "3 min 20 s"), (18600, "5 h 10 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
