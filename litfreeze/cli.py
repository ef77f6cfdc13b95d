"""From the words of a command line to a function and its arguments.

A command is a plain function: its signature gives the options, its docstring the help. jsonargparse reads the values,
each place stronger than the one before: the signature's defaults, the environment, YAML files (`--config`), the flags.
Ours is what it leaves open: the command's name in front, numbers that stay what was written, errors of one line.
No heavy import: this file runs for `litfreeze --help`."""

import inspect
import json
import os
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import is_dataclass
from functools import wraps
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import jsonargparse
import jsonargparse.typing
import yaml
from jsonargparse import _loaders_dumpers

from litfreeze.errors import UsageError, did_you_mean
from litfreeze.texts import FREE, read_texts
from litfreeze.version import __version__

SHORT = {"data": "data.path"}  # `--data FILE`, and `data: FILE` in a file
EPILOG = """Options can also stand in a --config FILE, or in the environment: LITFREEZE_TRAIN__LR=1e-4 is
--train.lr 1e-4. A flag wins over a file, a file over the environment. --debug shows the traceback of an error."""


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
    refuse_unknown_variables(parser.options, commands)
    try:
        with redirect_stdout(StringIO()) as answer:
            flags = one_word_each(words, parser.options, parser.required)
            values = parser.instantiate(parser.parse_args(flags, env=True))
            return function, parser.gathered(values)
    except SystemExit:  # how argparse ends after --help and --print_config
        return show, {"text": answer.getvalue()}
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(parser.told(error)) from error


def arguments(command: str, function: Callable[..., Any], recipe: str) -> dict[str, Any]:
    """The keyword arguments of `function` that the YAML text `recipe` asks for, as from a `--config` file alone.

    Raises UsageError for whatever is wrong with it."""
    parser = Parser(command, function)
    try:
        values = parser.instantiate(parser.parse_object(read_yaml(recipe, path="recipe.yaml"), env=False))
        return parser.gathered(values)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(parser.told(error)) from error


def show(text: str) -> None:
    """Print `text`: what `parse` gives back where a person asked for a text."""
    print(text.rstrip("\n"))


# ---- the command ----


def find_command(words: Iterable[str], commands: Mapping[str, str]) -> tuple[str, list[str]]:
    """`"finetune full"` and the words after it. Where the words ask for help or the version before a command is
    complete, what there is of it (`"finetune"`, `""`) and the words from there on."""
    words = list(words)
    depth = max(depth for depth in range(len(words) + 1) if names_below(words[:depth], commands))
    command, rest = " ".join(words[:depth]), words[depth:]
    if command in commands or rest[:1] in (["-h"], ["--help"]) or (rest[:1] == ["--version"] and not command):
        return command, rest
    if not rest:
        raise NoCommand(help_of_commands(command, commands))
    below, asked = names_below(words[:depth], commands), f"{command} {rest[0]}".strip()
    if rest[0].startswith("-"):
        raise UsageError(f"{rest[0]} stands before the command. Write 'litfreeze {below[0]} {rest[0]} ...'.")
    same_end = [name for name in commands if name.endswith(f" {rest[0]}")]
    near = did_you_mean((same_end or [asked])[0], commands)
    raise UsageError(f"unknown command '{asked}'.{near} Commands: {', '.join(below)}.")


def names_below(path: list[str], commands: Iterable[str]) -> list[str]:
    """`["convert from_hf", "convert to_hf"]` for `["convert"]`; all for `[]`."""
    return [name for name in commands if name.split()[: len(path)] == path]


def help_of_commands(command: str, commands: Mapping[str, str]) -> str:
    """The help of `litfreeze` or, where `command` is "finetune", of that group."""
    names = names_below(command.split(), commands)
    rows = [f"  {name:<{max(map(len, names))}}  {description(load(commands[name]))[0]}" for name in names]
    head = "usage: litfreeze COMMAND [--option VALUE ...]\n\nFine-tune chosen layers of a language model.\n\ncommands:"
    return "\n".join([head, *rows, "\n'litfreeze COMMAND --help' lists the options of a command."])


def load(spec: str) -> Callable[..., Any]:
    """The function behind `"package.module:function"`."""
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


def description(function: Callable[..., Any]) -> list[str]:
    """The paragraphs of the docstring up to its list of arguments."""
    text = re.split(r"\n\n(?:Args|Returns|Raises):\n", inspect.getdoc(function) or "")[0]
    return [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]


