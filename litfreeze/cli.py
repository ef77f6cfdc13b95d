"""From the words of a command line to a function and its arguments.

A command is a plain function: its signature gives the options, its docstring the help. A value comes from one of four
places, each stronger than the one before: the signature's defaults, the environment, YAML files (`--config`), the
flags. From all of them it arrives here as the text a person wrote; jsonargparse then knows the types, prints the help
and writes configurations.

jsonargparse could read flags and files itself. It does not here: its YAML 1.1 silently turns `1:30` into 90 and `010`
into 10, a `--config` after a flag would override that flag, a value such as `-2:` would need an `=`, and its messages
fill half a screen. No heavy import: this file runs for `litfreeze --help`.
"""

import inspect
import math
import os
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from litfreeze.errors import UsageError, did_you_mean

ENVIRONMENT = "LITFREEZE_"
OPTION = re.compile(r"--[A-Za-z]")  # how an option begins; `-2:` and `-1` are values
PLAIN_NUMBER = re.compile(r"0|-?[1-9][0-9]*|-?[0-9]+\.[0-9]+|-?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+")


class NoCommand(UsageError):
    """The line ends before a command is named. The text is the help that lists them, not an error message."""


@dataclass(frozen=True)
class Given:
    """A value as it was written, a text, a list of texts or None for YAML's null; and the words that point at it."""

    value: Any
    where: str


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
        return show, {"text": version_line() if "--version" in words else help_of_commands(command, commands)}
    function = load(commands[command])
    options = options_of(function)
    flags, files, asked = read_flags(words, command, options)
    if "help" in asked:
        return show, {"text": help_of(command, function)}

    given: dict[str, Given] = {}
    if ENVIRONMENT + "CONFIG" in os.environ:
        given |= read_file(Path(os.environ[ENVIRONMENT + "CONFIG"]), command, options)
    given |= read_environment(os.environ, command, options, commands)
    for file in files:
        given |= read_file(file, command, options)
    given |= flags

    values = typed(function, given, command)
    if "print_config" in asked:
        return show, {"text": as_yaml(values)}
    return function, made(function, values)


def show(text: str) -> None:
    """Print `text`: what `parse` gives back where a person asked for a text."""
    print(text.rstrip("\n"))


def version_line() -> str:
    return f"litfreeze {version('litfreeze')}"


# ---- the command and its options ----


def find_command(words: Iterable[str], commands: Mapping[str, str]) -> tuple[str, list[str]]:
    """`"finetune full"` and the words after it. Where the words ask for help or the version before a command is
    complete, what there is of it (`"finetune"`, `""`) and the words from there on."""
    words = list(words)
    if words[:1] == ["--"]:  # `fabric run script -- finetune full` hands the dashes on
        words = words[1:]
    path: list[str] = []
    while words and " ".join(path) not in commands and any(_starts(name, [*path, words[0]]) for name in commands):
        path.append(words.pop(0))
    command = " ".join(path)
    below = [name for name in commands if _starts(name, path)]
    if command in commands or (words and (words[0] in ("-h", "--help") or (words[0] == "--version" and not path))):
        return command, words
    if not words:
        raise NoCommand(help_of_commands(command, commands))
    if words[0].startswith("-"):
        raise UsageError(
            f"name the command before {words[0]}: litfreeze {below[0]} {words[0]} ... (commands: {', '.join(below)})"
        )
    asked = " ".join([*path, words[0]])
    last_words = {name.split()[-1]: name for name in reversed(commands)}
    near = did_you_mean(asked, commands) or (
        f" Did you mean '{last_words[words[0]]}'?" if words[0] in last_words else ""
    )
    raise UsageError(f"unknown command '{asked}'.{near} Commands: {', '.join(below)}")


def _starts(name: str, path: Sequence[str]) -> bool:
    return name.split()[: len(path)] == list(path)


def load(spec: str) -> Callable[..., Any]:
    """The function behind `"package.module:function"`."""
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Every option's name and type; a dataclass parameter is a group: `{"seed": int, "train.lr": Optional[float]}`."""
    hints = get_type_hints(function)
    options: dict[str, Any] = {}
    for name in inspect.signature(function).parameters:
        if is_dataclass(hints[name]):
            options |= {f"{name}.{inner}": hint for inner, hint in options_of(hints[name]).items()}
        else:
            options[name] = hints[name]
    return options


# ---- the three places a value can be written in ----


