"""From the words of a command line to a function and its arguments.

A command is a plain function: its signature gives the options, its docstring the help. A value comes from one of four
places, each stronger than the one before: the signature's defaults, the environment, YAML files (`--config`), the
flags. From all of them it arrives here as the text a person wrote; jsonargparse then knows the types, prints the help
and writes configurations.

jsonargparse could read flags and files itself. It does not here: its YAML 1.1 silently turns `1:30` into 90 and `010`
into 10, a `--config` after a flag would override that flag, a value such as `-2:` would need an `=`, and its messages
fill half a screen. No heavy import: this file runs for `litfreeze --help`.
"""

import difflib
import inspect
import math
import os
import re
import shutil
import textwrap
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from litfreeze import __version__
from litfreeze.errors import UsageError, did_you_mean

ENVIRONMENT = "LITFREEZE_"
OPTION = re.compile(r"--[A-Za-z]")  # how an option begins; `-2:` and `-1` are values
PLAIN_NUMBER = re.compile(r"0|-?[1-9][0-9]*|-?[0-9]+\.[0-9]+|-?[0-9]+(\.[0-9]+)?[eE][-+]?[0-9]+")


class NoCommand(UsageError):
    """The line ends before a command is named. The text is the help that lists them, not an error message."""


@dataclass(frozen=True)
class Given:
    """A value as written (a text, a list of texts, a mapping, or None for YAML's null) and how to point at it."""

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
        version = f"litfreeze {__version__}"
        return show, {"text": version if words[0] == "--version" else help_of_commands(command, commands)}
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


# ---- the command and its options ----


def find_command(words: Iterable[str], commands: Mapping[str, str]) -> tuple[str, list[str]]:
    """`"finetune full"` and the words after it. Where the words ask for help or the version before a command is
    complete, what there is of it (`"finetune"`, `""`) and the words from there on."""
    words = list(words)
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
        raise UsageError(f"{words[0]} stands before the command. Write 'litfreeze {below[0]} {words[0]} ...'.")
    asked = " ".join([*path, words[0]])
    same_end = [name for name in commands if name.endswith(f" {words[0]}")]
    beginnings = {" ".join(name.split()[:depth]) for name in commands for depth in range(1, len(name.split()) + 1)}
    near = _nearest(same_end) or did_you_mean(asked, sorted(beginnings))
    raise UsageError(f"unknown command '{asked}'.{near} Commands: {', '.join(below)}.")


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
        flag, equals, value = ("--help", "", "") if word == "-h" else word.partition("=")
        if not OPTION.match(word) and word != "-h":
            dashed = word[:1] in ("-", "\u2013", "\u2014")  # the long ones come with text pasted from a web page
            hint = "Options begin with two dashes" if dashed else "A value with blanks needs quotes"
            raise UsageError(f"{word!r} belongs to no option. {hint}. {_see(command)}")
        name = resolve(flag[2:], known, value, flag, "--{}".format, command)
        if name in ("help", "print_config"):
            if equals:
                raise UsageError(f"{flag} takes no value.")
            asked.add(name)
            continue
        if not equals:
            if rest and not OPTION.match(rest[0]):
                value = rest.pop(0)
            elif known[name] is bool:
                value = "true"
            else:
                stray = rest and not _known(rest[0][2:].partition("=")[0], known)
                hint = f" One that begins with two dashes is written {flag}={rest[0]}" if stray else ""
                raise UsageError(f"{flag} needs a value: {expected(known[name])}.{hint}")
        if name == "config":
            files.append(Path(value))
        elif name in given:
            raise UsageError(f"{given[name].where} {given[name].value!r} and {flag} {value!r}: one option given twice.")
        else:
            given[name] = Given(value, flag)
    return given, files, asked


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
        where = f"{variable} (environment)"
        name = resolve(name, options, environment[variable], where, _variable, command)
        if name in given:
            raise UsageError(f"{given[name].where} and {where}: one option given twice.")
        given[name] = Given(environment[variable], where)
    return given


def _variable(name: str) -> str:
    return ENVIRONMENT + name.upper().replace(".", "__")


