"""What is chosen of a model, as words and as parts that are on or off, and the cells that show it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Optional

from litfreeze.choose.words import check_words, has_ranks
from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers, parse_layers
from litfreeze.freeze.plan import EXTRAS

INSTEAD = ("unfreeze", "lisa_layers", "freeze_trainable_layers", "freeze_trainable_layers_ids", "trainable_modules")


@dataclass
class Choice:
    """What is chosen of a model of `n_layer` blocks, `new` of them put in by `litfreeze expand`: the words for blocks
    and for what stands outside of them, and the blocks of the last words that meant something.

    With no words for blocks everything trains or, if other options say what (`elsewhere`), what the plan has.
    `always` trains outside of them whatever the words are."""

    n_layer: int = 0
    new: Sequence[int] = ()
    elsewhere: bool = False
    always: frozenset[str] = frozenset()
    layers: str = ""
    extra: str = ""
    blocks: set[int] = field(default_factory=set)

    def follow(self, model: Mapping[str, Any], method: str, values: Mapping[str, str]) -> Optional[str]:
        """Takes what a form has of it, for `model` as plan.plan tells of it. A refusal as `read` has it."""
        self.n_layer, self.new = model["n_layer"], model["new"]
        self.elsewhere = method != "full" or any(values.get(name) for name in INSTEAD)
        classifies = values.get("task") == "classification" or model["classes"] > 0
        self.always = frozenset(["head"] if classifies else [])
        self.layers, self.extra = values.get("trainable_layers", ""), values.get("trainable_extra", "")
        return self.read()

    def follow_plan(self, layers: str) -> None:
        """Takes the blocks of a plan, where it alone knows which a ranking or a timeline means."""
        with suppress(UsageError):
            if has_ranks(self.layers) if self.layers else self.elsewhere:
                self.blocks = set(parse_layers(layers, self.n_layer))

    def read(self) -> Optional[str]:
        """Takes the words for blocks as they are. The refusal, if they mean nothing; then the blocks stay. Those of a
        ranking are for the plan to say."""
        try:
            if self.layers and not check_words(self.layers, self.n_layer, self.new):
                self.blocks = set(parse_layers(self.layers, self.n_layer, new=self.new))
        except UsageError as error:
            return str(error)
        if not self.layers:
            self.blocks = set(range(self.n_layer))
        return None

    @property
    def outside(self) -> set[str]:
        """What trains outside of the blocks."""
        if not self.layers and not self.elsewhere:
            return set(EXTRAS)
        return {word.strip() for word in self.extra.split(",") if word.strip()} | self.always

    def put(self, parts: Sequence[str], on: bool) -> None:
        """Switches parts on or off, and finds the words for what is chosen then."""
        outside = self.outside - self.always
        blocks = {int(part) for part in parts if part.isdecimal()}
        self.blocks = self.blocks | blocks if on else self.blocks - blocks
        named = {part for part in parts if not part.isdecimal()}
        outside = outside | named if on else outside - named
        if blocks or not self.layers:
            self.layers = "all" if len(self.blocks) == self.n_layer else format_layers(self.blocks)
        known = [word for word in EXTRAS if word in outside]
        self.extra = ",".join(known + sorted(outside - set(EXTRAS)))


def cells(
    choice: Choice,
    tied: bool,
    parts: Mapping[str, Mapping[str, Any]],
    scores: Sequence[float] = (),
    best: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """The cells of the strip. `parts` is what the last plan says of each, and may be that of other words."""
    most = max(scores, default=0) or 1
    found = []
    own_head = not tied or "head" in choice.always
    names = ["embed", *map(str, range(choice.n_layer)), "final_norm", *(["head"] if own_head else [])]
    for name in names:
        block = int(name) if name.isdecimal() else None
        known = parts.get(name, {})
        pressed = name in choice.outside if block is None else block in choice.blocks
        score = scores[block] if scores and block is not None else None
        labels = {"embed": "embed" if own_head else "embed = head", "final_norm": "norm"}
        found.append(
            {
                "part": name,
                "label": labels.get(name, name),
                "title": f"block {name}" if block is not None else labels.get(name, name),
                "outside": block is None,
                "pressed": pressed,
                "state": known.get("state", "frozen") if pressed else "frozen",
                "rate": " ".join(f"{rate:.2g}" for rate in known.get("rates", [])[:1]) if pressed else "",
                "fresh": block in choice.new,
                "score": None if score is None else max(0.0, score / most),
                "score_text": "" if score is None else f"{score:.3g}",
                "best": block in best,
            }
        )
    return found
