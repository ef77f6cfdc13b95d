"""The command line: what a person types is what a function gets, and every mistake is one line and exit code 2."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from litfreeze.__main__ import COMMANDS, main
import re
from litfreeze.cli import parse, show
OPTION = re.compile("--[A-Za-z]")
from litfreeze.data.args import DataArgs
from litfreeze.errors import RunError, UsageError
from litfreeze.finetune.full import Layers
from litfreeze.train.args import EvalArgs, TrainArgs

FULL = {"finetune full": "litfreeze.finetune.full:setup"}
RECIPES = sorted((Path(__file__).parents[1] / "config_hub").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LITFREEZE_")]:
        monkeypatch.delenv(name)


def full(*words):
    """The arguments that `litfreeze finetune full ...` would be called with."""
    return parse(["finetune", "full", *words], FULL)[1]


def written(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- what is typed arrives ----

layer_like = st.text("0123456789-,:%. _+[]*xfirstlaevyn", max_size=12)


def arrives(value, text):
    if isinstance(value, int):
        return str(value) == text  # a plain number may come as one; 010 and 1_0 may not
    if isinstance(value, list):
        return text.startswith("[")
    return value == text


def few(
    layers: Layers = None,
    style: Optional[str] = None,
    seed: int = 0,
    lr: Optional[float] = 0.0,
    mask: bool = True,
    precision: Optional[Literal["a", "b"]] = "a",
):
    """Options of the types that `finetune full` has, but few of them: hypothesis parses hundreds of lines."""


def small(*words):
    return parse(["few", *words], {"few": f"{__name__}:few"})[1]


@given(layer_like.filter(lambda text: not OPTION.match(text)))
@example("1:30")
@example("010")
@example("1_0")
@example("-2:")
@example("-1")
@example("-4,-2")
@example("-2:,0")
@example("20%-80%")
@example("- 10")
@example("[10")
@example("[1:]")
@example("[[1]]")
@example("[null]")
@example("-0")
@example("1e3")
@example("")
def test_any_layer_like_text_arrives_unchanged(text):
    assert arrives(small("--layers", text)["layers"], text)
    assert arrives(small(f"--layers={text}")["layers"], text)


@pytest.mark.parametrize("text", ["1:30", "010", "1_0", "-2:", "-1", "-4,-2", "-2:,0", "10", "last:8", "20%-80%"])
def test_layers_of_finetune_arrive_unchanged(text):
    for option in ("trainable_layers", "freeze_trainable_layers_ids"):
        assert arrives(full(f"--{option}", text)[option], text)


@given(st.text(max_size=12).filter(lambda text: not OPTION.match(text) and text != "null"))
@example("{a: 1}")
@example("*a")
@example("!!python/object:os.system x")
@example("\u0661")
@example("9" * 400)
def test_any_text_arrives_unchanged_or_is_refused(text):
    assert small("--style", text)["style"] == text
    assert arrives(small("--layers", text)["layers"], text)
    for option, kind in (("seed", int), ("lr", float), ("mask", bool), ("precision", str)):
        try:
            value = small(f"--{option}", text)[option]
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(value, kind)


@given(layer_like)
@example("1:30")
def test_quoted_text_in_a_file_arrives_unchanged(text):
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), f"layers: {json.dumps(text)}\n")
        assert arrives(small("--config", path)["layers"], text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:30", "1:30"),  # YAML 1.1 would say 90
        ("1_000", "1_000"),
        ("010", "010"),
        ("10,11", "10,11"),
        ("10", 10),
        ("-1", -1),
        ("'-2:'", "-2:"),
        ("[0, 1:30, '-2:', -1]", [0, "1:30", "-2:", -1]),
        ("\n- 0\n- 2-3", [0, "2-3"]),
        ("null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("off", "off"),
    ],
)
def test_layers_in_a_file(tmp_path, text, expected):
    assert full("--config", written(tmp_path, f"trainable_layers: {text}\n"))["trainable_layers"] == expected


def test_arguments_are_plain_python():
    arguments = full("--train.lr", "1e-4", "--data", "a.jsonl", "--eval.interval=5", "--freeze_trainable_layers", "-8")
    assert arguments["train"] == TrainArgs(lr=1e-4)
    assert arguments["data"] == DataArgs(path=Path("a.jsonl"))
    assert arguments["eval"] == EvalArgs(interval=5)
    assert arguments["freeze_trainable_layers"] == -8
    assert arguments["checkpoint_dir"] is None
    assert full()["data"] == DataArgs()


def test_numbers_and_lists():
    assert full("--train.max_time", "90")["train"].max_time == 90
    assert full("--train.max_time", "1h30m")["train"].max_time == "1h30m"
    assert full("--devices", "0,2")["devices"] == "0,2"
    assert full("--trainable_layers", "[10, 1:30]")["trainable_layers"] == [10, "1:30"]
    assert full("--trainable_modules", "[q_proj, mlp]")["trainable_modules"] == ["q_proj", "mlp"]
    assert full("--train.max_norm", "null")["train"].max_norm is None


def test_a_mapping(tmp_path):
    expected = {"enable_thinking": False, "note": "1:30", "n": 2}
    text = '{enable_thinking: false, note: "1:30", n: 2}'
    assert full("--data.prompt_args", text)["data"].prompt_args == expected
    recipe = written(tmp_path, f"data:\n  prompt_args: {text}\n")
    assert full("--config", recipe)["data"].prompt_args == expected
    printed = parse(["finetune", "full", "--config", recipe, "--print_config"], FULL)[1]["text"]
    assert full("--config", written(tmp_path, printed))["data"].prompt_args == expected
    for wrong in ("3", "{a", "[a]", "{[]: 1}", "!!python/name:os.system"):
        with pytest.raises(UsageError, match=r"--data.prompt_args: .* is not a mapping such as '{name: value}'"):
            full("--data.prompt_args", wrong)


def test_a_switch_needs_no_value():
    assert full("--untie_embeddings", "--seed", "3") == full("--untie_embeddings", "true", "--seed", "3")
    assert full("--untie_embeddings")["untie_embeddings"] is True


@pytest.mark.parametrize("order", [1, -1])
def test_data_is_short_for_its_path(tmp_path, monkeypatch, order):
    expected = DataArgs(path=Path("a.jsonl"), mask_prompt=False)
    assert full(*["--data=a.jsonl", "--data.mask_prompt=false"][::order])["data"] == expected
    recipe = written(tmp_path, "data: a.jsonl\n")
    assert full(*[f"--config={recipe}", "--data.mask_prompt=false"][::order])["data"] == expected
    monkeypatch.setenv("LITFREEZE_DATA", "a.jsonl")
    assert full("--data.mask_prompt=false")["data"] == expected
    assert full("--data.mask_prompt=false", "--data", "b.jsonl")["data"].path == Path("b.jsonl")


def test_home_is_expanded_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert full("--data=~/a.jsonl")["data"].path == Path("/home/someone/a.jsonl")


# ---- which place wins ----


def test_flags_over_files_over_environment_over_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "1e-3")
    monkeypatch.setenv("LITFREEZE_TRAINABLE_LAYERS", "-2:")
    assert full()["train"].lr == 1e-3
    assert full()["trainable_layers"] == "-2:"
    recipe = written(tmp_path, "train:\n  lr: 1e-4\n  epochs: 2\n")
    later = written(tmp_path, "train.epochs: 3\n", "later.yaml")
    for words in (["--config", recipe, "--train.lr", "1e-5"], ["--train.lr=1e-5", f"--config={recipe}"]):
        assert full(*words)["train"] == TrainArgs(lr=1e-5, epochs=2)
    assert full("--config", recipe, "--config", later)["train"] == TrainArgs(lr=1e-4, epochs=3)
    monkeypatch.setenv("LITFREEZE_CONFIG", recipe)
    assert full()["train"] == TrainArgs(lr=1e-3, epochs=2)


def test_a_variable_of_another_command_is_left_alone(monkeypatch):
    commands = FULL | {"other": f"{__name__}:groups"}
    monkeypatch.setenv("LITFREEZE_WORD", "x")
    assert parse(["finetune", "full"], commands)[1]["seed"] == 1337
    monkeypatch.setenv("LITFREEZE_TRAIN_LR", "1e-3")
    with pytest.raises(UsageError, match=r"LITFREEZE_TRAIN_LR .*Did you mean 'LITFREEZE_TRAIN__LR'"):
        parse(["finetune", "full"], commands)


def test_print_config_is_read_back(tmp_path):
    words = ["--trainable_layers=1:30", "--trainable_modules=[q_proj, '010']", "--data", "a b.jsonl", "--train.lr=3e-5"]
    function, printed = parse(["finetune", "full", *words, "--print_config"], FULL)
    assert function is show
    assert full("--config", written(tmp_path, printed["text"])) == full(*words)
    assert yaml.safe_load(parse(["finetune", "full", "--print_config"], FULL)[1]["text"])["train"]["epochs"] is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: "-".join(path.parts[-3:]))
def test_recipes_parse(recipe):
    arguments = full("--config", str(recipe))
    assert str(arguments["checkpoint_dir"]).startswith("checkpoints/")
    assert (arguments["trainable_layers"] is not None) == (recipe.stem == "freeze")
    assert f"--config {recipe.relative_to(recipe.parents[3])}" in recipe.read_text(encoding="utf-8").splitlines()[0]


def test_there_are_recipes():
    assert len(RECIPES) >= 6


# ---- mistakes ----


@dataclass
class Pair:
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


HIGH = Pair(high=5)


def groups(word: str, size: Literal[1, 2] = 1, pair: Pair = HIGH, path: Optional[Path] = None):
    """Do nothing."""


def fails(how: str):
    """Fail in the way that `how` says."""
    if how == "interrupt":
        raise KeyboardInterrupt
    raise {
        "usage": UsageError("no block 99. Blocks: 0-11."),
        "run": RunError("the disk is full."),
        "bug": IndexError("one\n  two"),
        "silent": KeyError(),
    }[how]


def run(capsys, *words):
    code = main(list(words))
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--trainable_layer 10", "unknown option --trainable_layer. Did you mean '--trainable_layers'?"),
        ("--trainable-layers 10", "Did you mean '--trainable_layers'?"),
        ("--lr 1", "unknown option --lr. Did you mean '--train.lr'?"),
        ("--train.max_step 1", "Did you mean '--train.max_steps'?"),
        ("--prec 32-true", "unknown option --prec."),  # no abbreviations
        ("--train.lr fast", "--train.lr: 'fast' is not a number."),
        ("--train.lr 1:30", "--train.lr: '1:30' is not a number."),
        ("--train.lr .nan", "--train.lr: '.nan' is not a number."),
        ("--train.lr 1e999", "--train.lr: '1e999' is not a number."),
        ("--seed 1.5", "--seed: '1.5' is not a whole number."),
        (f"--train.lr {'9' * 400}", "is not a number."),
        (f"--seed {'9' * 5000}", "..."),
        ("--seed null", "--seed: 'null' is not a whole number."),
        ("--seed=", "--seed: '' is not a whole number."),
        ("--train.lr=", "--train.lr: '' is not a number."),
        ("--data=", "--data: '' is not a path."),
        ("--untie_embeddings maybe", "'maybe' is not true or false."),
        ("--precision bf16", "not one of 32-true, bf16-mixed, bf16-true, 16-mixed. Did you mean 'bf16-true'?"),
        ("--trainable_layers", "--trainable_layers needs a value"),
        ("--trainable_layers --seed 1", "--trainable_layers needs a value"),
        ("--data --x", "--data needs a value: a path. One that begins with two dashes is written --data=--x"),
        ("--trainable_layers 10, 11", "'11' belongs to no option. A value with blanks needs quotes."),
        ("-trainable_layers 10", "Options begin with two dashes."),
        ("\u2013seed 1", "Options begin with two dashes."),
        ("--seed 1 --seed 2", "--seed '1' and --seed '2': one option given twice."),
        ("--data a --data.path b", "--data 'a' and --data.path 'b': one option given twice."),
        ("--train 3", "--train is a group, not an option. Set --train.lr, "),
        ("--help=1", "--help takes no value."),
        ("--config nothing.yaml", "--config nothing.yaml: no such file."),
        ("--config .", "--config .: not a text file"),
    ],
)
def test_mistakes_on_the_line(capsys, words, says):
    code, out, err = run(capsys, "finetune", "full", *words.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "seed: 1\ntrainable_layers: -2:\n",
            "line 2: not YAML (mapping values are not allowed here): trainable_layers: -2:",
        ),
        ("trainable_layers: -2:\n", "needs quotes: '-2:'"),
        ("trainable_layers: [0, -2:]\n", "line 1): a mapping where a value belongs. Text with a colon, such as '-2:'"),
        ("trainable_layers: *a\n", "needs quotes"),
        ("seed: [1, 2", "line 1: not YAML"),
        ("train:\n\tlr: 1\n", "line 2: not YAML (found character '\\t'"),
        ("train:\n\tlr: 1\n", "Indent with blanks, not tabs."),
        ("\nlayers: 1\n", "unknown option layers (FILE, line 2). Did you mean 'trainable_layers'?"),
        ("train:\n  # none\n  lrr: 1\n", "unknown option train.lrr (FILE, line 3). Did you mean 'train.lr'?"),
        ("train: {lr: fast}\n", "train.lr (FILE, line 1): 'fast' is not a number."),
        ("data:\n  format: alpacca\n", "data.format (FILE, line 2): 'alpacca' is not one of auto, alpaca, "),
        ("seed: null\n", "seed (FILE, line 1): null is not a whole number."),
        ("seed: [1]\n", "seed (FILE, line 1): ['1'] is not a whole number."),
        ("seed: 1:30\n", "'1:30' is not a whole number."),
        ("trainable_layers: {a: 1}\n", "a mapping where a value belongs"),
        ("train:\n", "train (FILE, line 1) is a group, not an option."),
        ("data: null\n", "data (FILE, line 1) is a group, not an option."),
        ("data: [a, b]\n", "data (FILE, line 1): ['a', 'b'] is not a path."),
        ("seed: 1\nseed: 2\n", "seed (FILE, line 1) and seed (FILE, line 2): one option given twice."),
        ("train: {lr: 1}\ntrain.lr: 2\n", "one option given twice."),
        ("? [a]\n: 1\n", "must be plain text (FILE, line 1)"),
        ("just words\n", "FILE: not lines of 'option: value'"),
        ("seed: 1\n---\nseed: 2\n", "not YAML"),
        ("seed: \x01\n", "not YAML"),
    ],
)
def test_mistakes_in_a_file(capsys, tmp_path, text, says):
    path = written(tmp_path, text)
    code, out, err = run(capsys, "finetune", "full", "--config", path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") <= 2
    assert says.replace("FILE", path) in err


def test_a_file_that_is_not_text(capsys, tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    code, _, err = run(capsys, "finetune", "full", "--config", str(tmp_path / "weights.yaml"))
    assert code == 2
    assert "not a text file" in err


def test_a_bad_variable(capsys, monkeypatch):
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "fast")
    code, _, err = run(capsys, "finetune", "full")
    assert (code, err) == (2, "error: LITFREEZE_TRAIN__LR (environment): 'fast' is not a number.\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetune", "ful"], "unknown command 'finetune ful'. Did you mean 'finetune full'?"),
        (["finetun", "full"], "unknown command 'finetun'. Did you mean 'finetune'?"),
        (["full"], "unknown command 'full'. Did you mean 'finetune full'?"),
        (["xyzzy"], "unknown command 'xyzzy'. Commands: finetune full, "),
        (["--seed", "1"], "--seed stands before the command."),
        (["finetune", "--seed", "1"], "Write 'litfreeze finetune full --seed ...'."),
    ],
)
def test_mistaken_commands(capsys, words, says):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_errors_become_a_line_and_a_code(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "fails", f"{__name__}:fails")
    assert run(capsys, "fails", "--how", "usage") == (2, "", "error: no block 99. Blocks: 0-11.\n")
    assert run(capsys, "fails", "--how", "run") == (1, "", "error: the disk is full.\n")
    again = "(run again with --debug for the traceback)\n"
    assert run(capsys, "fails", "--how", "bug") == (1, "", f"error: IndexError: one two {again}")
    assert run(capsys, "fails", "--how", "interrupt") == (130, "", "interrupted\n")
    assert run(capsys, "fails") == (
        2,
        "",
        "error: litfreeze fails needs --how. 'litfreeze fails --help' lists the options.\n",
    )


@pytest.mark.parametrize("place", range(4))
def test_debug_anywhere_shows_the_traceback(capsys, monkeypatch, place):
    monkeypatch.setitem(COMMANDS, "fails", f"{__name__}:fails")
    words = ["fails", "--how", "bug"]
    words.insert(place, "--debug")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert err.startswith("Traceback")
    assert "\nerror: IndexError: one two" in err


def test_groups_of_other_functions():
    commands = {"other": f"{__name__}:groups"}
    assert parse(["other", "--word", "010", "--pair.low", "3"], commands)[1] == {
        "word": "010",
        "size": 1,
        "pair": Pair(3, 5),
        "path": None,
    }
    with pytest.raises(UsageError, match=r"^--pair: low 9 is above high 5$"):
        parse(["other", "--word", "x", "--pair.low", "9"], commands)
    assert parse(["other", "--word", "x", "--size", "2"], commands)[1]["size"] == 2
    with pytest.raises(UsageError, match="'3' is not one of 1, 2"):
        parse(["other", "--word", "x", "--size", "3"], commands)


# ---- help, and whole processes ----


def test_help_lists_every_command(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {command}  " in out for command in COMMANDS)
    assert run(capsys, "-h")[1] == out


def test_no_command_prints_the_choices(capsys):
    for words in ([], ["finetune"]):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert "finetune full" in err


def test_help_of_a_command_is_its_docstring(capsys):
    code, out, err = run(capsys, "finetune", "full", "--trainable_layers", "1", "--help")
    assert (code, err) == (0, "")
    assert "Fine-tune a model's own weights" in out
    assert "Blocks to train: 10,11" in out
    assert "--train.micro_batch_size INT" in out
    assert "--data PATH           Short for --data.path PATH." in out
    assert "3 % of the steps" in " ".join(out.split())
    assert "LITFREEZE_DATA__PATH=VALUE" in out


def process(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_version_and_exit_codes_of_the_process():
    done = process("-m", "litfreeze", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("litfreeze ")
    done = process("-m", "litfreeze", "finetune", "full", "--trainable_layer", "-2:")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown option --trainable_layer.")


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from litfreeze.__main__ import main
        assert main(["--help"]) == main(["finetune", "full", "--help"]) == 0
        assert main(["finetune", "full", "--trainable_layers", "-2:", "--print_config"]) == 0
        heavy = {"torch", "lightning", "numpy", "transformers", "tokenizers", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy"""
    done = process("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_quiet():
    words = [sys.executable, "-m", "litfreeze", "finetune", "full", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141
