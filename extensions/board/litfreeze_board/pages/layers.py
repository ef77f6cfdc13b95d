"""The strip on the page: what it shows of a draft, its plan and a ranking, and what a move on it fills in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from nicegui import ui

from litfreeze.freeze.layers import format_layers
from litfreeze_board.choice import Choice, cells
from litfreeze_board.draft import Draft
from litfreeze_board.helper import Helper
from litfreeze_board.pages import rate
from litfreeze_board.strip import Strip


class Layers:
    """`put(name, text)` fills in an option; `on_move()` comes once all of a move is filled in."""

    def __init__(
        self, draft: Draft, planner: Helper, put: Callable[[str, str], Any], on_move: Callable[[], Any]
    ) -> None:
        self.draft, self.planner = draft, planner
        self.put, self.on_move = put, on_move
        self.choice = Choice()
        self.parts: Mapping[str, Any] = {}  # what the last plan says of each
        self.client = ui.context.client
        self.strip = Strip(self._moved, self._ask_rate)

    def show(
        self,
        model: Optional[Mapping[str, Any]],
        plan: Optional[Mapping[str, Any]],
        refusal: str,
        scores: Sequence[float],
        best: Sequence[int],
    ) -> None:
        """The draft's words, and the cells of a model, a plan and a ranking, as far as there is one. The refusal stands
        here too if it is about these words."""
        words = self.draft.values.get("trainable_layers", "")
        self.parts = plan["parts"] if plan is not None else {}
        if model is None:
            self.strip.show(words, [])
            return
        choice, values = self.choice, self.draft.values
        wrong = choice.follow(model, self.draft.method, values)
        if plan is not None:
            choice.follow_plan(plan["layers"])
        self.strip.open = "left open: as the other options say" if choice.elsewhere else "left open: everything"
        tied = model["tied"] and values.get("untie_embeddings") != "true"
        error = wrong or (refusal if self.draft.place_of(refusal) == "trainable_layers" else "")
        told = f"blocks {format_layers(choice.blocks)}" if words and not wrong else ""
        self.strip.show(words, cells(choice, tied, self.parts, scores, best), error, told)

    def _moved(self, text: Optional[str], parts: list[str], on: bool) -> None:
        """On the strip, or in its text."""
        if text is not None:
            self.put("trainable_layers", text if text.strip() else "")
        else:
            self.choice.put(parts, on)
            self.put("trainable_layers", self.choice.layers)
            self.put("trainable_extra", self.choice.extra)
        self.on_move()

    def _ask_rate(self, part: str) -> None:
        now = self.parts.get(part, {}).get("rates", [])
        with self.client:
            rate.ask(part, now[0] if now else None, self.draft, self.planner, self._set_rates)

    def _set_rates(self, text: str) -> None:
        self.put("layer_lr", text)
        self.on_move()
