"""The fields of a form: which there are and where, what they show, and a refusal beside the one that it is about."""

from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui
from nicegui.events import ValueChangeEventArguments

from litfreeze_board.draft import Draft
from litfreeze_board.options import Field
from litfreeze_board.pages.browse import Browser
from litfreeze_board.places import Root

PICKED = ("checkpoint_dir", "data.path")  # whatever the method is
ELSEWHERE = ("trainable_layers", "resume")  # on the strip; on the page of a run
BENEATH_STRIP = ("trainable_extra", "layer_lr", "lr_decay_by_depth", "unfreeze", "lisa_layers", "lisa_interval")
EVERYDAY = (
    "train.lr", "train.epochs", "train.max_steps", "train.global_batch_size", "train.micro_batch_size",
    "lora_r", "lora_alpha", "lora_dropout", "lora_targets", "data.max_seq_length", "data.val_path",
    "train.save_interval", "precision", "save", "task", "out_dir",
)  # fmt: skip


class Fields:
    """Those of a draft, by the names of their options. What is typed in one goes into the draft and, if it is
    another text than was there, on to `on_typed(name)`."""

    def __init__(self, draft: Draft, on_typed: Callable[[str], Any]) -> None:
        self.draft, self.on_typed = draft, on_typed
        self.entries: dict[str, Any] = {}

    # ---- which there are ----

    def pick(self, name: str, root: Root, kind: str, otherwise: str) -> None:
        """A path with a button that browses `root` for a `kind`, as Browser has it."""
        shown = "data" if name == "data.path" else name
        browser = Browser(root, kind, lambda text: self.entries[name].set_value(text))
        entry = ui.input(shown, value=self.draft.values.get(name, ""), placeholder=otherwise)
        entry.props("outlined dense stack-label clearable bottom-slots")
        entry.on_value_change(partial(self._typed, name))
        with entry.add_slot("append"):
            ui.button(icon="folder_open", on_click=browser.open).props(f'flat dense round aria-label="Browse: {shown}"')
        self.entries[name] = entry

    def fill(self, beneath_strip: ui.element, options: ui.element) -> None:
        """Puts the other fields of the draft's method in their two places, instead of those that are there."""
        self.entries = {name: entry for name, entry in self.entries.items() if name in PICKED}
        form = self.draft.form
        beneath_strip.clear()
        with beneath_strip:
            for name in BENEATH_STRIP:
                self._add(form.fields[name])
        options.clear()
        placed = {*PICKED, *ELSEWHERE, *BENEATH_STRIP, *EVERYDAY}
        with options:
            with ui.element("div").classes("lf-grid"):
                for name in EVERYDAY:
                    if name in form.fields:
                        self._add(form.fields[name])
            for group, about in form.groups.items():
                rest = [field for field in form.fields.values() if field.group == group and field.name not in placed]
                if rest:
                    with ui.expansion(about).props("dense"), ui.element("div").classes("lf-grid"):
                        for field in rest:
                            self._add(field)

    def _add(self, field: Field) -> None:
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
        self.entries[field.name] = entry

    # ---- what they hold ----

    def _typed(self, name: str, event: ValueChangeEventArguments) -> None:
        value = event.value
        text = str(value).lower() if isinstance(value, bool) else str(value or "").strip()
        if self.draft.values.get(name, "") != text:
            self.draft.values[name] = text
            self.on_typed(name)

    def _value(self, field: Field) -> str | bool:
        """What an option's field shows: of a switch whether it is on, of a choice the default as an empty text."""
        value = self.draft.values.get(field.name, "")
        if field.choices == ("true", "false") and field.default:
            return (value or field.default) == "true"
        return "" if field.choices and (value == field.default or value not in field.choices) else value

    def show(self) -> None:
        """Shows the draft in the fields that are there: new ones would lose what is just being typed."""
        for name, entry in self.entries.items():
            entry.set_value(self._value(self.draft.form.fields[name]))

    def put(self, name: str, text: str) -> None:
        """Puts a text in the draft and in its field, if that is there, with no call of `on_typed`."""
        self.draft.values[name] = text
        if name in self.entries and self.entries[name].value != text:
            self.entries[name].set_value(text)

    def hint(self, name: str, text: str) -> None:
        """What holds if this field stays empty."""
        self.entries[name].props["placeholder"] = text

    def refuse(self, text: str, place: str) -> None:
        """Tells a refusal beside the field `place` alone; with an empty text there is none any more."""
        for name, entry in self.entries.items():
            wrong = text if text and name == place else None
            if hasattr(entry, "error") and entry.error != wrong:
                entry.error = wrong
