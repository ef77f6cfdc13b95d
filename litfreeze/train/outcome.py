"""What a run reached."""

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Scores:
    """Over all validation records: mean loss per target token, share of targets hit greedily, share of records whose
    response greedy decoding would write word for word (None where not only responses are learned).

    Of a classifier the targets are the records' classes; `confusion` has the records of each class by the class they
    were given, and `macro_f1` follows from it."""

    loss: float
    accuracy: float
    exact_match: Optional[float]
    targets: int
    macro_f1: Optional[float] = None
    confusion: Optional[list[list[int]]] = None

    def describe(self) -> str:
        """'validation loss 0.1234, exact match 93.1 %, tokens right 98.0 %'; of a classifier 'validation loss 0.1234,
        accuracy 93.1 %, macro F1 92.8 %'."""
        if self.macro_f1 is not None:
            figures = f"accuracy {100 * self.accuracy:.1f} %, macro F1 {100 * self.macro_f1:.1f} %"
            return f"validation loss {self.loss:.4f}, {figures}"
        exact = "" if self.exact_match is None else f"exact match {100 * self.exact_match:.1f} %, "
        return f"validation loss {self.loss:.4f}, {exact}tokens right {100 * self.accuracy:.1f} %"


@dataclass
class Outcome:
    """What a run reached."""

    step: int = 0
    seconds: float = 0.0  # of training alone, without validating and saving
    wall_seconds: float = 0.0  # of everything since the first validation
    tokens: int = 0
    before: Optional[Scores] = None
    after: Optional[Scores] = None
    best_loss: float = float("inf")
    best_step: int = 0
    best_kept: int = 0  # the step that `best` was saved at; 0: never
    validated: int = -1  # the step of the last validation
    worse: int = 0  # validations in a row that did not beat the best one
    stopped: str = ""  # why it ended before its last step
