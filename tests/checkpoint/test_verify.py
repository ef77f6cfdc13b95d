"""`litfreeze verify`: what was written is there, all of it, and nothing that would be read with it came later."""

import re
import shutil

import pytest

from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.verify import verify
from litfreeze.checkpoint.write import write_checkpoint
from litfreeze.demo import MODEL_DIR

TEMPLATE = "chat_template.jinja"


def rewrite(name, old, new):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new, 1))


CHANGES = {
    "tokenizer.json has other contents": rewrite("tokenizer.json", b": ", b":\t"),
    "tokenizer.json has [0-9,]+ bytes": rewrite("tokenizer.json", b"{", b" {"),
    f"{TEMPLATE} is read with the checkpoint, but was not written": lambda folder: (folder / TEMPLATE).write_text(
        "{{ 1 }}"
    ),
    "tokenizer_config.json is missing": lambda folder: (folder / "tokenizer_config.json").unlink(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model, folder = open_checkpoint(MODEL_DIR), tmp_path_factory.mktemp("written") / "model"
    write_checkpoint(folder, model.hf_config, model.layout(), model.read, {"kind": "base"}, MODEL_DIR)
    return folder


@pytest.mark.parametrize("fault", CHANGES)
def test_a_file_beside_the_weights_that_is_not_as_written_is_told(fault, written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "model")
    assert [verdict.fault for verdict in verify(folder)] == [""]
    assert not (folder / TEMPLATE).exists()
    CHANGES[fault](folder)
    (verdict,) = verify(folder)
    assert re.search(fault, verdict.fault)


def test_what_nobody_reads_may_lie_beside_it(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    assert [verdict.fault for verdict in verify(folder)] == [""]
