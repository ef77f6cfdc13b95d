"""Shapes to start from by name, each as its config.json has it: `litfreeze init --preset`, and what config_hub is of."""

from pathlib import Path
from typing import Any

from litfreeze.json_file import read_json

PRESETS: dict[str, dict[str, Any]] = {
    path.stem: read_json(path) for path in sorted(Path(__file__).parent.glob("*.json"))
}
