"""The options of a command as fields of a form, and what was filled in as words, as YAML, and back.

There is one schema, the command's own signature: fields are made from it, and what they hold goes through the command
line's own reading. A form is a mapping from an option's name to its text; what is not in it was left open."""

import inspect
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional, get_args, get_origin, get_type_hints

from litfreeze.__main__ import COMMANDS
from litfreeze.cli import Parser, arguments, load, parse, read_yaml

Values = Mapping[str, str]


@dataclass(frozen=True)
class Field:
    """One option.

    Attributes:
        group: `train` of `train.lr`, or the parameter of a flat group; empty for the function's own.
        default: What holds if it is left open, as text; empty where that is nothing.
        choices: What it may be, if that is a few words.
        path: It names a file or a folder.
    """

    name: str
    group: str
    help: str
    default: str
    choices: tuple[str, ...]
    path: bool


class Form:
    """The fields of one command, in the order of its signature."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.function = load(COMMANDS[command])

    @cached_property
    def fields(self) -> dict[str, Field]:
        parser = Parser(self.command, self.function)
        helps = {action.dest: action.help for action in parser._actions}
        found = {}
        for name, hint in parser.options.items():
            kind = [hint, *get_args(hint)]
            literal = [choice for each in kind if get_origin(each) is Literal for choice in get_args(each)]
            choices = ("true", "false") if bool in kind and Path not in kind else tuple(map(str, literal))
            default = as_text(parser.get_default(name))
            path = Path in kind
            found[name] = Field(name, self._group(name), helps.get(name) or "", default, choices, path)
        return found

    @property
    def paths(self) -> set[str]:
        """The options that name a file or a folder."""
        return {name for name, field in self.fields.items() if field.path}

    def _group(self, name: str) -> str:
        if "." in name:
            return name.partition(".")[0]
        flat = [group for group, hint in self._groups.items() if name in getattr(hint, "__dataclass_fields__", ())]
        return flat[0] if flat and name not in inspect.signature(self.function).parameters else ""

    @cached_property
    def _groups(self) -> dict[str, Any]:
        hints = get_type_hints(self.function)
        return {name: hint for name, hint in hints.items() if hasattr(hint, "__dataclass_fields__")}

    @property
    def groups(self) -> dict[str, str]:
        """Each group's name and what it is about, those of the function's own options last."""
        about = {name: (inspect.getdoc(hint) or "").partition("\n\n")[0] for name, hint in self._groups.items()}
        return {name: text.replace("\n", " ") for name, text in about.items()} | {"": "Everything else."}

    def words(self, values: Values) -> list[str]:
        """The command line behind `litfreeze`: what differs from the defaults, in the signature's order."""
        given = {name: text for name, text in values.items() if text not in ("", self.fields[name].default)}
        words = self.command.split()
        for name in self.fields:
            if name in given:
                text = given[name]
                shown = "data" if name == "data.path" else name
                words += [f"--{shown}={text}"] if text.startswith("--") else [f"--{shown}", text]
        return words

    def line(self, values: Values) -> str:
        """The same, as a shell takes it."""
        return shlex.join(["litfreeze", *self.words(values)])

    def recipe(self, values: Values) -> str:
        """The same as YAML for `--config`, without `out_dir`. Raises UsageError for values that the command refuses."""
        from litfreeze.finetune.recipe import recipe_yaml

        function, given = parse(self.words(values), COMMANDS)
        return recipe_yaml(function, given)

    def values(self, recipe: str) -> dict[str, str]:
        """The form that the YAML text `recipe` fills in. Raises UsageError for whatever `--config` would refuse."""
        arguments(self.command, self.function, recipe)
        found = {}
        for name, value in read_yaml(recipe, path="recipe.yaml").items():
            inside = name not in self.fields and isinstance(value, dict)
            for inner, text in ({f"{name}.{k}": v for k, v in value.items()} if inside else {name: value}).items():
                found[inner] = as_text(text) or "null"
        return found


def as_text(value: Any) -> str:
    """A value as the command line takes it; empty for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        plain = value and all(not re.search("[,\\[{]", str(item)) for item in value)
        return ",".join(map(str, value)) if plain else json.dumps(value)
    return str(value)


def field_of(refusal: str, values: Values, fields: Mapping[str, Field]) -> Optional[str]:
    """The field that a refusal is about, as far as its text tells: the option that it names first, or the one whose
    value it cites. `values` may have options that are not in `fields`."""
    short = {"data": "data.path"}
    named = re.findall(r"--([A-Za-z_][A-Za-z_0-9.]*)", refusal) + re.findall(r"^([A-Za-z_][A-Za-z_0-9.]*):", refusal)
    for name in named:
        name = short.get(name.rstrip("."), name.rstrip("."))
        if name in fields:
            return name
    cited = re.findall(r"Layers '([^']*)'", refusal)
    layers = ("trainable_layers", "full_layers", "freeze_trainable_layers_ids", "unfreeze")
    for name in layers:
        if cited and cited[0] in values.get(name, ""):
            return name
    paths = [name for name, field in fields.items() if field.path and values.get(name) and values[name] in refusal]
    return max(paths, key=lambda name: len(values[name]), default=None)
