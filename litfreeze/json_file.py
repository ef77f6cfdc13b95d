"""Reading a JSON file that may hold anything."""

import json
from pathlib import Path
from typing import Any

from litfreeze.errors import UsageError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UsageError, naming the file, if it is absent, broken or not an object."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content
