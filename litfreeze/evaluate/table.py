"""One table for all figures: a row for each, a column for each checkpoint."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from litfreeze.aligned import aligned
from litfreeze.train.outcome import Scores
from litfreeze.whole import write_text


def describe(figures: Sequence[dict[str, Any]]) -> str:
    """The table of what was found, one entry of `figures` for each column."""
    columns = [_column(found) for found in figures]
    rows = list(dict.fromkeys(row for column in columns for row in column))
    cells = [["", *(found["name"] for found in figures)]]
    cells += [[row, *(column.get(row, "") for column in columns)] for row in rows]
    return "\n".join(aligned(cells, "<" + ">" * len(columns)))


def _column(found: dict[str, Any]) -> dict[str, str]:
    """Row → what stands there."""
    rows = _of_records(found["records"]) if "records" in found else {}
    for task, metrics in found.get("tasks", {}).items():
        for metric, (value, error) in metrics.items():
            rows[f"{task} {metric}"] = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return rows


def _of_records(scores: Scores) -> dict[str, str]:
    if scores.macro_f1 is not None:
        return {
            "loss": f"{scores.loss:.4f}",
            "accuracy": f"{scores.accuracy:.1%}",
            "macro F1": f"{scores.macro_f1:.1%}",
        }
    exact = {} if scores.exact_match is None else {"exact match": f"{scores.exact_match:.1%}"}
    return {
        "loss": f"{scores.loss:.4f}",
        "perplexity": f"{perplexity(scores):.4g}",
        "tokens right": f"{scores.accuracy:.1%}",
        **exact,
        "targets": f"{scores.targets:,}",
    }


def perplexity(scores: Scores) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(scores.loss) if scores.loss < 700 else math.inf


def write_figures(path: Path, figures: Sequence[dict[str, Any]], data: Optional[str], limit: Optional[int]) -> None:
    """Every figure, as JSON; a value that is not finite is null."""
    checkpoints = []
    for found in figures:
        entry = {key: value for key, value in found.items() if key not in ("records", "tasks")}
        if "records" in found:
            scores = found["records"]
            own = {} if scores.macro_f1 is not None else {"perplexity": perplexity(scores)}
            entry["records"] = {**asdict(scores), **own}
        if "tasks" in found:
            entry["tasks"] = {
                task: {metric: {"value": value, "stderr": error} for metric, (value, error) in metrics.items()}
                for task, metrics in found["tasks"].items()
            }
        checkpoints.append(entry)
    content = {"data": data, "limit": limit, "checkpoints": _finite(checkpoints)}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
