"""The command line: what a person types is what a function gets, and every mistake is told and ends with code 2."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from litfreeze.__main__ import COMMANDS, main
from litfreeze.cli import parse, read_yaml, show, write_yaml
from litfreeze.data.args import DataArgs
from litfreeze.errors import RunError, UsageError
from litfreeze.train.args import EvalArgs, TrainArgs

FULL = {"finetune full": "litfreeze.finetune.full:setup"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LITFREEZE_")]:
        monkeypatch.delenv(name)


def full(*words):
    """The arguments that `litfreeze finetune full ...` would be called with."""
    return parse(["finetune", "full", *words], FULL)[1]


def config(tmp_path, text, name="recipe.yaml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return f"--config={tmp_path / name}"


def few(
    layers: Union[str, int, list[Union[str, int]], None] = None,
    style: Optional[str] = None,
    seed: int = 0,
    lr: Optional[float] = 0.0,
    mask: bool = True,
    precision: Optional[Literal["a", "b"]] = "a",
    extra: Optional[dict[str, Any]] = None,
):
    """Options of the types that `finetune full` has, but few of them: hypothesis parses hundreds of lines."""


def small(*words):
    return parse(["few", *words], {"few": f"{__name__}:few"})[1]


# ---- what is typed arrives ----

LAYERS = ["1:30", "010", "1_0", "+3", "-2:", "-1", "-4,-2", "-2:,0", "10", "last:8", "20%-80%"]
LAYERS += ["[10", "- 10", "1e3", ""]
OPTION = re.compile("--[A-Za-z]|--$")
layer_like = st.text("0123456789-,:%. _+*]xfirstlaevyn", max_size=12).filter(lambda text: not OPTION.match(text))


@given(layer_like | st.sampled_from(LAYERS))
def test_layer_like_text_arrives_unchanged(text):
    assert small("--layers", text)["layers"] == small(f"--layers={text}")["layers"] == text
    with tempfile.TemporaryDirectory() as folder:
        assert small(config(Path(folder), f"layers: {json.dumps(text)}\n"))["layers"] == text


@pytest.mark.parametrize("text", LAYERS)
def test_layers_of_finetune_arrive_unchanged(text):
    assert small("--layers", text)["layers"] == text
    assert full("--trainable_layers", text)["trainable_layers"] == text


@given(st.text(max_size=12).filter(lambda text: not OPTION.match(text) and text.strip() != "null"))
@example("{a: 1}")
@example("*a")
@example("!!python/object:os.system x")
@example("9" * 5000)
@example("#")
def test_any_text_arrives_or_is_refused_in_a_line(text):
    assert small("--style", text)["style"] == text
    for option, kind in (("seed", int), ("lr", float), ("mask", bool), ("precision", str)):
        try:
            assert isinstance(small(f"--{option}", text)[option], kind)
        except UsageError as error:
            assert "\n" not in str(error)


def test_a_number_that_no_machine_holds_is_refused():
    assert small("--seed", str(2**63 - 1))["seed"] == 2**63 - 1
    for number in (2**63, -(2**63), 10**40):
        with pytest.raises(UsageError, match=f"--seed {number} is beyond"):
            small("--seed", str(number))


def test_layers_in_a_file(tmp_path):
    unchanged = ["1:30", "1_000", "010", "10,11", "+3", "2024-01-01", "off"]
    cases = {text: text for text in unchanged} | {"10": 10, "-1": -1, "'-2:'": "-2:", "null": None, "": None}
    cases |= {"[0, 1:30, '-2:', -1]": [0, "1:30", "-2:", -1], "\n- 0\n- 2-3": [0, "2-3"]}
    for text, expected in cases.items():
        assert small(config(tmp_path, f"layers: {text}\n"))["layers"] == expected


def test_arguments_are_plain_python(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    words = "--train.lr 1e-4 --data ~/a.jsonl --eval.interval=5 --freeze_trainable_layers -8"
    arguments = full(*words.split())
    assert arguments["train"] == TrainArgs(lr=1e-4)
    assert arguments["data"] == DataArgs(path=Path("/home/someone/a.jsonl"))
    assert arguments["eval"] == EvalArgs(interval=5)
    assert arguments["factory"].freeze_trainable_layers == -8
    assert arguments["checkpoint_dir"] is None
    assert full()["data"] == DataArgs()


def test_a_switch_may_stand_alone():
    assert full("--untie_embeddings")["untie_embeddings"] is True
    assert full("--untie_embeddings", "--seed", "3") == full("--untie_embeddings=true", "--seed=3")
    assert full("--untie_embeddings", "false")["untie_embeddings"] is False
    assert full("--resume")["resume"] is True and full("--resume", "a/b")["resume"] == Path("a/b")
    with pytest.raises(UsageError, match="'maybe' is not true or false"):
        full("--untie_embeddings", "maybe")


def test_numbers_lists_and_mappings(tmp_path):
    assert full("--train.max_time", "90")["train"].max_time == 90
    assert full("--train.max_time", "1h30m")["train"].max_time == "1h30m"
    assert full("--train.max_norm", "null")["train"].max_norm is None
    assert full("--devices", "0,2")["place"].devices == "0,2"
    assert full("--trainable_layers", "[10, 1:30]")["trainable_layers"] == [10, "1:30"]
    for lr in ("1e-4", "1E-4", ".0001", "0.0001"):
        assert full("--train.lr", lr)["train"] == full(config(tmp_path, f"train: {{lr: {lr}}}"))["train"]
    text = "{thinking: false, note: 1:30, tools: [{strict: true, n: 2, class_path: calendar.Calendar}]}"
    tools = [{"strict": True, "n": 2, "class_path": "calendar.Calendar"}]
    expected = {"thinking": False, "note": "1:30", "tools": tools}
    assert small("--extra", text)["extra"] == small(config(tmp_path, f"extra: {text}"))["extra"] == expected


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_stop_in_brackets_is_a_text_unless_it_is_json(command, tmp_path, monkeypatch):
    def stop(*words):
        return parse([command, *words], COMMANDS)[1]["stop"]

    for text in ("[INST]", "[<|im_end|>]", "[Q, A]", "[", "[1]", "['a']"):
        assert stop("--stop", text) == stop(config(tmp_path, f"stop: {json.dumps(text)}")) == [text]
    for texts in (["[INST]", "###"], ["null", "1"], ["\x7f", "😀"], []):
        for written in (json.dumps(texts), json.dumps(texts, ensure_ascii=False)):
            assert stop("--stop", written) == texts
    assert stop("--stop", "###") == "###" and stop("--stop", "null") is None
    assert stop(config(tmp_path, "stop: [INST, '###']")) == ["INST", "###"]
    monkeypatch.setenv("LITFREEZE_STOP", "[INST]")
    assert stop() == ["[INST]"] and stop("--stop", "x") == "x"
    assert "Union[str, list[str], null]" in " ".join(parse([command, "--help"], COMMANDS)[1]["text"].split())


# ---- words without an option ----


def two(first: str, second: Path, third: int = 0):
    """Do nothing with two required arguments and one more."""


def pair(*words):
    return parse(["two", *words], {"two": f"{__name__}:two"})[1]


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
numerals = r"[-+]?[0-9]{1,3}\.?[0-9]?([eE][-+]?[0-9]+)?|[-+.0-9eE_:]+|null|true|yes|"
texts = st.text() | st.from_regex(numerals, fullmatch=True)


@given(
    st.dictionaries(
        texts, st.recursive(leaves | texts, lambda of: st.lists(of) | st.dictionaries(texts, of), max_leaves=5)
    )
)
@example({"run": "31e4921", "out_dir": "1e5", "a": [1e-5, 1e16, "1.0e-05", "010", "", "null", "a\n\n b ", "-2:"]})
def test_what_is_written_as_yaml_is_read_as_it_was(options):
    text = write_yaml({"options": options})
    assert read_yaml(text, path="recipe.yaml")["options"] == options


@pytest.mark.parametrize("value", ["1.10", "true", "null", "1e5", ["2", 2], {"class_path": "any.Class"}, 1.5, False])
def test_variables_of_a_chat_template_stay_what_they_are(tmp_path, value):
    (tmp_path / "a.yaml").write_text(write_yaml({"data": {"prompt_args": {"a": value}}}), encoding="utf-8")
    for more in (["--data.prompt_args", json.dumps({"a": value})], ["--config", str(tmp_path / "a.yaml")]):
        assert parse(["finetune", "full", *more], COMMANDS)[1]["data"].prompt_args == {"a": value}


def test_bare_words_are_the_required_options_in_order():
    expected = {"first": "x", "second": Path("y"), "third": 3}
    for words in ("x y", "--first x y", "x --second y", "--second y x", "y --first=x", "--first x --second y"):
        for line in (f"{words} --third 3", f"--third=3 {words}"):
            assert pair(*line.split()) == expected
    arguments = parse(["convert", "from_hf", "hf", "out"], COMMANDS)[1]
    assert arguments == {"checkpoint_dir": Path("hf"), "out_dir": Path("out")}
    arguments = parse(["diff", "one", "other", "--expect_only", "-2:"], COMMANDS)[1]
    assert (arguments["a"], arguments["b"], arguments["expect_only"]) == (Path("one"), Path("other"), "-2:")


def test_bare_words_win_over_files_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LITFREEZE_FIRST", "of the environment")
    recipe = config(tmp_path, "second: of a file\n")
    assert pair("y", "z") == {"first": "y", "second": Path("z"), "third": 0}
    assert pair("y", recipe) == {"first": "y", "second": Path("of a file"), "third": 0}
    assert pair(recipe)["first"] == "of the environment"


@given(st.text(max_size=12).filter(lambda text: not text.startswith("-") and text.strip() != "null"))
@example("a=b")
@example("010")
@example("{a: 1}")
def test_any_bare_word_arrives_unchanged(text):
    assert pair(text, "y")["first"] == text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("x y z", "'z' belongs to no option. Options begin with --; a value with blanks needs quotes."),
        ("x y z", "quotes. Without an option stand only FIRST SECOND."),
        ("x y --first z", "'y' belongs to no option."),
        ("-third 3 x y", "'-third' belongs to no option."),
        ("x", "--second must be given."),
        ("", "--first and --second must be given."),
        ("x y --four 4", "unknown option 'four'."),
    ],
)
def test_a_bare_word_too_many_or_too_few(words, says):
    with pytest.raises(UsageError) as refusal:
        pair(*words.split())
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_word_behind_the_command_is_the_checkpoint():
    assert full("some/where", "--seed", "3") == full("--checkpoint_dir=some/where", "--seed=3")
    with pytest.raises(UsageError, match="'11' belongs to no option"):
        full("--trainable_layers", "10,", "11")
    with pytest.raises(UsageError, match="a and --checkpoint_dir both name a checkpoint"):
        full("a", "--checkpoint_dir", "b")
    with pytest.raises(UsageError, match="'b' belongs to no option"):
        full("a", "b")


def test_help_shows_the_bare_words(capsys):
    for command, usage in (
        ("diff", "diff A B [--option VALUE ...]"),
        ("convert from_hf", "convert from_hf CHECKPOINT_DIR OUT_DIR [--option VALUE ...]"),
        ("layers", "layers [CHECKPOINT_DIR] [--option VALUE ...]"),
    ):
        assert main([*command.split(), "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: litfreeze {usage}\n")


# ---- which place wins ----


def test_flags_over_files_over_environment_over_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "1e-3")
    monkeypatch.setenv("LITFREEZE_TRAINABLE_LAYERS", "-2:")
    assert full()["train"].lr == 1e-3
    assert full()["trainable_layers"] == "-2:"
    recipe = config(tmp_path, "train:\n  lr: 1e-4\n  epochs: 2\n")
    later = config(tmp_path, "train.epochs: 3\n", "later.yaml")
    for words in (recipe, "--train.lr", "1e-5"), ("--train.lr=1e-5", *recipe.split("=")):
        assert full(*words)["train"] == TrainArgs(lr=1e-5, epochs=2)
    assert full(recipe, later)["train"] == TrainArgs(lr=1e-4, epochs=3)
    monkeypatch.setenv("LITFREEZE_CONFIG", recipe.removeprefix("--config="))
    assert full()["train"] == TrainArgs(lr=1e-3, epochs=2)


@pytest.mark.parametrize("order", [1, -1])
def test_data_is_short_for_its_path(tmp_path, order):
    expected = DataArgs(path=Path("a.jsonl"), mask_prompt=False)
    for data in ("--data=a.jsonl", config(tmp_path, "data: a.jsonl\n")):
        assert full(*[data, "--data.mask_prompt=false"][::order])["data"] == expected


def test_text_like_a_number_is_text_in_what_print_config_writes(tmp_path):
    words = ["finetune", "full", "--log.run", "31e4921"]
    (tmp_path / "a.yaml").write_text(parse([*words, "--print_config"], COMMANDS)[1]["text"], encoding="utf-8")
    assert parse(["finetune", "full", "--config", str(tmp_path / "a.yaml")], COMMANDS)[1]["log"].run == "31e4921"


def test_print_config_is_read_back(tmp_path):
    words = ["--trainable_layers=1:30", "--trainable_modules=[q_proj, '010']", "--data", "a b.jsonl", "--train.lr=3e-5"]
    function, printed = parse(["finetune", "full", *words, "--print_config"], FULL)
    assert function is show
    assert full(config(tmp_path, printed["text"])) == full(*words)
    assert yaml.safe_load(printed["text"])["train"]["epochs"] is None


# ---- mistakes ----


def refused(capsys, *words):
    """What is told of a line that is wrong."""
    code = main(list(words))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") <= 2
    return err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--trainable_layer 10", "unknown option 'trainable_layer'. Did you mean 'trainable_layers'?"),
        ("--trainable-layers 10", "Did you mean 'trainable_layers'?"),
        ("--lr 1", "unknown option 'lr'. Did you mean 'train.lr'?"),
        ("--prec 32-true", "unknown option 'prec'."),  # no abbreviations
        ("--seed.x 1", "unknown option 'seed.x'."),
        ("--train 3", "train is a group of options, not one: set train.lr, "),
        ("--train.lr fast", "train.lr: 'fast' is not a number."),
        ("--train.lr .nan", "train.lr: '.nan' is not a number."),
        ("--train.lr -1e-4", "--train.lr -0.0001 must be a number above 0."),
        ("--seed 1.5", "seed: '1.5' is not a whole number."),
        ("--seed 1:30", "seed: '1:30' is not a whole number."),  # YAML 1.1 would say 90
        ("--seed null", "is not a whole number."),
        ("--data=", "data.path: '' is not a path."),
        ("--trainable_layers --untie_embeddings", "trainable_layers needs a value"),
        ("--precision bf16", "not one of 32-true, bf16-mixed, bf16-true, 16-mixed. Did you mean 'bf16-true'?"),
        ("--data.prompt_args 3", "data.prompt_args: '3' is not a mapping such as '{name: value}'."),
        ("--trainable_layers --seed 1", "--trainable_layers needs a value"),
        (
            "--trainable_layers 10, 11",
            "'11' belongs to no option. Options begin with --; a value with blanks needs quotes.\n",
        ),
        ("--config nothing.yaml", "File does not exist: "),
        ("--config .", "Path is not a file: "),
    ],
)
def test_mistakes_on_the_line(capsys, words, says):
    err = refused(capsys, "finetune", "full", *words.split())
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "seed: 1\ntrainable_layers: -2:\n",
            "line 2 is not YAML (mapping values are not allowed here): trainable_layers:",
        ),
        ("trainable_layers: -2:\n", "needs quotes: '-2:'"),
        ("trainable_layers: [0, -2:]\n", "In a file, quotes make a value text: '-2:'."),
        ("accelerator: 42\n", "accelerator: '42' is not text. In a file, quotes"),
        ("train:\n\tlr: 1\n", "Indent with blanks."),
        ("\nlayers: 1\n", "unknown option 'layers'. Did you mean 'trainable_layers' or "),
        ("train:\n  lrr: 1\n", "unknown option 'train.lrr'. Did you mean 'train.lr'?"),
        ("train: {lr: fast}\n", "train.lr: 'fast' is not a number."),
        ("train: {lr: -1}\n", "--train.lr -1.0 must be a number above 0."),
        ("data:\n  format: alpacca\n", "not one of auto, alpaca, chat, completion, text. Did you mean 'alpaca'?"),
        ("seed: null\n", "seed: null is not a whole number."),
        ("seed: [1]\n", "seed: '[1]' is not a whole number."),
        ("seed: 1:30\n", "seed: '1:30' is not a whole number."),
        ("train:\n", "train is a group of options, not one: set train.lr, "),
        ("train: 3\n", "train is a group of options"),
        ("data: null\n", "data is a group of options"),
        ("just words\n", "not lines of 'option: value'"),
        ("seed: 1\n---\nseed: 2\n", "is not YAML"),
        ("seed: \x01\n", "special characters are not allowed"),
    ],
)
def test_mistakes_in_a_file(capsys, tmp_path, text, says):
    err = refused(capsys, "finetune", "full", config(tmp_path, text))
    assert says in err
    assert str(tmp_path / "recipe.yaml") in err or "must be a number above" in err


def test_a_file_that_is_not_text(capsys, tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00")
    err = refused(capsys, "finetune", "full", "--config", str(tmp_path / "weights.yaml"))
    assert "weights.yaml: 'utf-8' codec can't decode" in err


def test_a_bad_variable(capsys, monkeypatch):
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "fast")
    assert refused(capsys, "finetune", "full") == "error: LITFREEZE_TRAIN__LR: 'fast' is not a number.\n"
    monkeypatch.setenv("LITFREEZE_CONFIG", "nothing.yaml")
    assert "File does not exist" in refused(capsys, "finetune", "full")
    monkeypatch.delenv("LITFREEZE_CONFIG")
    monkeypatch.setenv("LITFREEZE_TRAIN__LR", "1")
    monkeypatch.setenv("LITFREEZE_DATA", "a.jsonl")
    assert "data is a group of options" in refused(capsys, "finetune", "full")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetune", "ful"], "unknown command 'finetune ful'. Did you mean 'finetune full'?"),
        (["full"], "unknown command 'full'. Did you mean 'finetune full'?"),
        (["xyzzy"], "unknown command 'xyzzy'. Commands: finetune full, "),
        (["finetune", "--seed", "1"], "--seed stands before the command. Write 'litfreeze finetune full --seed ...'."),
        (["convert", "from_hf"], "--checkpoint_dir and --out_dir must be given"),
    ],
)
def test_mistaken_commands(capsys, words, says):
    assert says in refused(capsys, *words)


@dataclass
class Pair:
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


HIGH = Pair(high=5)


def test_groups_of_other_functions():
    commands = {"other": f"{__name__}:groups"}
    assert parse(["other", "--word", "010", "--pair.low", "3"], commands)[1] == {"word": "010", "pair": Pair(3, 5)}
    with pytest.raises(UsageError, match=r"^low 9 is above high 5$"):
        parse(["other", "--word", "x", "--pair.low", "9"], commands)


def groups(word: str, pair: Pair = HIGH):
    """Do nothing."""


# ---- exit codes, help, and whole processes ----


def fails(how: Literal["usage", "run", "bug", "interrupt"]):
    """Fail in the way that `how` says."""
    errors = {
        "usage": UsageError("no block 99."),
        "run": RunError("the disk is full."),
        "bug": IndexError("one\n  two"),
    }
    raise errors.get(how, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("usage", 2, "error: no block 99.\n"),
        ("run", 1, "error: the disk is full.\n"),
        ("bug", 1, "error: IndexError: one two (run again with --debug for the traceback)\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_errors_become_a_line_and_a_code(capsys, monkeypatch, how, code, says):
    monkeypatch.setitem(COMMANDS, "fails", f"{__name__}:fails")
    assert main(["fails", "--how", how]) == code
    assert capsys.readouterr() == ("", says)


def test_debug_anywhere_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setitem(COMMANDS, "fails", f"{__name__}:fails")
    for words in ("--debug fails --how bug", "fails --debug --how bug", "fails --how bug --debug"):
        assert main(words.split()) == 1
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert "\nerror: IndexError: one two" in err


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command}  " in out for command in COMMANDS)
    for words in ([], ["finetune"]):
        assert main(words) == 2
        assert "finetune full" in capsys.readouterr().err


def test_help_of_a_command_is_its_docstring(capsys):
    assert main(["finetune", "full", "--trainable_layers", "1", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "Fine-tune a model's own weights",
        "Blocks to train: 10,11",
        "--train.micro_batch_size MICRO_BATCH_SIZE Samples in one forward pass of one process. (type: int, default: 4)",
        "3 % of the steps",
        "LITFREEZE_TRAIN__LR=1e-4",
    ):
        assert text in out
    assert "CONFIG" not in out.replace("_CONFIG", "")


def process(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_version_and_exit_codes_of_the_process():
    done = process("-m", "litfreeze", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("litfreeze ")
    done = process("-m", "litfreeze", "finetune", "full", "--trainable_layer", "-2:")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown option 'trainable_layer'.")


def test_help_imports_nothing_heavy():
    code = """if True:
        import sys
        from litfreeze.__main__ import main
        assert main(["--help"]) == main(["finetune", "full", "--help"]) == 0
        assert main(["finetune", "full", "--trainable_layers", "-2:", "--print_config"]) == 0
        heavy = {"torch", "lightning_fabric", "numpy", "transformers", "tokenizers", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy"""
    done = process("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_quiet():
    words = [sys.executable, "-m", "litfreeze", "finetune", "full", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --data {0} --json {0}",
        "classify --checkpoint_dir nowhere --data {0} --out_csv {0}",
        "diff nowhere nowhere --json {0}",
        "diff nowhere nowhere --png {0}",
        "rank --out_json {0}",
        "rank --png {0}",
        "data show --data {0} --png {0}",
    ],
)
def test_a_file_that_is_there_is_not_replaced(words, tmp_path, capsys):
    file = tmp_path / "mine.png"
    file.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    assert main(words.format(file).split()) == 2
    assert f"{file} exists. Name another file" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == '{"prompt": "a", "completion": "b"}\n'
