"""The server: how it starts and ends."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Optional

from nicegui import app, ui

from litfreeze_board.board import Board
from litfreeze_board.guard import Guard
from litfreeze_board.helper import Helper
from litfreeze_board.pages import chat, frame, new, run, runs
from litfreeze_board.places import Root


def serve(root: Path, host: str, port: int, token: Optional[str], told: str) -> None:
    """Serves the pages until Ctrl-C."""
    for name in [name for name in os.environ if name.startswith("LITFREEZE_")]:
        del os.environ[name]  # they are this command's; what a page shows is the whole of what will run
    board = Board(Root(root), Helper(str(root)), Helper(str(root)))
    frame.shared()
    for page in (new, runs, run, chat):
        page.add(board)
    app.add_middleware(Guard, token=token, port=port)
    app.on_startup(lambda: print(told, flush=True))
    app.on_shutdown(board.planner.end)
    app.on_shutdown(board.ranker.end)
    with suppress(KeyboardInterrupt):  # is how it ends
        ui.run(
            host=host,
            port=port,
            title="litfreeze",
            favicon=str(Path(__file__).parent / "favicon.svg"),
            dark=None,
            tailwind=False,
            reload=False,
            show=False,
            show_welcome_message=False,
            reconnect_timeout=30,
        )
