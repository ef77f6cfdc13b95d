"""Two checkpoints asked the same, side by side: what a run began from, and what it made of it."""

import asyncio
from typing import Any

from nicegui import run as aside
from nicegui import ui

from litfreeze.demo import MODEL_DIR
from litfreeze.errors import LitfreezeError
from litfreeze_board import runs
from litfreeze_board.board import Board
from litfreeze_board.helper import Helper
from litfreeze_board.pages import frame
from litfreeze_board.pages.browse import Browser
from litfreeze_board.results import left_by


def add(board: Board) -> None:
    """The page `/chat`, which may name a run and one of its checkpoints."""

    @ui.page("/chat")
    async def chat(run: str = "", checkpoint: str = "") -> None:
        with frame.page(board.root, "Chat"):
            await Chat(board).build(run, checkpoint)


class Side:
    """One checkpoint, its half of the page and its process, which ends with the page."""

    def __init__(self, board: Board, label: str, place: str, trusted: str) -> None:
        self.board, self.trusted = board, trusted
        self.helper = Helper(str(board.root.path))
        self.messages: list[dict[str, str]] = []
        with ui.element("div").classes("lf-side"):
            browser = Browser(board.root, "checkpoint", lambda text: self.place.set_value(text))
            self.place = ui.input(label, value=place, placeholder="the embedded demo model", on_change=self.clear)
            self.place.props("dense outlined stack-label").classes("w-full")
            with self.place.add_slot("append"):
                ui.button(icon="folder_open", on_click=browser.open).props(
                    f'flat dense round aria-label="Browse: {label}"'
                )
            self.told = frame.refused()
            self.talk = ui.element("div").style("margin-top: 12px").props("aria-live=polite").mark(label)

    def clear(self) -> None:
        """A conversation from its beginning."""
        self.messages = []
        self.talk.clear()
        self.told.set_text("")

    async def ask(self, question: str, history: bool, tokens: int, temperature: float) -> None:
        """Writes the answer as it comes."""
        self.told.set_text("")
        place = self.place.value.strip()
        with self.talk:
            ui.label(question).classes("lf-said lf-said-user")
            said = ui.label("…").classes("lf-said")
        messages = [*(self.messages if history else []), {"role": "user", "content": question}]
        text = ""
        try:
            if place and place != self.trusted:
                there = self.board.root.inside(place, "checkpoint_dir")
                place = str(there) if there.exists() else place  # else a name on the Hub
            asked = {"checkpoint": place or None, "max_new_tokens": tokens, "temperature": temperature}
            async for kind, piece in self.helper.lines("answer", messages=messages, **asked):
                if kind == "piece":
                    text += piece
                    said.set_text(text)
            said.set_text(text or "(nothing)")
            self.messages = [*messages, {"role": "assistant", "content": text}]
        except LitfreezeError as error:
            said.set_text(text)
            self.told.set_text(str(error))


class Chat:
    """One open page."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.sides: list[Side] = []

    async def build(self, run: str, checkpoint: str) -> None:
        base, tuned, trusted = await aside.io_bound(self._places, run, checkpoint)
        with frame.section("Chat"):
            with ui.element("div").classes("lf-row"):
                self.tokens = ui.number("max_new_tokens", value=64, min=1, format="%d").props("dense outlined")
                self.warmth = ui.number("temperature", value=0, min=0, step=0.1).props("dense outlined")
                self.history = ui.switch("with what was said before", value=True)
                ui.button("Begin again", on_click=self._clear).props("flat")
            with ui.element("div").classes("lf-sides").style("margin: 10px 0"):
                self.sides = [
                    Side(self.board, "base", base, trusted),
                    Side(self.board, "tuned", tuned, trusted),
                ]
            with ui.element("div").classes("lf-row"):
                self.question = ui.input("Ask both").props("outlined dense").style("flex: 1 1 220px").mark("question")
                self.question.on("keydown.enter", self._ask)
                self.send = ui.button("Ask", on_click=self._ask).props("unelevated color=primary")
                self.stop = ui.button("Stop", on_click=self._end).props("outline")
                self.stop.set_visibility(False)
        ui.context.client.on_delete(self._end)

    def _places(self, number: str, checkpoint: str) -> tuple[str, str, str]:
        """The base, the checkpoint, and which path outside of the root a run itself has named."""
        found = [run for run in runs.all_runs(self.board.root.path) if run.id == number or not number]
        for run in found:
            for left in left_by(run):
                if not checkpoint or left.name == checkpoint:
                    base = "" if left.base == str(MODEL_DIR) else left.base
                    return base, left.place, base
        return "", "", ""

    async def _ask(self) -> None:
        question = (self.question.value or "").strip()
        if not question or self.stop.visible:
            return
        self.question.set_value("")
        self.send.set_visibility(False)
        self.stop.set_visibility(True)
        how = self.history.value, int(self.tokens.value or 64), float(self.warmth.value or 0)
        try:
            await asyncio.gather(*(side.ask(question, *how) for side in self.sides))
        finally:
            self.send.set_visibility(True)
            self.stop.set_visibility(False)

    def _end(self, *_: Any) -> None:
        for side in self.sides:
            side.helper.end()

    def _clear(self) -> None:
        for side in self.sides:
            side.clear()
