"""One run: how far it is, its curves, what its blocks do, its log, and what can be done with what it leaves."""

import shlex
from typing import Any
from urllib.parse import urlencode

from fastapi import HTTPException
from fastapi.responses import FileResponse
from nicegui import app, ui
from nicegui import run as aside

from litfreeze.errors import UsageError
from litfreeze.outputs import RECIPE
from litfreeze_board import runs
from litfreeze_board.board import Board
from litfreeze_board.curves import Table, end_of, error_of, last_looks, progress
from litfreeze_board.figures import duration, looks_html
from litfreeze_board.pages import frame
from litfreeze_board.pages.charts import chart, draw, line
from litfreeze_board.results import Left, left_by

STOPPING = "It ends its step, keeps where it stands and says how to go on."


def add(board: Board) -> None:
    """The page `/runs/{id}`, and the pictures of its diffs."""

    def found(number: str) -> runs.Run:
        run = runs.read_run(board.root.path / runs.STATE / number) if number.isdecimal() else None
        if run is None:
            raise HTTPException(404)
        return run

    @ui.page("/runs/{number}")
    async def one(number: str) -> None:
        run = found(number)
        with frame.page(board.root, "Runs"):
            await OneRun(board, run).build()

    @app.get("/runs/{number}/{picture}.png")
    def picture(number: str, picture: str) -> FileResponse:
        known = {task.name for task in runs.tasks(found(number))}
        file = found(number).folder / f"{picture}.png"
        if picture not in known or not file.is_file():
            raise HTTPException(404)
        return FileResponse(file, headers={"cache-control": "no-cache"})