def read_file(path: Path, command: str, options: Mapping[str, Any]) -> dict[str, Given]:
    """The options in a YAML (or JSON) file, every value as the text that stands there."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not a text file that can be read ({type(error).__name__}).") from None
    except yaml.MarkedYAMLError as error:
        number = error.problem_mark.line
        line = "".join(text.splitlines()[number : number + 1])
        hint = "Text that ends in a colon or begins with *, &, % or @ needs quotes: '-2:'."
        hint = "Indent with blanks, not tabs." if line[:1] == "\t" else hint
        raise UsageError(f"{path}, line {number + 1}: not YAML ({error.problem}): {line.strip()}\n{hint}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {_one_line(error)}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}: not lines of 'option: value', as 'litfreeze {command} --print_config' writes them.")

    given: dict[str, Given] = {}
    for key, value, where in leaves(root, options, path):
        name = resolve(key, options, value, where, str, command)
        if name in given:
            raise UsageError(f"{given[name].where} and {where}: one option given twice.")
        given[name] = Given(value, where)
    return given


def leaves(node: Any, options: Mapping[str, Any], file: Path, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(`"train.lr"`, `"1e-4"`, where it stands) for every entry of a YAML mapping; scalars stay the text they are."""
    for key_node, value_node in node.value:
        place = f"({file}, line {key_node.start_mark.line + 1})"
        if key_node.id != "scalar":
            raise UsageError(f"the name of an option must be plain text {place}.")
        key = prefix + key_node.value
        if value_node.id == "mapping" and any(name.startswith(key + ".") for name in options):
            yield from leaves(value_node, options, file, key + ".")
        else:
            yield key, plain(value_node, options.get(key), f"{key} {place}"), f"{key} {place}"


def plain(node: Any, hint: Any, where: str) -> Any:
    """A YAML node as text, None or a list of those, without YAML's guesses at numbers and dates. Only an option whose
    type has a dict in it takes a mapping, and that as YAML reads it, for nothing else says what its values are."""
    if node.id == "scalar":
        is_null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")
        return None if is_null else node.value
    if node.id == "sequence":
        return [plain(item, hint, where) for item in node.value]
    if dict not in _flat(hint):
        raise UsageError(f"{where}: a mapping where a value belongs. Text with a colon, such as '-2:', needs quotes.")
    import yaml

    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise UsageError(f"{where}: {error.problem}.") from None


def resolve(
    name: str, options: Mapping[str, Any], value: Any, where: str, spell: Callable[[str], str], command: str
) -> str:
    """The full name of the option `name`. A group that has a path may stand for it: `data` for `data.path`.

    Args:
        value: What it is set to. A group without a value (`data:` in a file) stands for nothing.
        where: How the error points at it.
        spell: How the place it was found in writes an option: `--train.lr`, `train.lr` or `LITFREEZE_TRAIN__LR`.

    Raises:
        UsageError: It is no option; the nearest one is named. Or it is a whole group.
    """
    if name in options:
        return name
    if value is not None and _known(name, options):
        return f"{name}.path"
    group = [spell(option) for option in options if option.startswith(name + ".")]
    if group:
        raise UsageError(f"{where} is a group, not an option. Set {', '.join(group[:3])} ... or leave it out.")
    word = name.replace("-", "_")
    same_end = [option for option in options if re.search(rf"(^|[._]){re.escape(word)}$", option)]
    near = _nearest([spell(option) for option in same_end or difflib.get_close_matches(word, options)])
    raise UsageError(f"unknown option {where}.{near} {_see(command)}")


def _known(name: str, options: Mapping[str, Any]) -> bool:
    return name in options or f"{name}.path" in options


def _nearest(names: Sequence[str]) -> str:
    return f" Did you mean '{names[0]}'?" if names else ""


def _see(command: str) -> str:
    return f"'litfreeze {command} --help' lists the options."


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
        raise UsageError(f"litfreeze {command} needs {' and '.join(f'--{name}' for name in required)}. {_see(command)}")
    for name, entry in given.items():
        if entry.value is None and NoneType not in _flat(options[name]):
            raise _wrong(entry, options[name])
    try:
        # a deep copy, since jsonargparse converts lists in place
        texts = {name: deepcopy(entry.value) for name, entry in given.items()}
        values = _parser(function).parse_object(Namespace(texts))
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
    """`[10, 11]` or `{a: 1}` in a flag or a variable is what it is in a file, where the option takes such a thing."""
    import yaml

    if isinstance(entry.value, str) and {"[": list, "{": dict}.get(entry.value[:1]) in _flat(hint):
        with suppress(yaml.YAMLError, UsageError):
            inside = plain(yaml.compose(entry.value, Loader=yaml.SafeLoader), hint, entry.where)
            if isinstance(inside, dict) or all(isinstance(item, str) for item in inside):
                return Given(inside, entry.where)
    return entry


