"""Writing a picture: whole or not at all."""

import os
from pathlib import Path
from typing import Any


def save_picture(figure: Any, path: Path) -> None:
    """Writes `figure`, matplotlib's, as a PNG."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as out:
            figure.savefig(out, dpi=130, format="png")
            out.flush()
            os.fsync(out.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
