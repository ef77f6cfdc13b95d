"""What every finetune script settles first: the checkpoint, the data and the defaults of the embedded demo."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from litfreeze.checkpoint.directory import Checkpoint, open_checkpoint
from litfreeze.data.args import DataArgs
from litfreeze.demo import MODEL_DIR, TRAIN_DEFAULTS, TRAIN_FILE, VAL_FILE
from litfreeze.train.args import TrainArgs


def open_base(checkpoint_dir: Optional[Path], untie_embeddings: bool = False) -> Checkpoint:
    """The checkpoint to start from, the embedded demo model if none is named."""
    checkpoint = open_checkpoint(checkpoint_dir or MODEL_DIR)
    return checkpoint.untied() if untie_embeddings else checkpoint


def with_demo_defaults(
    checkpoint_dir: Optional[Path], data: Union[DataArgs, Path, str], train: TrainArgs, lr: float, epochs: int
) -> tuple[DataArgs, TrainArgs]:
    """Fills in what was left open: the embedded utterances, and `lr` and `epochs` (of the demo, for its model).

    A bare path stands for `DataArgs(path)`."""
    data = data if isinstance(data, DataArgs) else DataArgs(path=Path(data))
    if data.path is None:
        own_split = data.val_path is not None or data.val_split_fraction is not None
        data = replace(data, path=TRAIN_FILE, val_path=data.val_path if own_split else VAL_FILE)
    settled = {"lr": lr, "epochs": epochs, **(TRAIN_DEFAULTS if checkpoint_dir is None else {})}
    if train.max_steps is not None:
        settled.pop("epochs")  # the steps say how long
    return data, replace(train, **{name: value for name, value in settled.items() if getattr(train, name) is None})


def recipe_yaml(script: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Those `options` of `script` that are not its defaults, as YAML that `--config` takes. `out_dir` is left out, so
    that the recipe can be run again."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(script).parameters.items()}
    chosen = _changed({name: value for name, value in options.items() if name != "out_dir"}, defaults)
    return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    changed = {}
    for name, value in values.items():
        default = defaults[name]
        if is_dataclass(value):
            value = _changed(vars(value), vars(default)) or default
        if value != default:
            changed[name] = str(value) if isinstance(value, Path) else value
    return changed
