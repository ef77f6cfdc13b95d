"""`litfreeze diff`: what lies between two checkpoints, and the proof that nothing else does."""

import math
from pathlib import Path
from textwrap import fill
from typing import Optional

from litfreeze.freeze.layers import Layers
from litfreeze.picture import save_picture


def setup(
    a: Path,
    b: Path,
    a_base_dir: Optional[Path] = None,
    b_base_dir: Optional[Path] = None,
    expect_only: Layers = None,
    json: Optional[Path] = None,
    png: Optional[Path] = None,
):
    """Compare two checkpoints of one shape, weight by weight: what is identical to the bit, what changed, how much.

    Each is a litfreeze, Hugging Face or PEFT directory. One that holds only what trained is compared over its base, an
    adapter as what it computes.

    Args:
        a: The checkpoint that changes are measured from.
        b: The other one.
        a_base_dir: The base of A, if A holds only what trained and its base is no longer where it was.
        b_base_dir: The same for B.
        expect_only: What may have changed: 10,11  0-3,8  -2:  all  none, and among them embed, head, final_norm. The
            exit code is 1 if anything else did.
        json: Write every figure to this file.
        png: Draw the change of every module, block by block, in this file.
    """
    from litfreeze.checkpoint.compare import compare
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.errors import RunError
    from litfreeze.whole import check_new_file, write_text

    check_new_file("json", json)
    check_new_file("png", png)
    comparison = compare(open_checkpoint(a, a_base_dir), open_checkpoint(b, b_base_dir), expect_only)
    if json is not None:
        write_text(Path(json), comparison.to_json())
    if png is not None:
        draw(Path(png), comparison)
    print(f"A  {comparison.a.describe()}\nB  {comparison.b.describe()}\n")
    print(f"{comparison.table()}\n\n{comparison.summary()}", flush=True)
    if comparison.unexpected:
        raise RunError(comparison.unexpected)
    return comparison


def draw(path: Path, comparison) -> None:
    """The parts of a `Comparison` side by side, the model's input at the left, each made of its modules: a PNG.

    The colour is ‖ΔW‖/‖W‖, on a log scale of at most six decades; what lies beyond takes the colour of its end."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    columns, modules = comparison.modules, list(comparison.modules[0])
    ratios = [change.relative for inside in columns.values() for change in inside.values()]
    found = [ratio for ratio in ratios if 0 < ratio < math.inf]
    top = math.ceil(math.log10(max(found, default=1)))
    bottom = max(math.floor(math.log10(min(found, default=1))), top - 6)
    scale = ScalarMappable(LogNorm(10.0 ** min(bottom, top - 1), 10.0**top), "viridis")
    plain = {"identical": "#ebebeb", "equal values": "#c9d3da", "NaN or infinite": "#d62728"}

    many = len(columns) > 48
    width = (0.18 if many else 0.3) * len(columns) + 2.5  # inches
    figure = Figure((width, 1.6 + 0.28 * len(modules)), layout="constrained")
    axes = figure.add_subplot()
    legend, ticks, x = {}, {}, 0.0
    for part, inside in columns.items():
        x += 0.5 if part in (0, "final_norm") else 0.0  # the blocks stand together
        height = len(modules) / len(inside)
        for row, (module, change) in enumerate(inside.items()):
            kind = "NaN or infinite" if any(change.not_finite) else change.state
            ratio = min(max(change.relative, scale.norm.vmin), scale.norm.vmax)
            if kind in plain:
                legend[kind] = Patch(color=plain[kind], label=kind)
            colour = plain.get(kind) or scale.to_rgba(ratio)
            axes.add_patch(Rectangle((x, row * height), 1, height, facecolor=colour, edgecolor="white"))
            if isinstance(part, str):
                ink = "black" if kind in plain or scale.norm(ratio) > 0.6 else "white"
                middle = {"x": x + 0.5, "y": (row + 0.5) * height, "ha": "center", "va": "center"}
                axes.text(s=module, rotation=90, color=ink, fontsize=8 if many else 10, **middle)
            elif part % (5 if many else 1) == 0:
                ticks[x + 0.5] = part
        x += 1
    axes.set(xlim=(0, x), ylim=(len(modules), 0), xlabel="block")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_yticks([row + 0.5 for row in range(len(modules))], modules)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    told = [f"A  {comparison.a.describe()}", f"B  {comparison.b.describe()}", comparison.summary().splitlines()[0]]
    axes.set_title("\n".join(fill(line, int(12 * width)) for line in told), loc="left", fontsize=9)
    if comparison.changed:
        figure.colorbar(scale, ax=axes, label="‖ΔW‖ / ‖W‖")
    figure.legend(handles=list(legend.values()), loc="outside lower right", ncols=3, frameon=False)

    save_picture(figure, path)
