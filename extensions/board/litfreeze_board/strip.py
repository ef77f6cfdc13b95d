"""The strip: a model's parts to click and drag over, in step with the text of `--trainable_layers`.

The person's moves come with a number each, in order. The state that goes back says the last number it has seen, so that
the strip can tell whether the person has gone on since."""

from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from litfreeze.freeze.layers import GRAMMAR


class Strip(ui.element, component="strip.js"):
    """`on_move(text)` where the words were typed, `on_move(None, parts, on)` where parts were; `on_rate(part)`."""

    def __init__(self, on_move: Callable[..., Any], on_rate: Callable[[str], Any]) -> None:
        super().__init__()
        self.seen = 0
        self.open = ""  # what it means to leave the words out
        self.moved = on_move
        self._props["state"] = {"seen": 0, "text": "", "cells": [], "error": "", "hint": "", "open": ""}
        self.on("move", self._take)
        self.on("rate", lambda event: on_rate(event.args))

    def _take(self, event: GenericEventArguments) -> None:
        move = event.args
        self.seen = move["number"]
        self.moved(move.get("text"), move.get("parts", ()), move.get("on", False))

    def show(self, text: str, cells: Sequence[dict[str, Any]], error: str = "", told: str = "") -> None:
        """The words, the cells and, beneath them, a refusal or what the words come to."""
        hint = told or GRAMMAR
        state = {"seen": self.seen, "text": text, "cells": list(cells), "error": error, "hint": hint}
        self._props["state"] = {**state, "open": self.open}
        self.update()
