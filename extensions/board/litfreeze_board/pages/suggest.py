"""The row that suggests blocks: ranks them by a method, marks the best, chooses these."""

from collections.abc import Callable
from typing import Any, Optional

from nicegui import run as aside
from nicegui import ui

from litfreeze.choose.words import METHODS
from litfreeze.errors import LitfreezeError
from litfreeze.freeze.layers import format_layers
from litfreeze_board.board import Board
from litfreeze_board.draft import Draft

# a ranking depends on these and on the data, as far as a form tells it
BEHIND = ("checkpoint_dir", "base_dir", "task", "seed", "train.micro_batch_size", "accelerator", "precision")


class Suggest:
    """`on_rank()` after the blocks were ranked, `on_take(layers)` with the words for the best of them.

    Attributes:
        scores: Each block's; empty before there is a ranking.
        best: The blocks that have the highest, ascending.
    """

    def __init__(self, board: Board, draft: Draft, on_rank: Callable[[], Any], on_take: Callable[[str], Any]) -> None:
        self.board, self.draft = board, draft
        self.on_rank, self.on_take = on_rank, on_take
        self.scores: list[float] = []
        self.best: list[int] = []
        with ui.element("div").classes("lf-row").style("margin: 8px 0"):
            self.method = ui.select(list(METHODS), value=METHODS[0], label="Suggest by").props("dense outlined")
            self.method.style("min-width: 130px")
            ui.button("Rank", on_click=self._rank).props("outline")
            self.count = ui.number("best", value=2, min=1, format="%d").props("dense outlined").style("width: 80px")
            ui.button("Choose them", on_click=self._take).props("outline")
            self.told = ui.label().classes("lf-hint")

    def resize(self, n_layer: int) -> None:
        """For a model of that depth the best are a quarter of its blocks, until another number is filled in."""
        self.count.set_value(max(1, n_layer // 4))

    def forget(self) -> None:
        """The ranking was that of another model."""
        self.scores, self.best = [], []
        self.told.set_text("")

    async def ranking(self, method: str) -> Optional[dict[str, Any]]:
        """The ranking by `method`, made once for a model, data and seed. None, and the refusal told, if there is
        none."""
        key = self._key(method)
        if key not in self.board.rankings:
            form, values = self.draft.form, self.draft.given("trainable_layers", "out_dir")
            try:
                await aside.io_bound(self.board.root.check, values, form.paths)
                words = form.words(values)
                self.board.rankings[key] = await self.board.ranker.call("rank", words=words, method=method)
            except LitfreezeError as error:
                self.told.set_text(str(error))
                return None
        return self.board.rankings[key]

    def _key(self, method: str) -> tuple[Any, ...]:
        values = sorted(self.draft.values.items())
        return (method, *((n, text) for n, text in values if text and (n in BEHIND or n.startswith("data."))))

    async def _rank(self) -> None:
        method = self.method.value
        self.told.set_text(f"Ranking by {method} …")
        found = await self.ranking(method)
        if found is None:
            return
        self.scores = found["scores"]
        self._mark_best()
        self.told.set_text(f"by {method}: {', '.join(map(str, self.best))}")
        self.on_rank()

    def _mark_best(self) -> None:
        order = sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))
        self.best = sorted(order[: int(self.count.value or 1)])

    async def _take(self) -> None:
        if not self.scores:
            await self._rank()
        if self.scores:
            self._mark_best()
            self.on_take(format_layers(self.best))
