"""The options of a run as YAML, as words, and by name: what can be run again, and what is told of it."""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import yaml

from litfreeze.cli import SHORT, Yaml, options_of, write_yaml


def recipe_yaml(script: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Those `options` of `script` that are not its defaults, as YAML that `--config` takes. `out_dir` is left out, so
    that the recipe can be run again."""
    chosen, defaults = _chosen(script, options)
    for name in [name for name in chosen if getattr(defaults[name], "flat", False)]:
        chosen |= chosen.pop(name)
    return write_yaml(chosen)


def told_to_logger(script: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The same by the names of the command line, `{"train.lr": 1e-4}`. Of a path that says where it lies on this
    machine the last part is left."""
    hints, found = options_of(script), by_option(*_chosen(script, options))
    paths = {name for name in found if "Path" in str(hints[name]) and Path(str(found[name])).is_absolute()}
    return {name: Path(str(value)).name if name in paths else value for name, value in found.items()}


def _chosen(script: Callable[..., Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those options that say what is learned and are not the defaults, and the defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(script).parameters.items()}
    left_out = ("out_dir", "resume", "anew", "ranked")
    return not_default({name: value for name, value in options.items() if name not in left_out}, defaults), defaults


def not_default(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for name, value in values.items():
        default = defaults[name]
        if is_dataclass(value):
            value = not_default(vars(value), vars(default)) or default
        if value != default:
            changed[name] = str(value) if isinstance(value, Path) else value
    return changed


def by_option(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """{'train.lr': 1e-4, 'cache': 'ram'} of {'train': {'lr': 1e-4}, 'frozen': {'cache': 'ram'}}: by the names that the
    command line has for them."""
    found = {}
    for name, value in values.items():
        if not (is_dataclass(defaults[name]) and isinstance(value, Mapping)):
            found[SHORT.get(name, name)] = value  # from Python, data may be a path alone
        else:
            before = "" if getattr(defaults[name], "flat", False) else f"{name}."
            found |= {f"{before}{leaf}": v for leaf, v in value.items()}
    return found


def as_fields(value: Any) -> Any:
    return vars(value) if is_dataclass(value) else value


def plain(value: Any) -> Any:
    """Ranges, sets, arrays and numbers of numpy and torch, as Python gives them, as plain lists and numbers."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return index(value) if isinstance(value, SupportsIndex) and not isinstance(value, bool) else value


def command(method: str, recipe: str) -> list[str]:
    """The words of the command line that says what `recipe`, the YAML of its options, does."""

    def words(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict) and name != "prompt_args":
                yield from words(value, f"{before}{name}.")
                continue
            option = "data" if (before, name) == ("data.", "path") else f"{before}{name}"
            yield from (f"--{option}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    return ["litfreeze", "finetune", method, *words(yaml.load(recipe, Loader=Yaml) or {})]
