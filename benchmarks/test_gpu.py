"""The benchmark that is meant for a GPU runs everywhere, on a small shape: pytest benchmarks"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import HEADINGS, PRECISIONS, WORKS, Row, Size, Told, cells, disagreements, rows_of

SCRIPT = Path(__file__).with_name("gpu.py")


def run(*words):
    command = [sys.executable, SCRIPT, "--tiny", "--accelerator", "cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    return done, lines


@pytest.mark.matrix  # over a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="one row is compiled, and there is no C++ compiler")
def test_every_row_is_in_the_table():
    done, (headings, _, *lines) = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert headings == list(HEADINGS)
    found = {tuple(line[:3]) for line in lines}
    assert found == {(row.title, row.precision, row.by) for row in rows_of(False, False)} and len(lines) == len(found)
    for precision in PRECISIONS:
        for work in WORKS:
            assert (work, precision, "litfreeze") in found
            assert (work, precision, "PEFT" if work == "LoRA" else "transformers") in found
        assert ("last 2, cache full", precision, "litfreeze") in found
    assert ("full, compiled", PRECISIONS[0], "litfreeze") in found
    for line in lines:
        figures = dict(zip(headings, line, strict=True))
        assert float(figures["tokens/s"].replace(",", "")) > 0 and float(figures["peak, GB"]) > 0
        assert all(float(figures[name].removesuffix(" %")) > 0 for name in ("MFU, floor", "MFU, 6N"))
        assert float(figures["loss"].split()[0]) == pytest.approx(7.3, abs=0.2)  # log of the vocabulary
    assert "Compiled, full in bf16-mixed is" in done.stdout and "measured in bf16 products" in done.stdout


def test_a_budget_that_is_over_says_what_is_missing():
    done, lines = run("--minutes", "0.001")
    assert done.returncode == 1 and not lines
    assert "No model could be made within 0.001 minutes." in done.stderr


KNOWN = {"sheet": 989e12, "measured": 700e12, "flops": {"full": 60e12}, "parameters": 1.2e9}
SIZE = Size(length=1000, batch=8, warmup=5, steps=10)


def test_what_is_computed_from_what_was_measured():
    ours, theirs = Row("litfreeze", "full", "bf16-true"), Row("transformers", "full", "bf16-true")
    found = {ours: Told(2.0, 1.0, [11.8, 9.0], 30 * 10**9, 40 * 10**9), theirs: Told(3.0, 1.0, [11.7, 9.1], 50 * 10**9)}
    line = dict(zip(HEADINGS, cells(ours, found, SIZE, KNOWN), strict=True))
    assert (line["tokens/s"], line["times the peer"], line["peak, GB"]) == ("40,000", "1.50", "30.0 (40.0 reserved)")
    assert line["MFU, floor"] == f"{100 * 10 * 60e12 / 2 / 989e12:.1f} %"
    assert line["MFU, 6N"] == f"{100 * 6 * 1.2e9 * 40_000 / 989e12:.1f} %"
    assert not disagreements(found)
    found[theirs] = Told(3.0, 1.0, [11.2, 9.1])
    assert disagreements(found) == ["transformers, full, bf16-true: 11.2000, where litfreeze has 11.8000"]
    found[theirs] = Told(failed="OutOfMemoryError: so much")
    assert cells(theirs, found, SIZE, KNOWN)[3] == "failed: OutOfMemoryError: so much" and not disagreements(found)
