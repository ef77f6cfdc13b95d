"""A dialog for the learning rate of one part."""

from collections.abc import Callable
from typing import Any, Optional

from nicegui import ui

from litfreeze.errors import LitfreezeError
from litfreeze_board.draft import Draft
from litfreeze_board.helper import Helper
from litfreeze_board.pages import frame


def ask(part: str, now: Optional[float], draft: Draft, planner: Helper, on_set: Callable[[str], Any]) -> None:
    """Opens it for `part`, a block's number or an extra, which has the rate `now`. `on_set` gets the text of
    `--layer_lr` with the new one, for what trains as the draft has it then."""
    with ui.dialog() as dialog, ui.card().classes("lf-dialog"):
        title = f"block {part}" if part.isdecimal() else part
        ui.html(f"Learning rate of {title}", sanitize=True, tag="h2")
        entry = ui.input("rate", value="" if now is None else f"{now:.3g}").props("outlined dense autofocus")
        told = frame.refused()

        async def put(text: str) -> None:
            try:
                rates = await planner.call(
                    "set_rate",
                    text=draft.values.get("layer_lr", ""),
                    part=int(part) if part.isdecimal() else part,
                    rate=float(text) if text else None,
                    words=draft.form.words(draft.given("layer_lr")),
                )
            except (ValueError, LitfreezeError) as error:
                told.set_text(f"{text!r} is no number." if type(error) is ValueError else str(error))
                return
            dialog.close()
            on_set(rates)

        with ui.row().classes("lf-row"):
            ui.button("Set", on_click=lambda: put(entry.value.strip())).props("unelevated color=primary")
            ui.button("As the others", on_click=lambda: put("")).props("outline")
            ui.button("Cancel", on_click=dialog.close).props("flat")
        entry.on("keydown.enter", lambda: put(entry.value.strip()))
    dialog.on("hide", dialog.delete)
    dialog.open()
