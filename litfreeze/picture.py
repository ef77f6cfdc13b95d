"""A picture appears whole or not at all."""

from pathlib import Path
from typing import Any

from litfreeze.whole import whole_file


def save_picture(figure: Any, path: Path) -> None:
    """Writes `figure`, matplotlib's, as a PNG."""
    with whole_file(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