class OneRun:
    """One open page, which looks at the run's files every second."""

    def __init__(self, board: Board, run: runs.Run) -> None:
        self.board, self.run = board, run
        self.metrics = Table(run.place / "metrics.csv")
        self.blocks = Table(run.place / "blocks.csv")
        self.shown: dict[str, Any] = {}

    async def build(self) -> None:
        with frame.section(""):
            with ui.element("div").classes("lf-row"):
                ui.html(self.run.out_dir, sanitize=True, tag="h1")
                self.state = ui.label().mark("state")
            self.facts = ui.html("", sanitize=False).classes("lf-facts").style("margin: 8px 0").mark("facts")
            self.told = frame.refused()
            with ui.element("div").classes("lf-row"):
                self.stop = ui.button("Stop", on_click=self._stop).props("outline color=negative").mark("stop")
                self.resume = ui.button("Resume", on_click=self._resume).props("outline").mark("resume")
                ui.button("New run from its options", on_click=self._again).props("flat")
                self.stopping = ui.label(STOPPING).classes("lf-hint")
            frame.code(shlex.join(["litfreeze", *self.run.words])).style("margin-top: 10px")
        with frame.section("Loss"):
            self.plot = chart()
        with frame.section("What the blocks do"):
            self.looks = ui.html("Nothing was seen yet.", sanitize=False).classes("w-full").mark("looks")
        with frame.section("Checkpoints"):
            self.left = ui.element("div").style("width: 100%")
            self.tasks = ui.element("div").style("width: 100%")
        with frame.section("Log"):
            self.log = frame.code(kind="lf-log").mark("log")
            self.log.props("tabindex=0")
        await self.look()
        ui.timer(1.0, self.look)

    async def look(self) -> None:
        """What has changed since the last time."""
        now = await aside.io_bound(self._read)
        if now is None:
            return
        for part, show in (
            ("state", self._show_state), ("curves", self._show_curves), ("blocks", self._show_blocks),
            ("left", self._show_left), ("tasks", self._show_tasks), ("log", self._show_log),
        ):  # fmt: skip
            if self.shown.get(part) != now[part]:
                self.shown[part] = now[part]
                show(now[part])

    def _read(self) -> dict[str, Any]:
        self.run = runs.read_run(self.run.folder) or self.run
        self.metrics.look()
        self.blocks.look()
        log = end_of(self.run.log)
        state = self.run.state
        tasks = []
        for task in runs.tasks(self.run):
            picture = (self.run.folder / f"{task.name}.png").is_file() and not task.alive
            tasks.append((task, task.alive, end_of(self.run.folder / f"{task.name}.log"), picture))
        return {
            "state": (state, self.run.resumable, progress(self.metrics, self.run.steps), error_of(log)),
            "curves": (self.metrics.curve("train_loss"), self.metrics.curve("val_loss")),
            "blocks": last_looks(self.blocks),
            "left": [(left, *self._done(left)) for left in left_by(self.run)],
            "tasks": tasks,
            "log": log,
        }

    def _done(self, left: Left) -> tuple[bool, bool]:
        """Whether it was merged, and exported."""
        root = self.board.root.path
        return (root / left.merged).is_dir(), (root / left.exported).is_dir()

    # ---- what is shown ----

    def _show_state(self, found: tuple[Any, ...]) -> None:
        state, resumable, far, error = found
        self.state.set_text(state)
        self.state.classes(replace=f"lf-state lf-state-{state}")
        self.told.set_text(error if state == "failed" else "")
        self.stop.set_visibility(state in ("running", "stopping"))
        self.stop.set_text("Stop at once" if state == "stopping" else "Stop")
        self.stopping.set_visibility(state == "stopping")
        self.resume.set_visibility(resumable and state in ("stopped", "failed"))
        facts = {
            "step": f"{far.step:,} of {far.steps:,}" if far.steps else f"{far.step:,}",
            "loss": far.loss and f"{far.loss:.4f}",
            "validation loss": far.val_loss and f"{far.val_loss:.4f}",
            "tokens/s": far.tokens_per_second and f"{far.tokens_per_second:,.0f}",
            "left": duration(far.left) if far.left is not None and state == "running" else None,
            "blocks": self.run.layers,
        }
        told = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts.items() if value)
        self.facts.set_content(told)

    def _show_curves(self, found: tuple[Any, ...]) -> None:
        train, val = found
        draw(self.plot, [line("training", train, 0, False), line("validation", val, 1, True)])

    def _show_blocks(self, looks: dict[str, dict[str, float]]) -> None:
        self.looks.set_content(looks_html(looks, self.run.n_layer) or "Nothing was seen yet.")

    def _show_left(self, found: list[tuple[Left, bool, bool]]) -> None:
        self.left.clear()
        with self.left:
            if not found:
                ui.label("None yet.").classes("lf-hint")
            for left, merged, exported in found:
                with ui.element("div").classes("lf-row").style("padding: 4px 0"):
                    ui.label(left.name).style("min-width: 96px; font-weight: 600")
                    ui.label("only what trained" if left.partial else "whole").classes("lf-hint")
                    if left.partial:
                        self._button("Merge", left, "merge", left.merge()).set_enabled(not merged)
                    picture = str(self.run.folder / f"diff-{left.name}.png")
                    self._button("Diff", left, "diff", left.diff(picture))
                    self._button("Export", left, "export", left.export()).set_enabled(not exported)
                    chat = urlencode({"run": self.run.id, "checkpoint": left.name})
                    ui.button("Chat", on_click=lambda chat=chat: ui.navigate.to(f"/chat?{chat}")).props("outline dense")
                    places = [left.merged] * merged + [left.exported] * exported
                    ui.label(", ".join(places)).classes("lf-hint")

    def _button(self, label: str, left: Left, verb: str, words: list[str]) -> ui.button:
        async def act() -> None:
            try:
                await aside.io_bound(runs.act, self.run, f"{verb}-{left.name}", words)
            except UsageError as error:
                ui.notify(str(error))
            await self.look()

        button = ui.button(label, on_click=act).props("outline dense").mark(f"{verb}-{left.name}")
        return button.tooltip(shlex.join(["litfreeze", *words]))

    def _show_tasks(self, found: list[tuple[runs.Task, bool, str, bool]]) -> None:
        self.tasks.clear()
        with self.tasks:
            for i, (task, alive, log, picture) in enumerate(found):
                state = "running" if alive else "failed" if error_of(log) else "done"
                with ui.expansion(f"{task.name}: {state}", value=i == 0).props("dense").mark(f"task-{task.name}"):
                    frame.code(log, "lf-table")
                    if picture:
                        ui.image(f"/runs/{self.run.id}/{task.name}.png").props("fit=contain").style("max-width: 720px")

    def _show_log(self, log: str) -> None:
        self.log.set_text(log)
        ui.run_javascript(f"{{ const e = document.getElementById('c{self.log.id}'); e.scrollTop = e.scrollHeight }}")

    # ---- what a person does ----

    async def _stop(self) -> None:
        await aside.io_bound(runs.stop, self.run)
        await self.look()

    async def _resume(self) -> None:
        try:
            await aside.io_bound(runs.resume, self.run)
        except UsageError as error:
            ui.notify(str(error), type="negative")
        await self.look()

    async def _again(self) -> None:
        """The form, filled in with this run's options."""
        recipe = self.run.place / RECIPE
        if not recipe.is_file():
            ui.notify(f"{recipe.name} is not there yet.", type="negative")
            return
        ui.navigate.to(f"/?{urlencode({'run': self.run.id})}")