# ---- its options ----


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser of one function. `options` are its names and types: `{"seed": int, "train.lr": ...}`;
    `required` are those that have no default, and can be given as bare words."""

    def __init__(self, command: str, function: Callable[..., Any]):
        parameters = inspect.signature(function).parameters
        self.names = list(parameters)
        self.flat = {name: hint for name, hint in get_type_hints(function).items() if getattr(hint, "flat", False)}
        self.required = [name for name, p in parameters.items() if p.default is p.empty]
        bare = self.required or [f"[{name}]" for name in parameters if name == "checkpoint_dir"]
        super().__init__(
            usage=" ".join(["litfreeze", command, *map(str.upper, bare), "[--option VALUE ...]"]),
            description=" ".join(description(function)),
            epilog=EPILOG,
            env_prefix="LITFREEZE",
            parser_mode=MODE,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.options = options_of(function)
        self.add_argument("--config", action="config", metavar="FILE", help="Read options from this YAML file.")
        self.add_function_arguments(function, as_group=False, skip=set(self.flat))
        for group in self.flat.values():
            self.add_class_arguments(group, as_group=False)
        hints = {}
        for each in (function, *self.flat.values()):
            hints |= get_type_hints(each, include_extras=True)
        for action in self._actions:  # kept out of the help: `--train CONFIG` and `--trainable_layers+`
            action.help = SUPPRESS if action.metavar == "CONFIG" else action.help
            action.option_strings = [word for word in action.option_strings if not word.endswith("+")]
            if FREE in getattr(hints.get(action.dest), "__metadata__", ()):  # before YAML reads it
                action._check_type, action._typehint = with_texts(action._check_type), self.options[action.dest]

    def gathered(self, values: jsonargparse.Namespace) -> dict[str, Any]:
        """The function's arguments of what was parsed and instantiated, flat groups made."""
        made = {name: group(**{f: values[f] for f in options_of(group)}) for name, group in self.flat.items()}
        found = {name: made[name] if name in made else values[name] for name in self.names}
        if beyond := [name for name, value in found.items() if isinstance(value, int) and abs(value) >= 2**63]:
            raise UsageError(f"--{beyond[0]} {found[beyond[0]]} is beyond any number that it may be.")
        return found

    def parse_path(self, path: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """jsonargparse's reading of a `--config`, with every name in it checked, and the file named in its errors."""
        try:
            values = super().parse_path(path, **kwargs)
            for name, value in values.items():
                if name not in self.options:
                    raise unknown_option(name, self.options)
                if value is None and NoneType not in get_args(self.options[name]):
                    raise UsageError(f"{name}: null is not {expected(self.options[name])}.")
        except (ArgumentError, ValueError) as error:
            raise UsageError(f"{path}: {self.told(error)}") from error
        return values

    def told(self, error: Exception) -> str:
        """`"train.lr: 'fast' is not a number."` where jsonargparse fills half a screen."""
        if isinstance(error, UsageError):
            return str(error)
        name, _, text = str(error).removeprefix('Parser key "').partition('":')
        if "Unable to load config" in text:  # of a group: a value where a mapping belongs
            return str(unknown_option(name, self.options))
        if missing := re.search(r"arguments are required: (.*)", str(error)):
            return f"--{missing[1].replace(', ', ' and --')} must be given."
        given = re.search(r"(?:Got|Given) value: (.*)", text)
        if given is None or name not in self.options:
            return " ".join(str(error).replace("Parser key ", "").split())
        value, hint = given[1], self.options[name]
        variable = f"LITFREEZE_{name.upper().replace('.', '__')}"
        where = variable if os.environ.get(variable) == value else name
        near = did_you_mean(value, expected(hint).removeprefix("one of ").split(", "))
        quotes = (
            " In a file, quotes make a value text: '-2:'." if value and {str, Path} & {hint, *get_args(hint)} else ""
        )
        return f"{where}: {value[:80]!r} is not {expected(hint)}.{near}{quotes}"


def refuse_unknown_variables(options: Iterable[str], commands: Mapping[str, str]) -> None:
    """A `LITFREEZE_…` in the environment that no command knows is a mistake; one of another command is not ours."""
    given = {name for name in os.environ if name.startswith("LITFREEZE_") and name != "LITFREEZE_CONFIG"}
    named = {name: name.removeprefix("LITFREEZE_").lower().replace("__", ".") for name in given}
    if all(option in options for option in named.values()):
        return
    known = {option for spec in commands.values() for option in options_of(load(spec))}
    for name, option in named.items():
        if option not in known and not any(one.startswith(f"{option}.") for one in known):
            near = did_you_mean(name, [f"LITFREEZE_{o.upper().replace('.', '__')}" for o in known])
            raise UsageError(f"{name} in the environment names no option.{near}")


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Every option's name and type; a dataclass parameter is a group: `{"seed": int, "train.lr": Optional[float]}`, or
    its fields stand among the others, if it has `flat`."""
    options: dict[str, Any] = {}
    hints = get_type_hints(function)
    for name in inspect.signature(function).parameters:
        group = options_of(hints[name]) if is_dataclass(hints[name]) else {}
        before = "" if getattr(hints[name], "flat", False) else f"{name}."
        options |= {f"{before}{inner}": hint for inner, hint in group.items()} or {name: hints[name]}
    return options


def one_word_each(words: Iterable[str], options: Mapping[str, Any], required: Iterable[str] = ()) -> list[str]:
    """Every option joined with its value, `--trainable_layers=-2:`, so that no value is taken for an option; a switch
    that stands alone is `=true`; an option that takes a list takes all words up to the next one; and `--config` first,
    so that flags win wherever it stands. Bare words are the values of those `required` options that have no flag, in
    order: `A B` is `--a=A --b=B`. Where none is required, a bare word right behind the command is the checkpoint, as
    LitGPT takes it."""
    words, files, flags, bare = list(words), [], [], []
    if not required and "checkpoint_dir" in options and words and not words[0].startswith("-"):
        if "--checkpoint_dir" in (word.partition("=")[0] for word in words):
            raise UsageError(f"{words[0]} and --checkpoint_dir both name a checkpoint; keep one of them.")
        words[0] = f"--checkpoint_dir={words[0]}"
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = SHORT.get(flag[2:], flag[2:])
        if flag in ("-h", "--help", "--print_config"):
            flags.append(word)
            continue
        if not word.startswith("--"):
            bare.append(word)
            continue
        if name not in options and name != "config":
            raise unknown_option(name, options)
        hint = options.get(name, Path)
        if not equals:
            alone = not words or re.match("--[A-Za-z]", words[0])
            if alone and bool not in (hint, *get_args(hint)):
                raise UsageError(f"{flag} needs a value: {expected(hint)}.")
            value = "true" if alone else words.pop(0)
        if get_origin(hint) is list and not value.startswith("["):
            values = [value]
            while not equals and words and not re.match("--[A-Za-z]", words[0]):
                values.append(words.pop(0))
            value = json.dumps(values)
        (files if name == "config" else flags).append(f"--{name}={value}")
    open_ = [name for name in required if not any(flag.startswith(f"--{name}=") for flag in flags)]
    if strays := [word for word in bare if word.startswith("-")] + bare[len(open_) :]:
        without = f" Without an option stand only {' '.join(required).upper()}." if required else ""
        said = "Options begin with --; a value with blanks needs quotes."
        raise UsageError(f"{strays[0]!r} belongs to no option. {said}{without}")
    return files + flags + [f"--{name}={word}" for name, word in zip(open_, bare, strict=False)]


def unknown_option(name: str, options: Iterable[str]) -> UsageError:
    """The error, with what was probably meant: `train.lr` for `lr`, `trainable_layers` for `trainable-layers`."""
    inside = [option for option in options if option.startswith(f"{name}.")]
    if inside:
        return UsageError(f"{name} is a group of options, not one: set {', '.join(inside[:3])}, ...")
    word = name.replace("-", "_")
    same = [option for option in options if f".{option}".endswith(f".{word}")]
    same_end = same or [option for option in options if option.endswith(f"_{word}")]
    near = f" Did you mean {' or '.join(map(repr, same_end[:3]))}?" if same_end else did_you_mean(word, options)
    return UsageError(f"unknown option '{name}'.{near} --help lists the options.")


def expected(hint: Any) -> str:
    """What an option takes, in words: `"a whole number"`, `"one of cut, drop"`; null goes without saying."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    words |= {list: "a list", dict: "a mapping such as '{name: value}'"}
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    choices = [expected(choice) for choice in get_args(hint) if choice is not NoneType]
    return words.get(get_origin(hint) or hint) or " or ".join(choices)


# ---- what a text means ----


class Yaml(yaml.SafeLoader):
    """YAML in which only what is plainly a number, true, false or null is one. In YAML 1.1 1:30 is 90, and 010 is 8.

    Nothing in it refers to something else, so that it is no larger than its text, nor has a tag of its own."""

    yaml_implicit_resolvers: ClassVar = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        """The next value; `parent` and `index` tell where it stands."""
        event, self.depth = self.peek_event(), self.depth + 1
        problem = "nested too deep" if self.depth > DEEPEST else ""
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} refers to another value: write that value, or quote it"
        if getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag}: leave it out"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_data(self) -> Any:
        """What the text says; only `null` and nothing at all are null, not `#` or `!`."""
        text = self.buffer.strip("\0 ")  # before reading uses it up
        data = super().get_single_data()
        if data is None and text not in ("", "null"):
            raise yaml.YAMLError("no option stands in it")
        return data


