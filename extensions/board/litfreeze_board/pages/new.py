"""The first page: from a model and data to a run, with all that it will do and cost in sight."""

import json
import re
from contextlib import suppress
from functools import partial
from typing import Any, Optional

from nicegui import background_tasks, ui
from nicegui import run as aside
from nicegui.events import UploadEventArguments

from litfreeze.__main__ import COMMANDS
from litfreeze.checkpoint.tensors import write_text
from litfreeze.choose.words import METHODS, has_ranks
from litfreeze.errors import LitfreezeError, UsageError
from litfreeze.freeze.layers import format_layers, parse_layers
from litfreeze.outputs import RECIPE
from litfreeze_board import figures, runs
from litfreeze_board.choice import Choice, cells
from litfreeze_board.options import Field, Form, field_of
from litfreeze_board.pages import frame
from litfreeze_board.pages.browse import Browser
from litfreeze_board.server import Board
from litfreeze_board.strip import Strip

METHOD_COMMANDS = {name.removeprefix("finetune "): name for name in COMMANDS if name.startswith("finetune ")}
IN_PLACE = ("checkpoint_dir", "data.path", "trainable_layers", "trainable_extra", "resume")  # have a place of their own
RATES = ("layer_lr", "lr_decay_by_depth")
TIMES = ("unfreeze", "lisa_layers", "lisa_interval")
EVERYDAY = (
    "train.lr", "train.epochs", "train.max_steps", "train.global_batch_size", "train.micro_batch_size",
    "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "data.max_seq_length", "data.val_path",
    "train.save_interval", "precision", "save", "task", "out_dir",
)  # fmt: skip
INSTEAD = ("unfreeze", "lisa_layers", "freeze_trainable_layers", "freeze_trainable_layers_ids", "trainable_modules")
FIRST = {"trainable_layers": "-2:"}  # what a new form has
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
    """One open page. What was filled in is in `values`, an option's name and its text, whether or not the method that
    is chosen has that option."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.method = "full"
        self.values: dict[str, str] = dict(FIRST)
        self.forms = {method: Form(command) for method, command in METHOD_COMMANDS.items()}
        self.free: dict[str, str] = {}
        self.choice = Choice()
        self.inputs: dict[str, Any] = {}
        self.model: Optional[dict[str, Any]] = None
        self.plan: Optional[dict[str, Any]] = None
        self.scores: list[float] = []
        self.best: list[int] = []
        self.refusal = ""
        self.wanted = self.done = 0  # plans
        self.planning = False
        self.client = ui.context.client

    @property
    def form(self) -> Form:
        return self.forms[self.method]

    @property
    def paths(self) -> set[str]:
        """The options that name a file or a folder."""
        return {name for name, field in self.form.fields.items() if field.path}

    def given(self) -> dict[str, str]:
        """What goes into the command: of the options that it has, with a folder of its own to write to."""
        values = {name: text for name, text in self.values.items() if name in self.form.fields and text != ""}
        return {"out_dir": self.free[self.method], **values}

    def _find_free(self) -> None:
        """The folder that the next run of each method gets, if none is named."""
        self.free = {method: runs.next_out_dir(self.board.root.path, method) for method in self.forms}

    # ---- what stands on the page ----

    async def build(self, run: str) -> None:
        """With the options of the run that has this number, or as it was left last."""
        await aside.io_bound(self._options_of, run) if run.isdecimal() else await aside.io_bound(self._restore)
        await aside.io_bound(self._find_free)
        with frame.section("Model & data"):
            with ui.element("div").classes("lf-pair"):
                self._picked("checkpoint_dir", "checkpoint", "the embedded demo model")
                self._picked("data.path", "data", "the embedded utterances")
            self.about = ui.label().classes("lf-hint")
        with frame.section("Layers"):
            with ui.element("div").classes("lf-row"):
                self.methods = ui.toggle(
                    {"full": "train the weights (full)", "lora": "train an adapter (lora)"},
                    value=self.method,
                    on_change=lambda event: self._switch(event.value),
                ).props('no-caps unelevated aria-label="Method"')
            self.strip = Strip(self._moved, self._ask_rate)
            with ui.element("div").classes("lf-row").style("margin: 8px 0"):
                self.ranked_by = ui.select(list(METHODS), value=METHODS[0], label="Suggest by").props("dense outlined")
                self.ranked_by.style("min-width: 130px")
                ui.button("Rank", on_click=self._suggest).props("outline")
                self.count = ui.number("best", value=2, min=1, format="%d").props("dense outlined").style("width: 80px")
                ui.button("Choose them", on_click=self._take_best).props("outline")
                self.rank_told = ui.label().classes("lf-hint")
            self.layer_fields = ui.element("div").classes("lf-grid")
        with frame.section("Plan"):
            self.told = frame.refused()
            self.waiting = ui.label("Counting …").classes("lf-hint")
            self.figures = ui.html("", sanitize=False).classes("w-full").mark("plan")
            self.data_told = ui.label().classes("lf-hint").style("white-space: pre-wrap; margin-top: 8px")
            with ui.expansion("Every part").props("dense"):
                self.table = frame.code(kind="lf-table")
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
        self._fill()
        self.changed()

    def _picked(self, name: str, kind: str, otherwise: str) -> None:
        """A path with a button that browses."""
        shown = "data" if name == "data.path" else name

        def chosen(text: str) -> None:
            self.inputs[name].set_value(text)

        browser = Browser(self.board.root, kind, chosen)
        entry = ui.input(shown, value=self.values.get(name, ""), placeholder=otherwise)
        entry.props("outlined dense stack-label clearable bottom-slots")
        entry.on_value_change(partial(self._typed, name))
        with entry.add_slot("append"):
            ui.button(icon="folder_open", on_click=browser.open).props(f'flat dense round aria-label="Browse: {shown}"')
        self.inputs[name] = entry

    def _fill(self) -> None:
        """The fields of the method that is chosen."""
        for name in [name for name in self.inputs if name not in ("checkpoint_dir", "data.path")]:
            del self.inputs[name]
        fields = self.form.fields
        self.layer_fields.clear()
        with self.layer_fields:
            for name in ("trainable_extra", *RATES, *TIMES):
                self._field(fields[name])
        self.options.clear()
        shown = {*IN_PLACE, *RATES, *TIMES}
        with self.options:
            with ui.element("div").classes("lf-grid"):
                for name in EVERYDAY:
                    if name in fields:
                        self._field(fields[name])
                        shown.add(name)
            for group, about in self.form.groups.items():
                rest = [field for field in fields.values() if field.group == group and field.name not in shown]
                if rest:
                    with ui.expansion(about).props("dense"), ui.element("div").classes("lf-grid"):
                        for field in rest:
                            self._field(field)

    def _field(self, field: Field) -> None:
        """One option: a switch, a choice or a text, with its help beneath."""
        value = self._value(field)
        if isinstance(value, bool):
            with ui.element("div"):
                entry = ui.switch(field.name, value=value).classes("lf-switch")
                ui.label(field.help).classes("lf-hint")
        elif field.choices:
            options = {"": field.default or "left open", **{c: c for c in field.choices if c != field.default}}
            entry = ui.select(options, label=field.name, value=value).props("outlined dense stack-label options-dense")
            entry.props["hint"] = field.help
        else:
            entry = ui.input(field.name, value=value, placeholder=field.default)
            entry.props("outlined dense stack-label spellcheck=false autocomplete=off")
            entry.props["hint"] = field.help
        entry.on_value_change(partial(self._typed, field.name))
        entry.mark(field.name)
        self.inputs[field.name] = entry

    def _value(self, field: Field) -> str | bool:
        """What an option's field shows: of a switch whether it is on, of a choice the default as an empty text."""
        value = self.values.get(field.name, "")
        if field.choices == ("true", "false") and field.default:
            return (value or field.default) == "true"
        return "" if field.choices and (value == field.default or value not in field.choices) else value

    # ---- what a person does ----

    def _typed(self, name: str, event: Any) -> None:
        value = event.value
        text = str(value).lower() if isinstance(value, bool) else str(value or "").strip()
        if self.values.get(name, "") != text:
            self.values[name] = text
            if name in ("checkpoint_dir", "base_dir"):
                self._forget_ranking()
            self.changed()

    def _moved(self, text: Optional[str], parts: list[str], on: bool) -> None:
        """On the strip, or in its text."""
        if text is not None:
            self.values["trainable_layers"] = text if text.strip() else ""
        else:
            self.choice.put(parts, on)
            self.values["trainable_layers"] = self.choice.layers
            self._set("trainable_extra", self.choice.extra)
        self.changed()

    def _set(self, name: str, text: str) -> None:
        """Puts a text in a field, as if it had been typed."""
        self.values[name] = text
        if name in self.inputs and self.inputs[name].value != text:
            self.inputs[name].set_value(text)

    def _switch(self, method: str) -> None:
        self.method = method
        self._fill()
        self.changed()

    def _ask_rate(self, part: str) -> None:
        """A dialog for the learning rate of one part."""
        now = (self.plan or {}).get("parts", {}).get(part, {}).get("rates", [])
        title = f"block {part}" if part.isdecimal() else part
        with self.client, ui.dialog() as dialog, ui.card().classes("lf-dialog"):
            ui.html(f"Learning rate of {title}", sanitize=True, tag="h2")
            entry = ui.input("rate", value=f"{now[0]:.3g}" if now else "").props("outlined dense autofocus")
            told = frame.refused()

            async def put(text: str) -> None:
                try:
                    rate = float(text) if text else None
                    rates = await self.board.planner.call(
                        "set_rate",
                        text=self.values.get("layer_lr", ""),
                        part=int(part) if part.isdecimal() else part,
                        rate=rate,
                        words=self.form.words({k: v for k, v in self.given().items() if k != "layer_lr"}),
                    )
                except (ValueError, LitfreezeError) as error:
                    told.set_text(f"{text!r} is no number." if type(error) is ValueError else str(error))
                    return
                dialog.close()
                self._set("layer_lr", rates)
                self.changed()

            with ui.row().classes("lf-row"):
                ui.button("Set", on_click=lambda: put(entry.value.strip())).props("unelevated color=primary")
                ui.button("As the others", on_click=lambda: put("")).props("outline")
                ui.button("Cancel", on_click=dialog.close).props("flat")
            entry.on("keydown.enter", lambda: put(entry.value.strip()))
        dialog.on("hide", dialog.delete)
        dialog.open()

    async def _suggest(self) -> None:
        method = self.ranked_by.value
        self.rank_told.set_text(f"Ranking by {method} …")
        found = await self._rank(method)
        if found is None:
            return
        self.scores = found["scores"]
        self._mark_best()
        self.rank_told.set_text(f"by {method}: {', '.join(map(str, self.best))}")
        self._show_strip()

    async def _rank(self, method: str) -> Optional[dict[str, Any]]:
        """The ranking, made once for a model, data and seed. None, and the refusal told, if there is none."""
        key = self._rank_key(method)
        if key not in self.board.rankings:
            values = {name: text for name, text in self.given().items() if name not in ("trainable_layers", "out_dir")}
            try:
                await aside.io_bound(self.board.root.check, values, self.paths)
                words = self.form.words(values)
                self.board.rankings[key] = await self.board.ranker.call("rank", words=words, method=method)
            except LitfreezeError as error:
                self.rank_told.set_text(str(error))
                return None
        return self.board.rankings[key]

    def _rank_key(self, method: str) -> tuple[Any, ...]:
        """All that a ranking depends on, as far as a form tells it."""
        of = ("checkpoint_dir", "base_dir", "task", "seed", "train.micro_batch_size", "accelerator", "precision")
        named = [(n, t) for n, t in sorted(self.values.items()) if t and (n in of or n.startswith("data."))]
        return (method, *named)

    def _mark_best(self) -> None:
        order = sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))
        self.best = sorted(order[: int(self.count.value or 1)])

    def _forget_ranking(self) -> None:
        self.scores, self.best = [], []
        self.rank_told.set_text("")

    async def _take_best(self) -> None:
        if not self.scores:
            await self._suggest()
        if self.scores:
            self._mark_best()
            self.values["trainable_layers"] = format_layers(self.best)
            self.changed()

    def _copy(self) -> None:
        ui.run_javascript(COPY % json.dumps(self.form.line(self.given())))
        ui.notify("Copied.", timeout=1500)

    async def _save(self) -> None:
        try:
            text = await aside.io_bound(self.form.recipe, self.given())
        except UsageError as error:
            self._refuse(str(error))
            return
        ui.download.content(text, "recipe.yaml")

    async def _load(self, event: UploadEventArguments) -> None:
        self.upload.reset()
        try:
            text = (await event.file.read()).decode("utf-8")
            self._read_recipe(text)
            self._show_all()
        except UnicodeDecodeError:
            self._refuse("The file is not UTF-8 text.")
        except UsageError as error:
            self._refuse(f"{event.file.name}: {error}")

    def _read_recipe(self, recipe: str) -> None:
        """Takes the options that stand in YAML, as `--config` would, with the other method if only that has them.
        Raises UsageError if neither does."""
        try:
            self.values = self.form.values(recipe)
        except UsageError:
            for method in self.forms:
                with suppress(UsageError):
                    self.values, self.method = self.forms[method].values(recipe), method
                    return
            raise

    def _clear(self) -> None:
        self.method, self.values = "full", dict(FIRST)
        self._show_all()

    def _show_all(self) -> None:
        """Shows what is in `values` in the fields that are there: new ones would lose what is just being typed."""
        self.methods.set_value(self.method)  # which brings its own fields, if it is another
        for name, entry in self.inputs.items():
            entry.set_value(self._value(self.form.fields[name]))
        self._forget_ranking()
        self.changed()

    async def _start(self) -> None:
        """Starts the command that is shown, unless the plan refuses it."""
        self.start.disable()
        await aside.io_bound(self._find_free)
        values = self.given()
        words = self.form.words(values)
        found = await self._planned(values, words)
        if "plan" not in found:
            self._take(found)
            self.start.enable()
            return
        plan = found["plan"]
        where = self.board.root.path
        about = plan["steps"], plan["layers"], found["model"]["n_layer"]
        run = await aside.io_bound(runs.start, where, words, values["out_dir"], *about)
        ui.navigate.to(f"/runs/{run.id}")

    # ---- what follows from it ----

    def changed(self) -> None:
        """Something was chosen: what is light follows at once, the plan as soon as it is counted."""
        self._show_strip()
        self.command.set_text(self.form.line(self.given()))
        self.wanted += 1
        if not self.planning:
            self.planning = True
            background_tasks.create(self._count())

    def _show_strip(self) -> None:
        model, choice = self.model, self.choice
        if model is None:
            self.strip.show(self.values.get("trainable_layers", ""), [], told="")
            return
        choice.n_layer, choice.new = model["n_layer"], model["new"]
        named = any(self.values.get(name) for name in INSTEAD)
        choice.elsewhere = self.method != "full" or named
        classifies = self.values.get("task") == "classification" or model["classes"] > 0
        choice.always = frozenset(["head"] if classifies else [])
        self.strip.open = "left open: everything" if not choice.elsewhere else "left open: as the other options say"
        choice.layers = self.values.get("trainable_layers", "")
        choice.extra = self.values.get("trainable_extra", "")
        wrong = choice.read()
        self._blocks_of_plan()
        parts = (self.plan or {}).get("parts", {})
        tied = model["tied"] and self.values.get("untie_embeddings") != "true"
        on_strip = wrong or (self.refusal if self._place_of_refusal() == "trainable_layers" else "")
        told = f"blocks {format_layers(choice.blocks)}" if choice.layers and not wrong else ""
        self.strip.show(choice.layers, cells(choice, tied, parts, self.scores, self.best), on_strip, told)

    def _blocks_of_plan(self) -> None:
        """Which blocks a ranking or a timeline means, the plan alone knows."""
        with suppress(UsageError):
            other = self.choice.elsewhere and not self.choice.layers
            if self.plan is not None and (other or (self.choice.layers and has_ranks(self.choice.layers))):
                self.choice.blocks = set(parse_layers(self.plan["layers"], self.choice.n_layer))

    async def _count(self) -> None:
        """Plans until the plan is that of what stands there."""
        try:
            with self.client:
                while self.done != self.wanted:
                    now = self.wanted
                    self.waiting.set_visibility(True)
                    values = self.given()
                    found = await self._planned(values, self.form.words(values))
                    self.done = now
                    if now == self.wanted:
                        self._take(found)
                    await aside.io_bound(self._keep)
        finally:
            self.planning = False
            self.waiting.set_visibility(False)

    async def _planned(self, values: dict[str, str], words: list[str]) -> dict[str, Any]:
        """What plan.plan says, with rankings made that the words name."""
        where = {"checkpoint": values.get("checkpoint_dir"), "base": values.get("base_dir")}
        try:
            try:
                await aside.io_bound(self.board.root.check, values, self.paths)
            except UsageError as error:
                await aside.io_bound(self.board.root.check, values, {"checkpoint_dir", "base_dir"})
                found = await self.board.planner.call("plan", words=None, **where, rankings={})
                return {"refused": str(error), **found}
            rankings: dict[str, Any] = {}
            while True:
                found = await self.board.planner.call("plan", words=words, **where, rankings=rankings)
                if not found.get("unranked"):
                    return found
                for method in found["unranked"]:
                    self.waiting.set_text(f"Ranking by {method} …")
                    ranking = await self._rank(method)
                    if ranking is None:
                        return {"model": found["model"], "refused": self.rank_told.text}
                    rankings[method] = ranking
                self.waiting.set_text("Counting …")
        except LitfreezeError as error:
            return {"model": self.model, "refused": str(error)}

    def _take(self, found: dict[str, Any]) -> None:
        """Shows a plan, or the refusal."""
        model = found["model"]
        if model is not None and (self.model is None or model["n_layer"] != self.model["n_layer"]):
            self.count.set_value(max(1, model["n_layer"] // 4))
        if model is not None:
            self.model = model
            about = [f"{model['name']}: {model['n_layer']} blocks"]
            about += [f"new blocks {format_layers(model['new'])}"] if model["new"] else []
            about += [model["adapter"]] if model["adapter"] else []
            about += [f"a classifier of {model['classes']} classes"] if model["classes"] else []
            self.about.set_text(", ".join(about))
        self.plan = found.get("plan")
        if self.plan is not None:
            self.figures.set_content(figures.plan_html(self.plan))
            self.data_told.set_text("\n".join([self.plan["data"], *found["notes"]]))
            self.table.set_text(self.plan["table"])
            self.inputs["train.lr"].props["placeholder"] = f"{self.plan['lr']:g}"
            self.inputs["out_dir"].props["placeholder"] = self.free[self.method]
        self.figures.classes(remove="lf-old") if self.plan else self.figures.classes(add="lf-old")
        at = "" if model is not None else "checkpoint_dir"
        self._refuse(found.get("refused", ""), at)
        self._show_strip()

    def _place_of_refusal(self) -> Optional[str]:
        return field_of(self.refusal, self.values, self.form.fields) if self.refusal else None

    def _refuse(self, text: str, place: str = "") -> None:
        """Tells a refusal in the plan and beside the field that it is about; none with an empty text."""
        self.refusal = text
        self.told.set_text(text)
        place = place or self._place_of_refusal() or ""
        for name, entry in self.inputs.items():
            wrong = text if text and name == place else None
            if hasattr(entry, "error") and entry.error != wrong:
                entry.error = wrong

    # ---- a form outlives its page ----

    def _keep(self) -> None:
        self.board.draft.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.board.draft, json.dumps({"method": self.method, "values": self.values}))

    def _options_of(self, number: str) -> None:
        run = runs.read_run(self.board.root.path / runs.STATE / number)
        with suppress(OSError, UsageError):
            if run is not None:
                self.method = run.words[1]
                self._read_recipe((run.place / RECIPE).read_text(encoding="utf-8"))

    def _restore(self) -> None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            draft = json.loads(self.board.draft.read_text(encoding="utf-8"))
            known = {name for form in self.forms.values() for name in form.fields}
            values = {str(name): str(text) for name, text in draft["values"].items() if name in known}
            if draft["method"] in self.forms and not re.search("\0", repr(values)):
                self.method, self.values = draft["method"], values
