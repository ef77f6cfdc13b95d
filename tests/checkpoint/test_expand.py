"""Block expansion: a deeper model with the same logits, to the bit, whose new blocks are known and can train."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_tokens, saved_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from litfreeze.__main__ import main
from litfreeze.checkpoint.expand import expand, write_expanded
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_hf
from litfreeze.config import Config
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.finetune.full import setup as finetune
from litfreeze.freeze.args import FactoryArgs
from litfreeze.freeze.words import plan_from_words
from litfreeze.place import PlaceArgs
from litfreeze.scripts.expand import setup as expand_command


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    checkpoint = open_checkpoint(path)
    return load_model(checkpoint, checkpoint.dtype)(tokens)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_a_deeper_model_has_the_same_logits_here_and_in_transformers(family, data, dtype):
    fields = data.draw(FAMILIES[family])
    tokens = random_tokens(fields["vocab_size"], batch=2, length=20)
    with saved_model(fields) as (path, reference):
        reference.to(dtype).save_pretrained(path)
        (path / "config.json").write_text(json.dumps(fields))
        shutil.copyfile(MODEL_DIR / "tokenizer.json", path / "tokenizer.json")
        shallow = open_checkpoint(path)
        n_layer = shallow.config.n_layer
        after = sorted(data.draw(st.sets(st.integers(0, n_layer - 1), min_size=1)))
        write_expanded(path / "deep", expand(shallow, after))
        deep = open_checkpoint(path / "deep")
        assert deep.config.n_layer == n_layer + len(after)
        assert list(deep.config.new_blocks) == [i + 1 + k for k, i in enumerate(after)]
        assert torch.equal(logits(path / "deep", tokens), logits(path, tokens))
        assert deep.layout()["embed.weight"][0] == dtype
        write_hf(path / "hf", deep)
        assert open_checkpoint(path / "hf").config == deep.config
        before, after = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (path, path / "hf"))
        assert torch.equal(after(tokens).logits, before(tokens).logits)


def test_new_blocks_are_known_by_name_wherever_the_checkpoint_goes(tmp_path, capsys):
    expand_command(out_dir=tmp_path / "deep", new_blocks=4)
    assert "12 blocks are 16, of which 3,7,11,15 are new" in capsys.readouterr().out
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) + "\n" for i in range(8)))
    run = finetune(
        checkpoint_dir=tmp_path / "deep", out_dir=tmp_path / "run", trainable_layers="new", data=few, save="delta",
        place=PlaceArgs(accelerator="cpu"),
    )  # fmt: skip
    assert not run.proof.frozen_that_changed and not run.proof.trained_that_did_not and run.proof.trained == 4 * 9
    trained = open_checkpoint(run.checkpoint_dir)
    assert trained.config.new_blocks == (3, 7, 11, 15)
    plan = plan_from_words(trained.config, trainable_layers="new,0")
    assert plan.layers == [0, 3, 7, 11, 15]
    assert main(["diff", str(tmp_path / "deep"), str(run.checkpoint_dir), "--expect_only", "new"]) == 0
    # Expanded once more, the new blocks are those of the last time
    expand_command(checkpoint_dir=run.checkpoint_dir, out_dir=tmp_path / "deeper", after="new")
    assert open_checkpoint(tmp_path / "deeper").config.new_blocks == (4, 9, 14, 19)


def test_the_words_of_llama_factory_mean_the_same_blocks(tmp_path):
    expand_command(out_dir=tmp_path / "deep", new_blocks=4)
    config = open_checkpoint(tmp_path / "deep").config
    theirs = plan_from_words(config, factory=FactoryArgs(4, use_llama_pro=True))
    assert theirs.trained == plan_from_words(config, trainable_layers="new").trained
    plain = Config.from_file(MODEL_DIR / "config.json")  # their arithmetic alone, on any model
    assert plan_from_words(plain, factory=FactoryArgs(3, use_llama_pro=True)).layers == [3, 7, 11]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, "--new_blocks says how many"),
        ({"new_blocks": 5}, "Choose from 1, 2, 3, 4, 6, 12"),
        ({"new_blocks": 0}, "Choose from 1, 2"),
        ({"new_blocks": 2, "after": "1,2,3"}, "names 3 blocks"),
        ({"after": "12"}, "ids 0 to 11"),
        ({"after": "none"}, "as it is"),
        ({"after": "new"}, "no new blocks"),
    ],
)
def test_what_does_not_come_out_is_refused(tmp_path, words, told):
    with pytest.raises(UsageError) as error:
        expand_command(out_dir=tmp_path / "deep", **words)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"trainable_layers": "new"}, "litfreeze expand puts them in"),
        ({"factory": FactoryArgs(use_llama_pro=True)}, "--freeze_trainable_layers, the number of new blocks"),
        ({"factory": FactoryArgs(5, use_llama_pro=True)}, "Choose from 1, 2, 3, 4, 6, 12"),
        ({"factory": FactoryArgs(-4, use_llama_pro=True)}, "Choose from"),
        ({"factory": FactoryArgs(4, use_llama_pro=True), "trainable_layers": "1"}, "say the same thing"),
    ],
)
def test_words_about_new_blocks_that_fit_nothing_are_refused(words, told):
    with pytest.raises(UsageError, match=told):
        plan_from_words(Config.from_file(MODEL_DIR / "config.json"), **words)


def test_another_count_than_that_of_the_new_blocks_is_refused(tmp_path):
    expand_command(out_dir=tmp_path / "deep", new_blocks=4)
    config = open_checkpoint(tmp_path / "deep").config
    with pytest.raises(UsageError, match="Say --trainable_layers new"):
        plan_from_words(config, factory=FactoryArgs(8, use_llama_pro=True))


@pytest.mark.parametrize("ids", [[1, 1], [2, 1], [12], [-1], ["1"], "1", [True]])
def test_a_config_with_impossible_new_blocks_is_refused(ids):
    fields = json.loads((MODEL_DIR / "config.json").read_text())
    with pytest.raises(UsageError, match="new_blocks"):
        Config.from_hf({**fields, "new_blocks": ids})
