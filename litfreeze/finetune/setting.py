"""What every finetune script settles first: the checkpoint, the data and the defaults of the embedded demo."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
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
        data = replace(data, path=TRAIN_FILE, val_path=data.val_path or VAL_FILE)
    settled = {"lr": lr, "epochs": epochs, **(TRAIN_DEFAULTS if checkpoint_dir is None else {})}
    if train.max_steps is not None:
        settled.pop("epochs")  # the steps say how long
    return data, replace(train, **{name: value for name, value in settled.items() if getattr(train, name) is None})


def recipe_yaml(options: Mapping[str, Any]) -> str:
    """The options that were set, as YAML that `--config` takes."""
    return yaml.safe_dump(_plain(options), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