class _Plain(yaml.SafeDumper):
    """Quotes a text that `Yaml` or YAML 1.1 would take for something else. Nothing refers to something else, even where
    two options are the same list."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, text: str) -> yaml.Node:
        """In double quotes, which escape, where it is not of plain signs: in single ones some are read as blanks."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Plain.add_representer(str, _Plain.represent_str)
DEEPEST = 50  # lists and mappings inside of each other
NUMBER = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
for tag, pattern in {"null": "null|", "bool": "true|false", "int": "0|-?[1-9][0-9]*", "float": NUMBER}.items():
    for either in (Yaml, _Plain):
        either.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})$"), None)


def write_yaml(options: Mapping[str, Any]) -> str:
    """The lines from which `read_yaml` reads `options`, of plain values, as they are."""
    return yaml.dump(options, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=LONGEST_LINE)


def read_yaml(text: str, path: str = "") -> Any:
    """What a value says or, where jsonargparse gives a `path`, what a file says."""
    try:
        content = yaml.load(text, Loader=Yaml)
    except yaml.YAMLError as error:
        if not isinstance(error, yaml.MarkedYAMLError) or not path:
            raise  # a value such as `*a` is no YAML: it is text
        number = error.problem_mark.line
        line = "".join(text.splitlines()[number : number + 1]).strip()
        hint = "Text that ends in a colon or begins with *, &, % or @ needs quotes: '-2:'. Indent with blanks."
        raise UsageError(f"line {number + 1} is not YAML ({error.problem}): {line}\n{hint}") from None
    if not path:  # a list or mapping stands in brackets here: `- 10` is text
        return content if text[:1] in "[{" or not isinstance(content, (list, dict)) else text
    if not isinstance(content, dict):
        raise UsageError("not lines of 'option: value', as --print_config writes them.")
    return {SHORT.get(name, name) if isinstance(value, str) else name: value for name, value in content.items()}


