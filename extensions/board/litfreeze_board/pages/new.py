"""The first page: from a model and data to a run, with all that it will do and cost in sight."""

import json
from typing import Any, Optional

from nicegui import background_tasks, ui
from nicegui import run as aside
from nicegui.events import UploadEventArguments

from litfreeze.errors import LitfreezeError, UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze_board import runs
from litfreeze_board.board import Board
from litfreeze_board.draft import Draft
from litfreeze_board.pages import frame
from litfreeze_board.pages.fields import Fields
from litfreeze_board.pages.layers import Layers
from litfreeze_board.pages.planned import Planned
from litfreeze_board.pages.suggest import Suggest

COPY = """(async () => {
  const text = %s;
  try { await navigator.clipboard.writeText(text); }
  catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
})()"""


def add(board: Board) -> None:
    """The page `/`."""

    @ui.page("/")
    async def new(run: str = "") -> None:
        with frame.page(board.root, "New run"):
            await NewRun(board).build(run)


class NewRun:
    """One open page. What a person does goes into the draft, and ends in `changed`: from there come the strip, the
    command and, as soon as it is counted, the plan."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.draft = Draft(board.root.path)
        self.fields = Fields(self.draft, self._typed)
        self.model: Optional[dict[str, Any]] = None  # of the last answer of plan.plan that had one
        self.plan: Optional[dict[str, Any]] = None  # of the last answer
        self.refusal = ""
        self.wanted = self.done = 0  # plans
        self.planning = False
        self.client = ui.context.client

    # ---- what stands on the page ----

    async def build(self, run: str) -> None:
        """With the options of the run that has this number, or as it was left last."""
        await aside.io_bound(self.draft.read_run, run) if run.isdecimal() else await aside.io_bound(self.draft.restore)
        await aside.io_bound(self.draft.find_free)
        with frame.section("Model & data"):
            with ui.element("div").classes("lf-pair"):
                self.fields.pick("checkpoint_dir", self.board.root, "checkpoint", "the embedded demo model")
                self.fields.pick("data.path", self.board.root, "data", "the embedded utterances")
            self.about = ui.label().classes("lf-hint")
        with frame.section("Layers"):
            with ui.element("div").classes("lf-row"):
                self.methods = ui.toggle(
                    {"full": "train the weights (full)", "lora": "train an adapter (lora)"},
                    value=self.draft.method,
                    on_change=lambda event: self._switch(event.value),
                ).props('no-caps unelevated aria-label="Method"')
            self.layers = Layers(self.draft, self.board.planner, self.fields.put, self.changed)
            self.suggest = Suggest(self.board, self.draft, self._show_strip, self._take_best)
            self.beneath_strip = ui.element("div").classes("lf-grid")
        with frame.section("Plan"):
            self.planned = Planned()
        with frame.section("Options"):
            self.options = ui.element("div").style("width: 100%")
        with frame.section("Command"):
            self.command = frame.code().mark("command")
            with ui.element("div").classes("lf-row").style("margin-top: 10px"):
                self.start = ui.button("Start", on_click=self._start).props("unelevated color=primary")
                ui.button("Copy", on_click=self._copy).props("outline")
                ui.button("Save YAML", on_click=self._save).props("outline")
                ui.button("Load YAML", on_click=lambda: self.upload.run_method("pickFiles")).props("outline")
                ui.button("Begin again", on_click=self._clear).props("flat")
            self.upload = ui.upload(on_upload=self._load, auto_upload=True, max_file_size=10**6)
            self.upload.props('accept=".yaml,.yml"').classes("hidden")
        self.fields.fill(self.beneath_strip, self.options)
        self.changed()

    # ---- what a person does ----

    def _typed(self, name: str) -> None:
        if name in ("checkpoint_dir", "base_dir"):
            self.suggest.forget()
        self.changed()

    def _switch(self, method: str) -> None:
        self.draft.method = method
        self.fields.fill(self.beneath_strip, self.options)
        self.changed()

    def _take_best(self, layers: str) -> None:
        self.fields.put("trainable_layers", layers)
        self.changed()

    async def _start(self) -> None:
        """Starts the command that is shown, unless the plan refuses it."""
        self.start.disable()
        await aside.io_bound(self.draft.find_free)
        values = self.draft.given()
        words = self.draft.form.words(values)
        found = await self._planned(values, words)
        if "plan" not in found:
            self._take(found)
            self.start.enable()
            return
        plan = found["plan"]
        about = plan["steps"], plan["layers"], found["model"]["n_layer"]
        try:
            run = await aside.io_bound(runs.start, self.board.root.path, words, values["out_dir"], *about)
        except OSError as error:  # a full disk, a folder that takes no files
            self._refuse(f"The run could not be started: {error}.")
            self.start.enable()
            return
        ui.navigate.to(f"/runs/{run.id}")

    def _copy(self) -> None:
        ui.run_javascript(COPY % json.dumps(self.draft.line()))
        ui.notify("Copied.", timeout=1500)

    async def _save(self) -> None:
        try:
            text = await aside.io_bound(self.draft.form.recipe, self.draft.given())
        except UsageError as error:
            self._refuse(str(error))
            return
        ui.download.content(text, "recipe.yaml")

    async def _load(self, event: UploadEventArguments) -> None:
        self.upload.reset()
        try:
            self.draft.read((await event.file.read()).decode("utf-8"))
            self._show_draft()
        except UnicodeDecodeError:
            self._refuse("The file is not UTF-8 text.")
        except UsageError as error:
            self._refuse(f"{event.file.name}: {error}")

    def _clear(self) -> None:
        self.draft.clear()
        self._show_draft()

    def _show_draft(self) -> None:
        """After it has become another."""
        self.methods.set_value(self.draft.method)  # which brings its own fields, if it is another
        self.fields.show()
        self.suggest.forget()
        self.changed()

    # ---- what follows from it ----

    def changed(self) -> None:
        """Something was chosen: what is light follows at once, the plan as soon as it is counted."""
        self._show_strip()
        self.command.set_text(self.draft.line())
        self.wanted += 1
        if not self.planning:
            self.planning = True
            background_tasks.create(self._count())

    def _show_strip(self) -> None:
        self.layers.show(self.model, self.plan, self.refusal, self.suggest.scores, self.suggest.best)

    async def _count(self) -> None:
        """Plans until the plan is that of what stands there."""
        waiting = self.planned.waiting
        try:
            with self.client:
                while self.done != self.wanted:
                    now = self.wanted
                    waiting.set_visibility(True)
                    values = self.draft.given()
                    found = await self._planned(values, self.draft.form.words(values))
                    self.done = now
                    if now == self.wanted:
                        self._take(found)
                    await aside.io_bound(self.draft.keep)
        finally:
            self.planning = False
            waiting.set_visibility(False)

    async def _planned(self, values: dict[str, str], words: list[str]) -> dict[str, Any]:
        """What plan.plan says, with rankings made that the words name."""
        plan, check, waiting = self.board.planner.call, self.board.root.check, self.planned.waiting
        where = {"checkpoint": values.get("checkpoint_dir"), "base": values.get("base_dir")}
        try:
            try:
                await aside.io_bound(check, values, self.draft.form.paths)
            except UsageError as error:
                await aside.io_bound(check, values, {"checkpoint_dir", "base_dir"})
                return {"refused": str(error), **await plan("plan", words=None, **where, rankings={})}
            rankings: dict[str, Any] = {}
            while True:
                found = await plan("plan", words=words, **where, rankings=rankings)
                if not found.get("unranked"):
                    return found
                for method in found["unranked"]:
                    waiting.set_text(f"Ranking by {method} …")
                    ranking = await self.suggest.ranking(method)
                    waiting.set_text("Counting …")
                    if ranking is None:
                        return {"model": found["model"], "refused": self.suggest.told.text}
                    rankings[method] = ranking
        except LitfreezeError as error:
            return {"model": self.model, "refused": str(error)}

    def _take(self, found: dict[str, Any]) -> None:
        """Shows a plan, or the refusal."""
        model = found["model"]
        if model is not None and (self.model is None or model["n_layer"] != self.model["n_layer"]):
            self.suggest.resize(model["n_layer"])
        if model is not None:
            self.model = model
            about = [f"{model['name']}: {model['n_layer']} blocks"]
            about += [f"new blocks {format_layers(model['new'])}"] if model["new"] else []
            about += [model["adapter"]] if model["adapter"] else []
            about += [f"a classifier of {model['classes']} classes"] if model["classes"] else []
            self.about.set_text(", ".join(about))
        self.plan = found.get("plan")
        self.planned.show(self.plan, found.get("notes", ()))
        if self.plan is not None:
            self.fields.hint("train.lr", f"{self.plan['lr']:g}")
            self.fields.hint("out_dir", self.draft.free[self.draft.method])
        self._refuse(found.get("refused", ""), "" if model is not None else "checkpoint_dir")
        self._show_strip()

    def _refuse(self, text: str, place: str = "") -> None:
        """Tells a refusal in the plan and beside the field that it is about; none with an empty text."""
        self.refusal = text
        self.planned.told.set_text(text)
        self.fields.refuse(text, place or self.draft.place_of(text) or "")
