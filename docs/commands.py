"""A page for each command, made from its parser while the site is built (a hook of mkdocs)."""

from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

from litfreeze.__main__ import commands
from litfreeze.cli import Parser, description, expected, load

FOLDER = "commands"


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for command, spec in commands().items():
        files.append(File.generated(config, f"{FOLDER}/{_slug(command)}.md", content=page(command, load(spec))))
    return files


def on_config(config: Any) -> Any:
    """Puts them into the menu."""
    section = next(item for item in config["nav"] if isinstance(item, dict) and "Commands" in item)
    section["Commands"] = [{command: f"{FOLDER}/{_slug(command)}.md"} for command in commands()]
    return config


def page(command: str, function: Callable[..., Any]) -> str:
    """What a command does, how it is called, and a table of its options for each group of them."""
    parser = Parser(command, function)
    lines = [f"# litfreeze {command}", "", *(f"{text}\n" for text in description(function))]
    lines += ["```text", parser.usage, "```", ""]
    helps = {action.dest: (action.help or "", action) for action in parser._actions}
    defaults = parser.get_defaults()
    for group, names in _groups(parser.options).items():
        lines += [f"## {group}" if group else "## Options", "", "| option | takes | default |", "| --- | --- | --- |"]
        for name in names:
            hint = parser.options[name]
            takes = expected(hint) + (" or null" if NoneType in get_args(hint) else "")
            default = "must be given" if name in parser.required else _cell(defaults.get(name))
            lines.append(f"| `--{name}` <br> {_text(helps[name][0])} | {_text(takes)} | {default} |")
        lines.append("")
    told = "Options may also stand in a YAML file (`--config`) or in the environment (`LITFREEZE_TRAIN__LR=1e-4`)."
    return "\n".join([*lines, told, ""])


def _groups(options: dict[str, Any]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"": []}
    for name in options:
        group = name.rpartition(".")[0]
        groups.setdefault(f"--{group}" if group else "", []).append(name)
    return {group: names for group, names in groups.items() if names}


def _cell(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _text(text: str) -> str:
    """One line of a table, in which nothing is markup."""
    for mark in "\\`*_{}[]<>|":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>|" else {"<": "&lt;", ">": "&gt;", "|": "\\|"}[mark])
    return " ".join(text.split())


def _slug(command: str) -> str:
    return command.replace(" ", "-")
