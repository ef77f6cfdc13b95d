"""The plot of one run's curves, or of several."""

from collections.abc import Sequence
from typing import Any

from nicegui import ui
from nicegui.events import ValueChangeEventArguments

COLOURS = ("#3a8fd0", "#d9822b", "#4c9a84", "#b65c6b", "#8a78b5", "#8d8f3a")
LINE = {"lineStyle": {"color": "rgba(128,128,128,0.25)"}}
TEXT = {"color": "#8a959c"}


def chart() -> ui.echart:
    """An empty plot over steps, and a switch for a logarithmic scale."""
    axis = {"type": "value", "axisLabel": TEXT, "splitLine": LINE, "axisLine": LINE, "nameTextStyle": TEXT}
    options = {
        "animation": False,
        "color": list(COLOURS),
        "grid": {"left": 52, "right": 16, "top": 34, "bottom": 34},
        "legend": {"type": "scroll", "top": 0, "textStyle": TEXT},
        "tooltip": {"trigger": "axis", "confine": True},
        "xAxis": {**axis, "name": "step", "nameLocation": "middle", "nameGap": 22, "minInterval": 1},
        "yAxis": {**axis, "scale": True},
        "series": [],
    }
    plot = ui.echart(options).classes("lf-chart")

    def scale(event: ValueChangeEventArguments) -> None:
        plot.options["yAxis"]["type"] = "log" if event.value else "value"
        plot.update()

    ui.switch("log scale", on_change=scale).props("dense").classes("lf-hint")
    return plot


def line(name: str, points: Sequence[tuple[float, float]], colour: int, validation: bool) -> dict[str, Any]:
    """One curve: of training a thin line, of validation a thick one with its points."""
    shade = COLOURS[colour % len(COLOURS)]
    return {
        "name": name,
        "type": "line",
        "data": [list(point) for point in points],
        "showSymbol": validation,
        "symbolSize": 5,
        "color": shade,
        "lineStyle": {"width": 2.5 if validation else 1, "opacity": 1 if validation else 0.65},
    }


def draw(plot: ui.echart, lines: Sequence[dict[str, Any]]) -> None:
    """Shows these curves and no others."""
    plot.options["series"] = list(lines)
    plot.update()
