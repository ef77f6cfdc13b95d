"""What is filled in outlives its page and the method that is chosen, and reaches the command whole."""

import json

import pytest
from litfreeze_board import runs
from litfreeze_board.draft import Draft

from litfreeze.errors import UsageError
from litfreeze.outputs import RECIPE


@pytest.fixture
def draft(tmp_path) -> Draft:
    draft = Draft(tmp_path)
    draft.find_free()
    return draft


def test_the_command_has_its_own_options_and_a_folder_that_is_free(draft, tmp_path):
    draft.values |= {"lora_r": "4", "train.lr": "1e-3", "seed": ""}
    assert draft.line() == "litfreeze finetune full --out_dir out/finetune/full --trainable_layers -2: --train.lr 1e-3"
    draft.method = "lora"
    assert draft.given("train.lr") == {"out_dir": "out/finetune/lora", "trainable_layers": "-2:", "lora_r": "4"}
    (tmp_path / "out/finetune/lora").mkdir(parents=True)
    draft.find_free()
    assert draft.given()["out_dir"] == "out/finetune/lora-2"
    draft.values["out_dir"] = "mine"
    assert draft.given()["out_dir"] == "mine"


def test_what_was_kept_comes_back(draft, tmp_path):
    draft.method, draft.values = "lora", {"trainable_layers": "0-3, 8", "freeze_quantize": "", "lora_r": "4"}
    draft.keep()
    again = Draft(tmp_path)
    again.restore()
    assert (again.method, again.values) == (draft.method, draft.values)
    again.clear()
    assert (again.method, again.values) == ("full", {"trainable_layers": "-2:"})


@pytest.mark.parametrize(
    ("kept", "values"),
    [
        ("{", {"trainable_layers": "-2:"}),
        ("[]", {"trainable_layers": "-2:"}),
        (json.dumps({"method": "other", "values": {"seed": "1"}}), {"trainable_layers": "-2:"}),
        (json.dumps({"method": "full", "values": {"seed": 1, "gone": "2"}}), {"seed": "1"}),  # of another version
    ],
)
def test_what_was_kept_is_taken_as_far_as_it_is_one(draft, kept, values):
    draft.file.parent.mkdir(parents=True)
    draft.file.write_text(kept, encoding="utf-8")
    draft.restore()
    assert (draft.method, draft.values) == ("full", values)


def test_a_recipe_brings_the_method_that_has_its_options(draft):
    draft.read("lora_r: 4\ntrainable_layers: [0, 1]\n")
    assert (draft.method, draft.values) == ("lora", {"lora_r": "4", "trainable_layers": "0,1"})
    with pytest.raises(UsageError, match="lora_q"):
        draft.read("lora_q: 4\n")
    assert draft.values["lora_r"] == "4"


def test_the_options_of_a_run(draft, tmp_path):
    words = ["finetune", "lora", "--lora_r", "4"]
    run = runs.Run(tmp_path / runs.STATE / "0001", words, "out/one", 2, "10,11", 12, 0.0, 1, "")
    run.folder.mkdir(parents=True)
    run.write()
    draft.read_run("0002")  # there is none
    assert draft.method == "full"
    run.place.mkdir(parents=True)
    (run.place / RECIPE).write_text("lora_r: 4\nseed: 7\n", encoding="utf-8")
    draft.read_run("0001")
    assert (draft.method, draft.values) == ("lora", {"lora_r": "4", "seed": "7"})
