"""Numbers of a plan and of a run as HTML: bars, tiles and timelines. Every text in it is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from litfreeze.freeze.layers import format_layers
from litfreeze.sizes import megabytes

KINDS = ("weights", "gradients", "optimizer", "activations", "logits")


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plan_html(plan: Mapping[str, Any]) -> str:
    """The tiles of a plan: what trains, memory, speed, disk; and a timeline, if it has stages."""
    tiles = [
        _tile(
            "Trains",
            f"{100 * plan['trained'] / plan['parameters']:.2f} %",
            [f"{plan['trained']:,} of {plan['parameters']:,} parameters", plan["summary"].partition(": ")[0]],
        ),
        _tile("Memory", megabytes(_total(plan["memory"]["plan"])), [_memory_told(plan)]),
        _speed(plan),
        _tile(
            "Disk",
            megabytes(sum(plan["disk"].values())),
            [f"{megabytes(size)}: {what}" for what, size in plan["disk"].items()],
        ),
    ]
    return f'<div class="lf-tiles">{"".join(tiles)}</div>{_memory(plan["memory"])}{_timeline(plan)}'


def _tile(title: str, value: str, lines: Sequence[str]) -> str:
    told = "".join(f"<div>{escape(line)}</div>" for line in lines if line)
    return f'<div class="lf-tile"><h3>{escape(title)}</h3><strong>{escape(value)}</strong>{told}</div>'


def _total(memory: Mapping[str, int]) -> int:
    return sum(memory[kind] for kind in KINDS)


def _memory_told(plan: Mapping[str, Any]) -> str:
    tokens = f"{plan['memory']['tokens']:,}"
    return f"estimated, {plan['precision']} on {plan['device']}, micro-batches of up to {tokens} tokens"


def _speed(plan: Mapping[str, Any]) -> str:
    stages = plan["stages"]
    whole = sum(stage["epochs"] * (stage["cached_epoch"] or stage["epoch"]) for stage in stages)
    epochs = sum(stage["epochs"] for stage in stages)
    lines = [f"{plan['steps']:,} steps, {epochs:.3g} epochs of {plan['tokens']:,} tokens"]
    first = stages[0]
    lines.append(f"an epoch: {duration(first['epoch'])} (everything: {duration(plan['everything_epoch'])})")
    if first["cached_epoch"] is not None:
        lines.append(
            f"{duration(first['cached_epoch'])} once blocks {first['prefix']} are kept, in {megabytes(first['kept'])}"
        )
    speed = plan["tokens"] * epochs / max(whole, 1e-9)
    lines.append(f"{speed:,.0f} tokens/s, as one block and the head take here")
    return _tile("Time", f"≈ {duration(whole)}", lines)


def _memory(memory: Mapping[str, Any]) -> str:
    """Two bars on one scale, and what their colours mean."""
    most = max(_total(memory["plan"]), _total(memory["everything"])) or 1
    rows = []
    for label, key in (("this plan", "plan"), ("everything", "everything")):
        parts = "".join(
            f'<span class="lf-kind-{kind}" style="width:{100 * memory[key][kind] / most:.3f}%" '
            f'title="{kind} {megabytes(memory[key][kind])}"></span>'
            for kind in KINDS
        )
        figures = ", ".join(f"{kind} {megabytes(memory[key][kind])}" for kind in KINDS)
        total = megabytes(_total(memory[key]))
        rows.append(
            f'<div class="lf-bar-label">{label}</div>'
            f'<div class="lf-bar" role="img" aria-label="{figures}">{parts}</div>'
            f'<div class="lf-bar-total">{total}</div>'
        )
    legend = "".join(
        f'<span><i class="lf-kind-{kind}"></i>{kind} {megabytes(memory["plan"][kind])}</span>' for kind in KINDS
    )
    return f'<div class="lf-bars">{"".join(rows)}</div><div class="lf-legend">{legend}</div>'


def _timeline(plan: Mapping[str, Any]) -> str:
    """Which blocks train when, the highest at the top; blocks that do so together share a row."""
    stages = plan["stages"]
    if len(stages) < 2:
        return ""
    blocks = sorted({block for stage in stages for block in stage["blocks"]}, reverse=True)
    when = {block: tuple(block in stage["blocks"] for stage in stages) for block in blocks}
    rows = []
    for pattern, alike in groupby(blocks, key=when.__getitem__):
        bars = "".join(
            f'<span class="{"lf-on" if on else "lf-off"}" style="flex:{stage["stop"] - stage["start"]}" '
            f'title="steps {stage["start"] + 1}-{stage["stop"]}"></span>'
            for on, stage in zip(pattern, stages, strict=True)
        )
        rows.append(f'<div class="lf-bar-label">{format_layers(alike)}</div><div class="lf-time">{bars}</div>')
    marks = "".join(
        f'<span style="flex:{stage["stop"] - stage["start"]}">{stage["start"]:,}</span>'
        for stage in (stages if len(stages) <= 12 else [])
    )
    rows.append(f'<div class="lf-bar-label">step</div><div class="lf-time lf-marks">{marks}</div>')
    return (
        f'<h3>When blocks train</h3><p class="lf-hint">{escape(plan["thaws"])}</p>'
        f'<div class="lf-timeline" role="img" aria-label="{escape(plan["thaws"])}">{"".join(rows)}</div>'
    )


def looks_html(looks: Mapping[str, Mapping[str, float]], n_layer: int) -> str:
    """What the last look at each part of a model saw: a row each for gradient, update and drift, a cell for each part,
    the darker the more."""
    if not looks:
        return ""
    names = [part for part in ("embed",) if part in looks]
    names += [str(block) for block in range(n_layer)]
    names += [part for part in ("final_norm", "head") if part in looks]
    rows = []
    for column, told in (("grad_norm", "gradient"), ("update_ratio", "update"), ("drift", "drift")):
        most = max((look[column] for look in looks.values()), default=0) or 1
        cells = []
        for name in names:
            value = looks.get(name, {}).get(column)
            share = 0 if value is None else 12 + 88 * value / most
            text = "frozen" if value is None else f"{value:.2g}"
            cells.append(
                f'<span class="lf-look" style="--share:{share:.0f}%" title="{escape(name)}: {told} {text}">'
                f"<i>{escape(name)}</i></span>"
            )
        rows.append(f'<div class="lf-bar-label">{told}</div><div class="lf-looks">{"".join(cells)}</div>')
    step = int(max(look["step"] for look in looks.values()))
    return f'<div class="lf-timeline">{"".join(rows)}</div><p class="lf-hint">as of step {step:,}</p>'
