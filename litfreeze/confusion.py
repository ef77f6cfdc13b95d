"""Who is taken for whom: a classifier's answers counted by class, and the figures that follow."""

from collections.abc import Sequence

import numpy as np

SHOWN = 20  # classes of a table


def by_class(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 (K,) of `counts` (K, K), whose row i has the records of class i by the class they were
    given. What would be 0 / 0 is 0."""
    right, given, are = np.diag(counts), counts.sum(0), counts.sum(1)
    return tuple(
        np.divide(top, below, out=np.zeros(len(counts)), where=below > 0)
        for top, below in ((right, given), (right, are), (2 * right, given + are))
    )


def accuracy(counts: np.ndarray) -> float:
    """The share of records that were given their class."""
    return float(np.trace(counts) / counts.sum())


def macro_f1(counts: np.ndarray) -> float:
    """The mean F1 over the classes that occur, as the records' own or among those given."""
    occurs = counts.sum(0) + counts.sum(1) > 0
    return float(by_class(counts)[2][occurs].mean())


def table(counts: np.ndarray, labels: Sequence[str]) -> list[str]:
    """Each class with its precision, recall, F1 and number of records, and what it is most often taken for: lines of
    Markdown, the lowest F1 first, of many classes the worst `SHOWN`."""
    precision, recall, f1 = by_class(counts)
    support = counts.sum(1)
    worst = sorted(range(len(labels)), key=lambda i: (f1[i] if support[i] else 2, -support[i], i))
    lines = [
        "| class | precision | recall | F1 | records | most often taken for |",
        "| --- |" + " ---: |" * 4 + " --- |",
    ]
    for i in worst[:SHOWN]:
        others = np.where(np.arange(len(labels)) == i, 0, counts[i])
        taken = f"{_cell(labels[others.argmax()])} ({others.max()})" if others.max() else ""
        shares = [f"{value:.3f}" for value in (precision[i], recall[i], f1[i])] if support[i] else ["", "", ""]
        lines.append(f"| {_cell(labels[i])} | {' | '.join(shares)} | {support[i]:,} | {taken} |")
    if len(worst) > SHOWN:
        lines += ["", f"The {SHOWN} of {len(worst)} classes with the lowest F1."]
    return lines


def _cell(text: str) -> str:
    """In one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
