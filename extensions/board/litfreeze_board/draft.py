"""The draft of a run: what is filled in, what of it goes into the command, and how it outlives its page."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Optional

from litfreeze.__main__ import COMMANDS
from litfreeze.errors import UsageError
from litfreeze.outputs import RECIPE
from litfreeze.whole import write_text
from litfreeze_board import runs
from litfreeze_board.options import Form, field_of

METHOD_COMMANDS = {name.removeprefix("finetune "): name for name in COMMANDS if name.startswith("finetune ")}
FIRST = {"trainable_layers": "-2:"}  # what a new draft has


class Draft:
    """Of one run in the folder `root`; at first a new one.

    Attributes:
        method: `full` or `lora`.
        values: An option's name and its text, whether or not the method that is chosen has that option.
        forms: Each method's.
        free: The folder that the next run of each method gets, if none is named; `find_free` finds them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / runs.STATE / "draft.json"
        self.forms = {method: Form(command) for method, command in METHOD_COMMANDS.items()}
        self.free: dict[str, str] = {}
        self.clear()

    def clear(self) -> None:
        """Begins again."""
        self.method, self.values = "full", dict(FIRST)

    # ---- what goes into the command ----

    @property
    def form(self) -> Form:
        return self.forms[self.method]

    def find_free(self) -> None:
        self.free = {method: runs.next_out_dir(self.root, method) for method in self.forms}

    def given(self, *without: str) -> dict[str, str]:
        """The options that the command has and that are filled in, with a folder of its own to write to; but for those
        named."""
        values = {name: text for name, text in self.values.items() if name in self.form.fields and text != ""}
        values = {"out_dir": self.free[self.method], **values}
        return {name: text for name, text in values.items() if name not in without}

    def line(self) -> str:
        """The command, as a shell takes it."""
        return self.form.line(self.given())

    def place_of(self, refusal: str) -> Optional[str]:
        """The option that a refusal is about, as far as its text tells."""
        return field_of(refusal, self.values, self.form.fields)

    # ---- from YAML, from a run, and as it was left ----

    def read(self, recipe: str) -> None:
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

    def read_run(self, number: str) -> None:
        """Takes the options of the run that has this number, as far as they can be read."""
        run = runs.read_run(self.root / runs.STATE / number)
        with suppress(OSError, UsageError):
            if run is not None:
                self.method = run.words[1]
                self.read((run.place / RECIPE).read_text(encoding="utf-8"))

    def keep(self) -> None:
        """Writes it, for the next page."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps({"method": self.method, "values": self.values}))

    def restore(self) -> None:
        """Takes what was kept, as far as it can be read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            known = {name for form in self.forms.values() for name in form.fields}
            values = {str(name): str(text) for name, text in kept["values"].items() if name in known}
            if kept["method"] in self.forms and not re.search("\0", repr(values)):
                self.method, self.values = kept["method"], values