def read_flags(
    words: Sequence[str], command: str, options: Mapping[str, Any]
) -> tuple[dict[str, Given], list[Path], set[str]]:
    """The options on the line, the files behind `--config`, and which of help and print_config are asked for."""
    given: dict[str, Given] = {}
    files: list[Path] = []
    asked: set[str] = set()
    known = {**options, "config": Path, "help": None, "print_config": None}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not OPTION.match(word):
            hint = " A value with blanks needs quotes around it." if given and not word.startswith("-") else ""
            raise UsageError(
                f"'{word}' belongs to no option.{hint} 'litfreeze {command} --help' lists the options, all --name VALUE"
            )
        written, equals, value = word[2:].partition("=")
        name = resolve(written, known, f"--{written}", f"unknown option --{written}.", command, value)
        where = f"--{written}"
        if name in ("help", "print_config"):
            if equals:
                raise UsageError(f"{where} takes no value")
            asked.add(name)
            continue
        if not equals:
            if rest and not OPTION.match(rest[0]):
                value = rest.pop(0)
            elif known[name] is bool:
                value = "true"
            else:
                raise UsageError(f"{where} needs a value: {expected(known[name])}.{_dashes(rest, where)}")
        if name == "config":
            files.append(Path(value))
        elif name in given:
            raise UsageError(f"{given[name].where} {given[name].value} and {where} {value} are one option given twice")
        else:
            given[name] = Given(value, where)
    return given, files, asked


def _dashes(rest: Sequence[str], where: str) -> str:
    return f" A value that begins with two dashes is written {where}={rest[0]}" if rest else ""


def read_environment(
    environment: Mapping[str, str], command: str, options: Mapping[str, Any], commands: Mapping[str, str]
) -> dict[str, Given]:
    """`LITFREEZE_TRAIN__LR=1e-4` is `--train.lr 1e-4`, for every command that has the option."""
    given: dict[str, Given] = {}
    for variable in sorted(environment):
        name = variable.removeprefix(ENVIRONMENT).lower().replace("__", ".")
        if not variable.startswith(ENVIRONMENT) or name == "config":
            continue
        if not _known(name, options) and any(_known(name, options_of(load(spec))) for spec in commands.values()):
            continue  # meant for another command
        name = resolve(name, options, variable, f"no command has the option that {variable} sets.", command, "")
        if name in given:
            raise UsageError(f"{given[name].where} and {variable} set one option twice: unset one of them")
        given[name] = Given(environment[variable], variable)
    return given


def _known(name: str, options: Mapping[str, Any]) -> bool:
    return name in options or f"{name}.path" in options


def read_file(path: Path, command: str, options: Mapping[str, Any]) -> dict[str, Given]:
    """The options in a YAML (or JSON) file, every value as the text that stands there."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not a text file that can be read ({type(error).__name__})") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line].strip() if mark.line < len(text.splitlines()) else "the end of the file"
        hint = " Text with a colon, such as '-2:', needs quotes." if ":" in line.partition(": ")[2] else ""
        raise UsageError(f"{path}, line {mark.line + 1}: not valid YAML ({error.problem}): {line}{hint and '.'}{hint}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}: expected lines of 'option: value', as 'litfreeze {command} --print_config' writes them")

    given: dict[str, Given] = {}
    for key, value, line in leaves(root, options, str(path)):
        where = f"{path}, line {line}: {key}"
        name = resolve(key, options, where, f"{path}, line {line}: unknown key '{key}'.", command, value)
        if name in given:
            raise UsageError(f"{where}: given before, at {given[name].where.partition(', ')[2].partition(':')[0]}")
        given[name] = Given(value, where)
    return given


def leaves(node: Any, options: Mapping[str, Any], file: str, prefix: str = "") -> Iterator[tuple[str, Any, int]]:
    """(`"train.lr"`, `"1e-4"`, line) for every entry of a YAML mapping; scalars stay the text they are."""
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.id != "scalar":
            raise UsageError(f"{file}, line {line}: an option's name must be plain text")
        key = prefix + key_node.value
        if value_node.id == "mapping" and any(name.startswith(key + ".") for name in options):
            yield from leaves(value_node, options, file, key + ".")
        else:
            yield key, plain(value_node, f"{file}, line {line}: {key}"), line


def plain(node: Any, where: str) -> Any:
    """A YAML node as text, None or a list of those, without YAML's guesses at numbers and dates."""
    if node.id == "scalar":
        is_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
        return None if is_null else node.value
    if node.id == "sequence":
        return [plain(item, where) for item in node.value]
    raise UsageError(f"{where}: a mapping where a value belongs. Text with a colon, such as '-2:', needs quotes")


def resolve(name: str, options: Mapping[str, Any], where: str, unknown: str, command: str, value: Any) -> str:
    """The full name of an option. A group that has a path may stand for it: `data` for `data.path`.

    Raises:
        UsageError: `name` is no option, or a whole group.
    """
    if name in options:
        return name
    group = [option for option in options if option.startswith(name + ".")]
    if f"{name}.path" in group and value is not None:
        return f"{name}.path"
    if group:
        raise UsageError(f"{where}: '{name}' is a group of options ({', '.join(group[:3])}, ...) and takes no value")
    word = name.replace("-", "_")
    same_leaf = [option for option in options if option == word or option.endswith("." + word)]
    near = f" Did you mean '{same_leaf[0]}'?" if same_leaf else did_you_mean(word, options)
    if where.startswith("--"):
        near = near.replace("'", "'--", 1)
    raise UsageError(f"{unknown}{near} 'litfreeze {command} --help' lists the options")


