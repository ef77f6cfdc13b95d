"""All runs, and some of them side by side."""

import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

from nicegui import run as aside
from nicegui import ui

from litfreeze_board.board import Board
from litfreeze_board.curves import Table, progress
from litfreeze_board.figures import duration
from litfreeze_board.pages import frame
from litfreeze_board.pages.charts import chart, draw, line
from litfreeze_board.runs import Run, all_runs

COLUMNS = {
    "run": "run", "state": "state", "layers": "blocks", "step": "step", "loss": "loss", "val": "validation loss",
    "speed": "tokens/s", "left": "left", "began": "began",
}  # fmt: skip
NAME = """<q-td :props="props"><a :href="'/runs/' + props.row.id">{{ props.row.run }}</a></q-td>"""
STATE = (
    """<q-td :props="props"><span :class="'lf-state lf-state-' + props.row.state">{{ props.row.state }}</span></q-td>"""
)


def add(board: Board) -> None:
    """The page `/runs`."""

    @ui.page("/runs")
    async def runs() -> None:
        with frame.page(board.root, "Runs"):
            await Runs(board).build()


class Runs:
    """One open page. `tables` are the metrics of each run, read on as they grow."""

    def __init__(self, board: Board) -> None:
        self.root = board.root.path
        self.tables: dict[str, Table] = {}
        self.runs: dict[str, Run] = {}
        self.drawn: Any = None

    async def build(self) -> None:
        with frame.section("Runs"):
            self.none = ui.label("No run has been started here yet.").classes("lf-hint")
            columns = [{"name": n, "label": t, "field": n, "align": "left"} for n, t in COLUMNS.items()]
            self.table = ui.table(rows=[], columns=columns, row_key="id", selection="multiple")
            self.table.props("flat dense :rows-per-page-options=[0] hide-pagination hide-selected-banner").classes(
                "lf-runs"
            )
            self.table.add_slot("body-cell-run", NAME)
            self.table.add_slot("body-cell-state", STATE)
            self.table.on_select(lambda _: self._compare())
        with frame.section("Compared"):
            ui.label("Tick runs above to see their losses in one plot.").classes("lf-hint")
            with ui.element("div").style("width: 100%") as self.plots:
                self.plot = chart()
            self.commands = frame.code()
            self.commands.bind_visibility_from(self.commands, "text", backward=bool)
        await self.look()
        ui.timer(2.0, self.look)

    async def look(self) -> None:
        """What has changed since the last time."""
        rows = await aside.io_bound(self._read)
        if rows is None or rows == self.table.rows:
            return
        self.none.set_visibility(not rows)
        self.table.rows = rows
        self.table.selected = [row for row in rows if row["id"] in {row["id"] for row in self.table.selected}]
        self._compare()

    def _read(self) -> list[dict[str, Any]]:
        self.runs = {run.id: run for run in all_runs(self.root)}
        return [self._row(run) for run in self.runs.values()]

    def _row(self, run: Run) -> dict[str, Any]:
        table = self.tables.setdefault(run.id, Table(run.place / "metrics.csv"))
        table.look()
        far = progress(table, run.steps)
        state = run.state
        return {
            "id": run.id,
            "run": str(Path(run.out_dir)),
            "state": state,
            "layers": f"{run.words[1]} {run.layers}",
            "step": f"{far.step:,} / {far.steps:,}" if far.steps else f"{far.step:,}",
            "loss": _figure(far.loss),
            "val": _figure(far.val_loss),
            "speed": "" if far.tokens_per_second is None else f"{far.tokens_per_second:,.0f}",
            "left": duration(far.left) if far.left is not None and state == "running" else "",
            "began": datetime.fromtimestamp(run.began).strftime("%d %b %H:%M"),
        }

    def _compare(self) -> None:
        chosen = [self.runs[row["id"]] for row in self.table.selected if row["id"] in self.runs]
        lines = []
        for i, run in enumerate(chosen):
            table = self.tables[run.id]
            lines.append(line(run.out_dir, table.curve("train_loss"), i, False))
            lines.append(line(f"{run.out_dir}: validation", table.curve("val_loss"), i, True))
        self.plots.set_visibility(bool(chosen))
        if lines != self.drawn:
            self.drawn = lines
            draw(self.plot, lines)
        self.commands.set_text("\n\n".join(shlex.join(["litfreeze", *run.words]) for run in chosen))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
