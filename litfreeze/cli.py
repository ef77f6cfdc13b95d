"""From the words of a command line to a function and its arguments.

A command is a plain function: its signature gives the options, its docstring the help. jsonargparse reads the values,
each place stronger than the one before: the signature's defaults, the environment, YAML files (`--config`), the flags.
Ours is what it leaves open: the command's name in front, numbers that stay what was typed, errors of one line.
No heavy import: this file runs for `litfreeze --help`."""

import inspect
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import is_dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import jsonargparse
import jsonargparse.typing
import yaml
from jsonargparse import _loaders_dumpers

from litfreeze import __version__
from litfreeze.errors import UsageError, did_you_mean

SHORT = {"data": "data.path"}  # `--data FILE`, and `data: FILE` in a file
ENVIRONMENT = "LITFREEZE"
EPILOG = """A --config FILE holds options by these names; flags win over it wherever they stand. LITFREEZE_TRAIN__LR=1e-4
in the environment is --train.lr 1e-4; files and flags win over it. --debug shows the traceback of an error."""


class NoCommand(UsageError):
    """The line ends before a command is named. The text is the help that lists them, not an error message."""


def parse(words: Iterable[str], commands: Mapping[str, str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that `words` ask for, and its keyword arguments with every dataclass made.

    Help, the version and `--print_config` are answers too: then the function is `show` and its argument the text.

    Args:
        words: The command line after the program's name.
        commands: `{"finetune full": "litfreeze.finetune.full:setup"}`.

    Raises:
        UsageError: Whatever is wrong with the words, the files they name or the environment.
    """
    command, words = find_command(words, commands)
    if command not in commands:
        version = f"litfreeze {__version__}"
        return show, {"text": version if words[0] == "--version" else help_of_commands(command, commands)}
    function = load(commands[command])
    parser = Parser(command, function)
    words = one_word_each(words, parser.options)
    try:
        with redirect_stdout(StringIO()) as answer:
            arguments = parser.instantiate(parser.parse_args(words, env=True))
    except SystemExit:  # how jsonargparse ends after --help and --print_config
        return show, {"text": answer.getvalue()}
    except UsageError:
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(parser.told(error, words)) from error
    return function, {name: arguments[name] for name in inspect.signature(function).parameters}


def show(text: str) -> None:
    """Print `text`: what `parse` gives back where a person asked for a text."""
    print(text.rstrip("\n"))


# ---- the command ----


def find_command(words: Iterable[str], commands: Mapping[str, str]) -> tuple[str, list[str]]:
    """`"finetune full"` and the words after it. Where the words ask for help or the version before a command is
    complete, what there is of it (`"finetune"`, `""`) and the words from there on."""
    words = list(words)
    command, below = "", list(commands)
    while words and command not in commands:
        longer = f"{command} {words[0]}".strip()
        within = [name for name in below if f"{name} ".startswith(f"{longer} ")]
        if not within:
            break
        command, below = longer, within
        words.pop(0)
    if command in commands or words[:1] in (["-h"], ["--help"]) or (words[:1] == ["--version"] and not command):
        return command, words
    if not words:
        raise NoCommand(help_of_commands(command, commands))
    if words[0].startswith("-"):
        raise UsageError(f"{words[0]} stands before the command. Write 'litfreeze {below[0]} {words[0]} ...'.")
    same_end = [name for name in commands if name.endswith(f" {words[0]}")]
    near = did_you_mean(*((same_end[0], same_end) if same_end else (longer, commands)))
    raise UsageError(f"unknown command '{longer}'.{near} Commands: {', '.join(below)}.")


def help_of_commands(command: str, commands: Mapping[str, str]) -> str:
    """The help of `litfreeze` or, where `command` is "finetune", of that group."""
    names = [name for name in commands if f"{name} ".startswith(f"{command} ".lstrip())]
    rows = [f"  {name:<{max(map(len, names))}}  {description(load(commands[name]))[0]}" for name in names]
    head = ["usage: litfreeze COMMAND [--option VALUE ...]", "", "Fine-tune chosen layers of a language model.", ""]
    return "\n".join([*head, "commands:", *rows, "", "'litfreeze COMMAND --help' lists the options of a command."])


def load(spec: str) -> Callable[..., Any]:
    """The function behind `"package.module:function"`."""
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


def description(function: Callable[..., Any]) -> list[str]:
    """The paragraphs of the docstring up to its list of arguments."""
    text = re.split(r"\n\n(?:Args|Returns|Raises):\n", inspect.getdoc(function) or "")[0]
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]


# ---- its options ----


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Every option's name and type; a dataclass parameter is a group: `{"seed": int, "train.lr": Optional[float]}`."""
    options: dict[str, Any] = {}
    hints = get_type_hints(function)
    for name in inspect.signature(function).parameters:
        group = options_of(hints[name]) if is_dataclass(hints[name]) else {}
        options |= {f"{name}.{inner}": hint for inner, hint in group.items()} or {name: hints[name]}
    return options


def one_word_each(words: Iterable[str], options: Mapping[str, Any]) -> list[str]:
    """Every option and its value as one word, `--trainable_layers=-2:`, so that no value is taken for an option.
    `--config` comes first, so that flags win wherever it stands."""
    files: list[str] = []
    flags: list[str] = []
    words = list(words)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if flag in ("-h", "--help", "--print_config"):
            flags.append(flag + equals + value)
            continue
        if not flag.startswith("--"):
            raise UsageError(
                f"{flag!r} belongs to no option. Options begin with '--'; a value with blanks needs quotes."
            )
        name = SHORT.get(flag[2:], flag[2:])
        if name not in options and name != "config":
            raise UsageError(f"unknown option {flag}.{near_option(name, options)} '--help' lists the options.")
        if not equals:
            if not words or re.match("--[A-Za-z]", words[0]):
                raise UsageError(f"{flag} needs a value: {expected(options.get(name, Path))}.")
            value = words.pop(0)
        (files if name == "config" else flags).append(f"--{name}={value}")
    return files + flags


def near_option(name: str, options: Mapping[str, Any]) -> str:
    """The option that was probably meant: `lr` for `train.lr`, `trainable-layers` for `trainable_layers`."""
    name = name.replace("-", "_")
    same_end = [option for option in options if option.endswith((f".{name}", f"_{name}"))]
    return did_you_mean(same_end[0] if same_end else name, options)


def expected(hint: Any) -> str:
    """What an option takes, in words: `"a whole number"`, `"one of cut, drop"`; null goes without saying."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    words |= {list: "a list", dict: "a mapping such as '{name: value}'"}
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    kind = get_origin(hint) or hint
    return words.get(kind) or " or ".join(expected(choice) for choice in get_args(hint) if choice is not NoneType)


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser of one function, with messages of one line."""

    def __init__(self, command: str, function: Callable[..., Any]):
        usage = f"litfreeze {command} [--option VALUE ...]"
        text = " ".join(description(function))
        kwargs = {"env_prefix": ENVIRONMENT, "exit_on_error": False, "allow_abbrev": False, "parser_mode": "plain_text"}
        super().__init__(prog="litfreeze", usage=usage, description=text, epilog=EPILOG, **kwargs)
        self.options = options_of(function)
        self.add_argument("--config", action="config", metavar="FILE", help="Read options from a YAML file.")
        self.add_function_arguments(function, as_group=False)
        for action in self._actions:  # out of the help: `--train FILE` (ours is --config) and `--trainable_layers+`
            action.help = SUPPRESS if action.metavar == "CONFIG" else action.help
            action.option_strings = [word for word in action.option_strings if not word.endswith("+")]

    def parse_path(self, path: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """jsonargparse's way of reading a `--config`, with the file in its errors and every key checked."""
        try:
            values = super().parse_path(path, **kwargs)
            for name, value in values.items():
                if name not in self.options:
                    raise UsageError(f"unknown option '{name}'.{near_option(name, self.options)}")
                if value is None and NoneType not in get_args(self.options[name]):
                    raise UsageError(f"{name}: null is not {expected(self.options[name])}.")
        except (ArgumentError, ValueError) as error:
            raise UsageError(f"{path}: {self.told(error)}") from error
        return values

    def told(self, error: Exception, words: Iterable[str] = ()) -> str:
        """`"--train.lr: 'fast' is not a number."` for half a screen of jsonargparse's."""
        text = str(error)
        key, value = re.match(r'Parser key "([^"]+)"', text), re.search(r"(?:Got|Given) value: (.*)", text)
        if isinstance(error, UsageError) or key is None or value is None or key[1] not in self.options:
            return " ".join(text.split())
        hint = self.options[key[1]]
        return f"{key[1]}: {value[1]!r} is not {expected(hint)}."


# ---- what a text means ----


class PlainText(yaml.SafeLoader):
    """YAML whose scalars stay the text that stands there: the types say what is a number, and 1:30 is not 90."""

    yaml_implicit_resolvers: ClassVar = {}


PlainText.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(null|)$"), ["n", ""])


def read_yaml(text: str, path: str = "") -> Any:
    """What a value says, or, with its `path`, a whole file. jsonargparse's hook for both."""
    try:
        content = yaml.load(text, Loader=PlainText)
    except yaml.YAMLError as error:
        if not path:
            raise  # a value that is not YAML, such as `*a`, is text
        mark = getattr(error, "problem_mark", None)
        if mark is None:
            raise UsageError(f"not YAML: {' '.join(str(error).split())}.") from None
        line = "".join(text.splitlines()[mark.line : mark.line + 1]).strip()
        hint = (
            "Text that ends in a colon or begins with *, &, % or @ needs quotes: '-2:'. Indent with blanks, not tabs."
        )
        raise UsageError(f"line {mark.line + 1} is not YAML ({error.problem}): {line}\n{hint}") from None
    if not path:
        return content
    if not isinstance(content, dict):
        raise UsageError("not lines of 'option: value', as --print_config writes them.")
    return {SHORT.get(key, key) if isinstance(value, str) else key: value for key, value in content.items()}


def read_path(text: str) -> Path:
    """A path with `~` expanded; an empty text is none (Path would take it for the working directory)."""
    if not text:
        raise ValueError("an empty text is no path")
    return Path(text).expanduser()


jsonargparse.set_loader("plain_text", read_yaml, exceptions=(yaml.YAMLError,))
jsonargparse.typing.register_type(Path, deserializer=read_path, type_check=isinstance)
# A text that should be a number is read once more, by jsonargparse's own YAML 1.1 loader. It has no public setting.
_loaders_dumpers.yaml_default_loader = PlainText