# ---- types ----


def typed(function: Callable[..., Any], given: Mapping[str, Given], command: str) -> dict[str, Any]:
    """Every option's value by its full name, checked and converted, the defaults filled in."""
    from jsonargparse import Namespace

    options = options_of(function)
    given = {name: _bracketed(options[name], entry) for name, entry in given.items()}
    required = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty and name in options and name not in given
    ]
    if required:
        raise UsageError(f"litfreeze {command} needs {' and '.join(f'--{name}' for name in required)}")
    for name, entry in given.items():
        if entry.value is None and NoneType not in _flat(options[name]):
            raise _wrong(entry, options[name])
    try:
        values = _parser(function).parse_object(Namespace({name: entry.value for name, entry in given.items()}))
    except ArgumentError as error:
        named = re.match(r'Parser key "([^"]+)"', str(error))
        if named is None or named[1] not in given:
            raise UsageError(_one_line(error)) from None
        raise _wrong(given[named[1]], options[named[1]]) from None
    return {
        name: settled(given[name], values[name], options[name], given[name].value) if name in given else values[name]
        for name in options
    }


def _bracketed(hint: Any, entry: Given) -> Given:
    """`[10, 11]` in a flag or a variable is the list it is in a file, where the option takes a list."""
    import yaml

    if list in _flat(hint) and isinstance(entry.value, str) and entry.value.startswith("["):
        try:
            node = yaml.compose(entry.value, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return entry
        return Given(plain(node, entry.where), entry.where)
    return entry


def settled(entry: Given, value: Any, hint: Any, written: Any) -> Any:
    """`value`, unless it is one of YAML 1.1's guesses (1:30 = 90, 010 = 10, nothing = null): then the text `written`
    where the option takes text, and a refusal where it does not."""
    if isinstance(written, list):
        return [settled(entry, inner, hint, text) for inner, text in zip(value, written, strict=True)]
    if written is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        honest = written in ("true", "false") or str not in _flat(hint)
    elif isinstance(value, (int, float)):
        honest = PLAIN_NUMBER.fullmatch(written) is not None or (str not in _flat(hint) and _reads_as(written, value))
        honest = honest and math.isfinite(value)
    elif isinstance(value, Path):
        honest, value = written != "", value.expanduser()
    else:
        honest = value is None and written == "null"
    if honest:
        return value
    if str in _flat(hint):
        return written
    raise _wrong(entry, hint)


def _reads_as(text: str, value: float) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False


def made(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `function`: each group of `values` becomes its dataclass."""
    arguments: dict[str, Any] = {}
    for name, hint in get_type_hints(function).items():
        if is_dataclass(hint):
            group = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(name + ".")}
            try:
                arguments[name] = hint(**group)
            except (TypeError, ValueError) as error:  # a UsageError is a ValueError
                raise UsageError(f"--{name}: {error}") from error
        elif name in values:
            arguments[name] = values[name]
    return arguments


def as_yaml(values: Mapping[str, Any]) -> str:
    """`values` as a file that `--config` reads back."""
    import yaml

    nested: dict[str, Any] = {}
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[key] = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)


def expected(hint: Any) -> str:
    """What an option takes, in words: `"a whole number or null"`."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    words |= {NoneType: "null"}
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is Union:
        return " or ".join(expected(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return f"a list ({expected(get_args(hint)[0])} each)"
    return words.get(hint, str(hint))


def _wrong(entry: Given, hint: Any) -> UsageError:
    value = "null" if entry.value is None else repr(entry.value)
    value = value if len(value) <= 80 else value[:77] + "..."
    choices = [str(choice) for choice in _flat(hint) if isinstance(choice, str)]
    return UsageError(f"{entry.where}: {value} is not {expected(hint)}.{did_you_mean(entry.value, choices)}".rstrip("."))


def _flat(hint: Any) -> set[Any]:
    """Everything a type is built from: `Optional[list[str]]` -> {list, str, NoneType}; a Literal gives its values."""
    return {get_origin(hint) or hint}.union(*[_flat(inner) for inner in get_args(hint)])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- help ----


def help_of_commands(command: str, commands: Mapping[str, str]) -> str:
    """The help of `litfreeze` or, with `command` "finetune", of that group."""
    names = [name for name in commands if _starts(name, command.split())]
    width = max(map(len, names))
    rows = [f"  {name:<{width}}  {_summary(load(commands[name]))}" for name in names]
    title = [] if command else ["Fine-tune chosen layers of a language model.", ""]
    return "\n".join(
        [
            f"usage: litfreeze {command or '<command>'}{' <command>' if command else ''} [--option VALUE ...]".replace(
                "<command> <command>", "<command>"
            ),
            "",
            *title,
            "commands:",
            *rows,
        ]
    )
