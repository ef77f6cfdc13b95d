"""An option that is a text, or a list of texts: `[INST]` is a text, `["[INST]", "###"]` a list."""

import json
from typing import Annotated, Any, Union

FREE = "a list is JSON"
Texts = Annotated[Union[str, list[str], None], FREE]


def read_texts(value: Any) -> Any:
    """What a value of an option of type `Texts` stands for. In brackets it is a list only as JSON has it, its items in
    double quotes, and else a text: YAML would take the brackets away."""
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return [value]
    return found if all(isinstance(item, str) for item in found) else [value]
