"""`litfreeze layers`: what a choice would cost, told without training."""

import re

import pytest

from litfreeze.__main__ import main


def told(capsys, *words: str) -> str:
    assert main(["layers", *words]) == 0
    return capsys.readouterr().out


def megabytes(text: str, kind: str) -> float:
    """Of `kind`, in the line of the plan."""
    line = next(line for line in text.splitlines() if line.lstrip().startswith("this plan:"))
    number, unit = re.search(rf"{kind} ([0-9.,]+) ([kMG]?B)", line).groups()
    return float(number.replace(",", "")) * {"B": 1e-6, "kB": 1e-3, "MB": 1, "GB": 1e3}[unit]


def test_it_tells_what_trains_its_memory_and_what_freezing_saves(capsys):
    text = told(capsys, "--trainable_layers", "10,11")
    assert "blocks 10,11: 369,152 of" in text and "cache full" in text and "FLOPs per token" in text
    assert "cache full" not in told(capsys, "--trainable_layers", "first:2")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("--optimizer", "muon"), "optimizer"),
        (("--optimizer", "adamw8bit"), "optimizer"),
        (("--fused_backward",), "gradients"),
        (("--activation_checkpointing",), "activations"),
        (("--freeze_quantize", "nf4"), "weights"),
        (("--max_seq_length", "64"), "activations"),
    ],
)
def test_what_a_run_can_do_to_need_less_shows(capsys, words, kind):
    layers = ("--trainable_layers", "4-9", "--precision", "32-true")
    assert megabytes(told(capsys, *layers, *words), kind) < megabytes(told(capsys, *layers), kind)
