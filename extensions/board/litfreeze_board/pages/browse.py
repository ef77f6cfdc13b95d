"""A dialog that lists folders and files inside of the root."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nicegui import run, ui

from litfreeze.errors import UsageError
from litfreeze_board.places import Root

ICONS = {"folder": "folder", "checkpoint": "layers", "data": "description", "file": "draft"}


class Browser:
    """Opens at the root. `wanted` is what may be chosen: "checkpoint" or "data" (a file, or a folder of them)."""

    def __init__(self, root: Root, wanted: str, chosen: Callable[[str], Any]) -> None:
        self.root, self.wanted, self.chosen = root, wanted, chosen
        self.folder = Path()
        with ui.dialog() as self.dialog, ui.card().classes("lf-dialog"):
            self.title = ui.label()
            self.list = ui.list().props("dense separator").style("width: 100%; max-height: 55vh; overflow: auto")
            with ui.row().classes("lf-row"):
                ui.button("Choose this folder", on_click=lambda: self._take(self.folder)).props("outline no-caps")
                ui.button("Close", on_click=self.dialog.close).props("flat no-caps")

    async def open(self) -> None:
        await self._show(Path())
        self.dialog.open()

    async def _show(self, folder: Path) -> None:
        try:
            entries = await run.io_bound(self.root.list, str(folder))
        except (UsageError, OSError) as error:
            ui.notify(str(error), type="negative")
            return
        self.folder = folder
        self.title.set_text(f"{self.root.path.name}/{'' if folder == Path() else folder}")
        self.list.clear()
        with self.list:
            if folder != Path():
                self._row("arrow_upward", "..", lambda: self._show(folder.parent))
            for entry in entries:
                place = folder / entry.name
                if entry.kind == "checkpoint" and self.wanted == "checkpoint":
                    self._row(ICONS[entry.kind], entry.name, lambda place=place: self._take(place))
                elif entry.kind in ("folder", "checkpoint"):
                    self._row(ICONS[entry.kind], entry.name, lambda place=place: self._show(place))
                elif entry.kind == self.wanted:
                    self._row(ICONS[entry.kind], entry.name, lambda place=place: self._take(place))

    def _row(self, icon: str, name: str, go: Callable[[], Any]) -> None:
        with ui.item(on_click=go).props("clickable"):
            with ui.item_section().props("avatar"):
                ui.icon(icon)
            with ui.item_section():
                ui.item_label(name)

    def _take(self, place: Path) -> None:
        self.dialog.close()
        self.chosen("." if place == Path() else str(place))