def settled(entry: Given, value: Any, hint: Any, written: Any) -> Any:
    """`value`, unless it is one of YAML 1.1's guesses (1:30 = 90, 010 = 10, nothing = null): then the text `written`
    where the option takes text, and a refusal where it does not."""
    if isinstance(written, list):
        return [settled(entry, inner, hint, text) for inner, text in zip(value, written, strict=True)]
    if isinstance(written, dict):
        return written
    if written is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        honest = written in ("true", "false") or str not in _flat(hint)
    elif isinstance(value, (int, float)):
        honest = PLAIN_NUMBER.fullmatch(written) is not None or (str not in _flat(hint) and _reads_as(written, value))
        honest = honest and value not in (math.inf, -math.inf)
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
    hints = get_type_hints(function)
    for name in inspect.signature(function).parameters:
        if is_dataclass(hints[name]):
            group = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(name + ".")}
            try:
                arguments[name] = hints[name](**group)
            except UsageError:
                raise
            except (TypeError, ValueError) as error:
                raise UsageError(f"--{name}: {_one_line(error)}") from error
        else:
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
    """What an option takes, in words: `"a whole number"`, `"one of cut, drop"`; null goes without saying."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    words |= {list: "a list", dict: "a mapping such as '{name: value}'"}
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(expected(choice) for choice in get_args(hint) if choice is not NoneType)
    return words.get(get_origin(hint) or hint, str(hint))


def _wrong(entry: Given, hint: Any) -> UsageError:
    value = "null" if entry.value is None else repr(entry.value)
    value = value if len(value) <= 80 else f"{value[:77]}..."
    choices = [choice for choice in _flat(hint) if isinstance(choice, str)]
    return UsageError(f"{entry.where}: {value} is not {expected(hint)}.{did_you_mean(entry.value, choices)}")


def _flat(hint: Any) -> set[Any]:
    """Everything a type is built from: `Optional[list[str]]` -> {list, str, NoneType}; a Literal gives its values."""
    return {get_origin(hint) or hint}.union(*[_flat(inner) for inner in get_args(hint)])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- help ----

COMMON_OPTIONS = """every command:
  --config FILE         Read options from a YAML file; its keys are the names
                        above without the dashes. Flags win over it wherever
                        they stand; of several files, the later one wins.
  --print_config        Print all options as such a file, do nothing else.
  --debug               Show the traceback of an error.
  -h, --help            Show this, do nothing else."""


def help_of_commands(command: str, commands: Mapping[str, str]) -> str:
    """The help of `litfreeze` or, where `command` is "finetune", of that group."""
    names = [name for name in commands if _starts(name, command.split())]
    width = max(map(len, names))
    rows = [f"  {name:<{width}}  {_paragraphs(load(commands[name]))[0]}" for name in names]
    title = [] if command else ["", "Fine-tune chosen layers of a language model."]
    end = ["", "'litfreeze COMMAND --help' lists the options of a command."]
    return "\n".join(["usage: litfreeze COMMAND [--option VALUE ...]", *title, "", "commands:", *rows, *end])


def help_of(command: str, function: Callable[..., Any]) -> str:
    """The help of one command: its docstring, its options by group, and where else they can be written."""
    options = options_of(function)
    example = next((name for name in options if "." in name), next(iter(options)))
    environment = f"""environment:
  {_variable(example)}=VALUE is --{example} VALUE.
  {ENVIRONMENT}CONFIG=FILE is --config FILE. Flags and --config win over both."""
    usage = f"usage: litfreeze {command} [--option VALUE ...]"
    described = _parser(function).format_help().strip()
    width = shutil.get_terminal_size().columns - 2
    text = [textwrap.fill(paragraph, width) for paragraph in _paragraphs(function)]
    return "\n\n".join([usage, *text, described, COMMON_OPTIONS, environment])


def _paragraphs(function: Callable[..., Any]) -> list[str]:
    """The docstring up to its list of arguments."""
    text = re.split(r"\n\n(?:Args|Returns|Raises):\n", inspect.getdoc(function) or "")[0]
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]


def _parser(function: Callable[..., Any]) -> Any:
    """jsonargparse's parser of `function`; its help keeps to what a person types."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Any) -> str:
            default = str(action.default).lower() if isinstance(action.default, bool) else action.default
            note = " (required)" if action.required else "" if default in (None, SUPPRESS) else f" (default: {default})"
            return (action.help or "") + note

    options = options_of(function)
    parser = ArgumentParser(usage=SUPPRESS, formatter_class=Formatter, exit_on_error=False, add_help=False)
    parser.add_function_arguments(function, as_group=False)
    for action in parser._actions:
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
        if action.dest in options:
            action.metavar = _metavar(options[action.dest])
        elif _known(action.dest, options):
            action.metavar, action.help = "PATH", f"Short for --{action.dest}.path PATH."
        else:
            action.help = SUPPRESS  # jsonargparse's `--train FILE`; ours is --config
    return parser


def _metavar(hint: Any) -> str:
    """`INT`, `PATH`, `{cut,drop}`: the type in a word, for the left column of the help."""
    words = {int: "INT", float: "NUMBER", bool: "{true,false}", str: "TEXT", Path: "PATH", dict: "{NAME: VALUE}"}
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, get_args(hint)))}}}"
    if get_origin(hint) in (Union, UnionType):
        return _metavar(str if str in get_args(hint) else get_args(hint)[0])
    return words.get(get_origin(hint) or hint, "VALUE")
