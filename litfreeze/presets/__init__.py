"""Shapes to start from by name, each as its config.json has it: for `litfreeze init --preset` and config_hub."""

from pathlib import Path
from typing import Any

from litfreeze.json_file import read_json

PRESETS: dict[str, dict[str, Any]] = {
    path.stem: read_json(path) for path in sorted(Path(__file__).parent.glob("*.json"))
}