def with_texts(check: Callable[..., Any]) -> Callable[..., Any]:
    """jsonargparse's reading of a value, for an option of type `Texts`."""

    @wraps(check)
    def read(value: Any, *rest: Any, **named: Any) -> Any:
        return check(read_texts(value), *rest, **named)

    return read


def read_path(text: str) -> Path:
    """A path with `~` expanded. An empty text is none (Path would take it for the working directory)."""
    longest = max(len(os.fsencode(part)) for part in ("", *Path(text).parts))
    if not text or "\0" in text or longest > LONGEST_NAME or len(text) > LONGEST_PATH:
        raise ValueError(f"Expected a path. Got value: {text}")
    return Path(text).expanduser()


LONGEST_LINE = 2**31  # no text is folded
LONGEST_NAME, LONGEST_PATH = 255, 4000  # what file systems take
MODE = "litfreeze"
jsonargparse.set_loader(MODE, read_yaml, exceptions=(yaml.YAMLError,))
jsonargparse.set_dumper(MODE, write_yaml)
jsonargparse.typing.register_type(Path, deserializer=read_path, type_check=isinstance)
# Text that should be a number is read by jsonargparse's own YAML 1.1 loader, for which there is no public setting.
_loaders_dumpers.yaml_default_loader = Yaml
