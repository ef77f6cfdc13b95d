"""What stands in the section of the plan: the numbers of the last one, and why what is filled in has none."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from nicegui import ui

from litfreeze_board import figures
from litfreeze_board.pages import frame


class Planned:
    """What is made where it stands: the refusal, what is waited for, the numbers.

    Attributes:
        told: The refusal; empty for none.
        waiting: What is waited for; to be hidden while nothing is.
    """

    def __init__(self) -> None:
        self.told = frame.refused()
        self.waiting = ui.label("Counting …").classes("lf-hint")
        self.figures = ui.html("", sanitize=False).classes("w-full").mark("plan")
        self.data = ui.label().classes("lf-hint").style("white-space: pre-wrap; margin-top: 8px")
        with ui.expansion("Every part").props("dense"):
            self.table = frame.code(kind="lf-table")

    def show(self, plan: Optional[Mapping[str, Any]], notes: Sequence[str]) -> None:
        """A plan as plan.plan makes it. With None the last one stays, marked as old."""
        if plan is None:
            self.figures.classes(add="lf-old")
            return
        self.figures.set_content(figures.plan_html(plan))
        self.figures.classes(remove="lf-old")
        self.data.set_text("\n".join([plan["data"], *notes]))
        self.table.set_text(plan["table"])
