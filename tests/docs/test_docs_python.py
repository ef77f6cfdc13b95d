"""The page about Python and the notebook: what stands in them runs."""

import os
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """One behind the other, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        line = page[: page.index(block)].count("\n")
        exec(compile("\n" * line + block, str(DOCS / "python.md"), "exec"), names)
    told = capsys.readouterr().out
    assert "unknown option 'trainable_layer'. Did you mean 'trainable_layers'?" in told
    assert names["result"].outcome.after.loss < names["result"].outcome.before.loss


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs pip install 'litfreeze[docs]'")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="needs pip install 'litfreeze[docs]'")
    # The kernel is this Python, whichever kernels the machine knows, and finds the package where it was found here
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path[1:]))
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # stripped
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.create_kernel_manager().kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute()
    told = ["".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells]
    assert any("frozen tensors are bit-identical" in text for text in told)
    assert any("logits within" in text for text in told)
