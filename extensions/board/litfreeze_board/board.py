"""What all pages share."""

from dataclasses import dataclass, field
from typing import Any

from litfreeze_board.helper import Helper
from litfreeze_board.places import Root


@dataclass
class Board:
    """The root, the helpers, and the rankings that were made."""

    root: Root
    planner: Helper
    ranker: Helper
    rankings: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
