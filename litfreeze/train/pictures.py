"""The pictures of a run: its losses, and what each block did over time."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from litfreeze.picture import save_picture
from litfreeze.train.watch import Seen

NUMBERED = 40  # classes of a confusion matrix that leave room for numbers
PANELS = {
    "grad_norm": "gradient norm",
    "update_ratio": "a step's ‖ΔW‖ / ‖W‖",
    "drift": "‖W - W₀‖ / ‖W₀‖ since the start",
}


def draw_losses(path: Path, rows: list[dict[str, Any]], per: str = "target token") -> None:
    """Training and validation loss over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot()
    for column, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="optimizer step", ylabel=f"loss per {per}")
    axes.legend()
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def draw_blocks(path: Path, seen: Sequence[Seen], n_layer: int) -> None:
    """Blocks from bottom to top over the steps that were looked at, one panel for each of `PANELS`, the colour on a log
    scale of at most six decades; what did not train then stays blank. A PNG."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    steps = sorted({one.step for one in seen})
    order = ["embed", *range(n_layer), "final_norm", "head"]
    parts = sorted({one.part for one in seen}, key=order.index)
    edges = [0.5, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 0.5]
    row, column = ({value: i for i, value in enumerate(values)} for values in (parts, steps))
    figure = Figure((13, 1.6 + min(0.22 * max(len(parts), 6), 9)), layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        grid = np.full((len(parts), len(steps)), np.nan)
        for one in seen:
            value = getattr(one, field)
            grid[row[one.part], column[one.step]] = value if np.isfinite(value) and value > 0 else np.nan
        top = np.nanmax(grid) if np.isfinite(grid).any() else 1.0
        bottom = max(np.nanmin(grid), top * 1e-6) if np.isfinite(grid).any() else 0.1
        scale = LogNorm(min(bottom, top / 1.1), top)
        mesh = axes.pcolormesh(edges, np.arange(len(parts) + 1), grid, norm=scale, cmap="viridis", rasterized=True)
        # Ticks of our own: powers of ten may be none, or with all between them take longer to draw than the rest
        figure.colorbar(mesh, ax=axes, format="%.1e", ticks=np.geomspace(scale.vmin, scale.vmax, 5)).minorticks_off()
        axes.set_title(label, fontsize=10, loc="left")
        axes.set(xlabel="optimizer step")
    labelled = range(0, len(parts), max(1, len(parts) // 24))
    axes.set_yticks([i + 0.5 for i in labelled], [str(parts[i]) for i in labelled])
    figure.supylabel("block", fontsize=10)
    save_picture(figure, path)


def draw_confusion(path: Path, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Who is taken for whom: a row for each class, its cells coloured by the share of its records that were given the
    class of the column. Up to `NUMBERED` classes the counts stand in the cells; of more, only some are named. A PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.array(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(labels) <= NUMBERED
    size = 3 + 0.42 * len(labels) if few else 11
    figure = Figure((size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    named = range(0, len(labels), 1 if few else -(-len(labels) // NUMBERED))
    names = [label if len(label) <= 24 else f"{label[:23]}…" for label in (labels[i] for i in named)]
    names = [name.replace("$", r"\$") for name in names]  # no mathematics
    axes.set_xticks(named, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(named, names, fontsize=8)
    axes.set(xlabel="class given", ylabel="class of the record")
    for i, j in zip(*counts.nonzero(), strict=True) if few else ():
        colour = "white" if shares[i, j] > 0.6 else "black"
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=7, color=colour)
    save_picture(figure, path)
