"""What a command writes takes nobody's place."""

import pytest

from litfreeze.__main__ import main
from litfreeze.demo import MODEL_DIR


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["diff", MODEL_DIR, MODEL_DIR], "json"),
        (["diff", MODEL_DIR, MODEL_DIR], "png"),
        (["rank", "--method", "random"], "out_json"),
        (["rank", "--method", "random"], "png"),
        (["data", "show"], "png"),
        (["evaluate", "--data", "mine.png"], "json"),
        (["classify", MODEL_DIR, "--data", "mine.png"], "out_csv"),
    ],
)
def test_a_file_that_is_there_stays(tmp_path, monkeypatch, capsys, words, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").write_text("hours of work")
    assert main([*map(str, words), f"--{option}", "mine.png"]) == 2
    assert f"--{option} mine.png exists. Choose another name" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_text() == "hours of work"
