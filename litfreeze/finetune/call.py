"""A run from Python: keyword arguments to those of a finetune script, through the command line's own schema."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import is_dataclass
from io import StringIO
from os import PathLike, fspath
from pathlib import Path
from threading import Lock
from types import NoneType
from typing import Any, Union, get_args, get_type_hints

import torch

from litfreeze.cli import SHORT, arguments, expected, options_of, read_yaml, unknown_option, write_yaml
from litfreeze.errors import UsageError, did_you_mean
from litfreeze.finetune import full, lora
from litfreeze.finetune.recipe import plain
from litfreeze.prefix.folder import default_cache_dir
from litfreeze.train.job import Result
from litfreeze.whole import write_text

SCRIPTS = {"full": full.setup, "lora": lora.setup}
_RUNS = Lock()  # standard output, signals and draws are the process's, and one run's at a time
DATA = ("data.path", "data.val_path")


def finetune(checkpoint_dir: Union[Path, str, None], method: str, quiet: bool, options: Mapping[str, Any]) -> Result:
    """What `litfreeze.finetune` says."""
    if not isinstance(method, str) or method not in SCRIPTS:
        near = did_you_mean(method, SCRIPTS)
        raise UsageError(f"method: {method!r} is not one of {', '.join(SCRIPTS)}.{near}")
    script = SCRIPTS[method]
    given = dict(options)
    config = given.pop("config", None)
    if checkpoint_dir is not None:
        given["checkpoint_dir"] = checkpoint_dir
    named = {**(placed(_read(config), script) if config is not None else {}), **placed(given, script)}
    for option in DATA:
        if option in named:
            named[option] = as_file(named[option], option)
    hints = options_of(script)
    for option, value in named.items():
        named[option] = value = fspath(value) if isinstance(value, PathLike) else plain(value)
        if not _is_plain(value) or (value is None and NoneType not in get_args(hints[option])):
            raise UsageError(f"{option}: {value!r:.80} is not {expected(hints[option])}.")
    read = arguments(f"finetune {method}", script, write_yaml(_nested(named)))
    if not _RUNS.acquire(blocking=False):
        raise UsageError("Another run is under way in this process. Wait for its end, or start a process for this one.")
    try:
        with _own_modes(), redirect_stdout(StringIO()) if quiet else nullcontext():
            return script(**read)
    finally:
        _RUNS.release()


@contextmanager
def _own_modes() -> Iterator[None]:
    """While it is entered, torch is as a process has it at its beginning, whatever the caller's thread has set."""
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


def placed(given: Mapping[str, Any], script: Callable[..., Any]) -> dict[str, Any]:
    """`{"train.max_steps": 50}` of `{"max_steps": 50}`, `{"train": {"max_steps": 50}}` or `{"train": TrainArgs(50)}`.

    Raises UsageError for a name that no option of `script` has, or more than one, and for an option given twice."""
    options, flat = options_of(script), _flat_groups(script)
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if name in found:
            raise UsageError(f"{name} is given twice.")
        found[name] = value

    for word, value in given.items():
        value = _changed(value) if is_dataclass(value) and not isinstance(value, type) else value
        group = any(option.startswith(f"{word}.") for option in options)
        if isinstance(value, Mapping) and (group or word in flat):
            for leaf, inner in value.items():
                name = leaf if word in flat else f"{word}.{leaf}"
                if name not in options:
                    raise unknown_option(name, options)
                put(name, inner)
        else:
            put(_full_name(SHORT.get(word, word), script, options), value)
    return found


def _full_name(word: str, script: Callable[..., Any], options: Mapping[str, Any]) -> str:
    if word in options:
        return word
    same = [option for option in options if option.endswith(f".{word}")]
    if len(same) == 1:
        return same[0]
    if same:
        raise UsageError(f"{word} may be {' or '.join(same)}: say which, as in {_in_group(same[0])}.")
    for method, other in SCRIPTS.items():
        if other is not script and word in options_of(other):
            raise UsageError(f"{word} is an option of method={method!r} alone.")
    near = did_you_mean(word, [*options, *(option.rpartition(".")[2] for option in options)])
    raise UsageError(f"unknown option {word!r}.{near} litfreeze finetune full --help lists them, or lora.")


def _in_group(option: str) -> str:
    group, _, leaf = option.rpartition(".")
    return f"{group}={{{leaf!r}: ...}}"


def _flat_groups(script: Callable[..., Any]) -> set[str]:
    return {name for name, hint in get_type_hints(script).items() if getattr(hint, "flat", False)}


def _changed(group: Any) -> dict[str, Any]:
    """The fields of a group of options that are not its defaults."""
    defaults = vars(type(group)())
    return {name: value for name, value in vars(group).items() if value != defaults[name]}


def _read(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, PathLike)):
        raise UsageError(f"config: {config!r:.80} is not a path, nor a dict of options.")
    config = Path(config)
    try:
        return read_yaml(config.expanduser().read_text(encoding="utf-8"), path=str(config))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {config} cannot be read: {error}.") from None
    except UsageError as error:
        raise UsageError(f"{config}: {error}") from None


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """As `--config` has it."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        group, _, leaf = name.rpartition(".")
        (found.setdefault(group, {}) if group else found)[leaf] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return all(map(_is_plain, value)) and (isinstance(value, list) or all(map(_is_plain, value.values())))
    return type(value) in (str, int, float, bool, NoneType)


def as_file(data: Union[Path, str, Iterable[Mapping[str, Any]], None], option: str) -> Union[Path, str, None]:
    """Where the records lie: a path as it is; records in memory are written to a file under the cache, by the name of
    its hash, which is read like any other, told of by line, and still there when the run is resumed."""
    if data is None or isinstance(data, (str, Path)):
        return data
    if not isinstance(data, Iterable):
        raise UsageError(f"{option}: {data!r:.80} is not a path, nor records: dicts, in a list.")
    lines = []
    for number, record in enumerate(data, start=1):
        if not isinstance(record, Mapping):
            raise UsageError(f"{option}: record {number} is a {type(record).__name__}; records are dicts, in a list.")
        try:
            lines.append(json.dumps(dict(record)) + "\n")
        except (TypeError, ValueError) as error:
            raise UsageError(f"{option}: record {number} is nothing that JSON can say: {error}.") from None
    if not lines:
        raise UsageError(f"{option}: no records.")
    text = "".join(lines)
    place = default_cache_dir().with_name("records") / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_file():
        write_text(place, text)
    return place
