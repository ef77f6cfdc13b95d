"""What the README says is so: its commands parse, its layer table is true, its table of commands is whole."""

import re
import shlex
from pathlib import Path

import pytest

from litfreeze.__main__ import COMMANDS, commands
from litfreeze.cli import parse
from litfreeze.freeze.layers import parse_layers

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```\n(.*?)```", README, re.S)
LINES = [line for fence in FENCES for line in fence.splitlines() if line.startswith("litfreeze ")]


@pytest.mark.parametrize("line", LINES)
def test_every_command_parses(line):
    parse(shlex.split(line, comments=True)[1:], COMMANDS)


def test_there_are_such_lines():
    assert len(LINES) >= 5


def test_the_table_of_commands_is_whole():
    listed = set(re.findall(r"^\| `litfreeze ([a-z_ ]+)` \|", README, re.M))
    assert listed == set(commands())


def test_the_layer_table_is_true():
    rows = {
        "10,11": [10, 11],
        "0-3,8": [0, 1, 2, 3, 8],
        "-2:": [28, 29],
        "last:8": list(range(22, 30)),
        "every:4": [3, 7, 11, 15, 19, 23, 27],
        "20%-80%": list(range(6, 24)),
    }
    for spec, blocks in rows.items():
        assert f"`{spec}`" in README
        assert parse_layers(spec, 30) == blocks


def test_the_two_commands_are_what_ci_runs():
    assert "pip install '.[test]' && pytest" in README
    ci = Path(__file__).parents[1].joinpath(".ci/run").read_text(encoding="utf-8")
    assert "'.[test]'" in ci and "\npytest" in ci
