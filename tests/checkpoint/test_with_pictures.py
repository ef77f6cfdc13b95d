"""Gemma 3 from 4B on also takes pictures. Its language model is a model like any other: read out of the whole, trained,
and handed to tools that have the whole (PEFT) or the part (transformers)."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from families import random_tokens, reference_model, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

import litfreeze
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_peft
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.scripts.convert import from_hf, from_peft, to_hf, to_peft
from litfreeze.scripts.merge import merge_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 1536,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "sliding_window_pattern": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
WHOLE = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": TEXT,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 1530,
    "boi_token_index": 1531,
    "eoi_token_index": 1532,
    "eos_token_id": [1, 106],
    "dtype": "float32",
}
RECORDS = [{"prompt": f"Name fruit {i}.", "response": "Apple."} for i in range(8)]
# How the files of the Hub name a tensor, and how transformers' modules are named
OLD, NEW = "language_model.model.", "model.language_model."


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_dir):
    """A directory with a model that also takes pictures, its config as on the Hub, and that model."""
    folder = tmp_path_factory.mktemp("whole")
    model = reference_model(folder, WHOLE)
    assert isinstance(model, Gemma3ForConditionalGeneration)
    model.save_pretrained(folder)
    write_json(folder / "config.json", WHOLE)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    return folder, model


TOKENS = random_tokens(1500, batch=2, length=40)


@torch.no_grad()
def our_logits(checkpoint):
    return load_model(checkpoint, lambda name: torch.float32)(TOKENS)


@torch.no_grad()
def their_logits(model):
    return model.eval()(TOKENS).logits


def assert_close(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def named_anew(folder, source):
    """A copy of `source` whose tensors go by the names of transformers' modules."""
    shutil.copytree(source, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert any(name.startswith(OLD) for name in weights)
    anew = {re.sub("^(vision_tower|multi_modal)", r"model.\1", n.replace(OLD, NEW)): t for n, t in weights.items()}
    safetensors.torch.save_file(anew, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("names", ["of the Hub", "of the modules"])
def test_the_language_model_gives_the_same_logits(names, whole, tmp_path):
    folder, model = whole
    folder = folder if names == "of the Hub" else named_anew(tmp_path / "anew", folder)
    assert_close(our_logits(open_checkpoint(folder)), their_logits(model))


def test_what_the_text_config_leaves_out_is_what_transformers_fills_in(tmp_path):
    """As in the config.json of Gemma 3 4B: its architecture's defaults are said nowhere."""
    sparse = {k: TEXT[k] for k in ("model_type", "num_hidden_layers", "rope_scaling")} | {"sliding_window": 1024}
    write_json(tmp_path / "config.json", WHOLE | {"text_config": sparse})
    (tmp_path / "whole").mkdir()
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "whole")
    assert "head_dim" in (tmp_path / "whole" / "config.json").read_text()
    found = Config.from_file(tmp_path / "config.json")
    assert found == Config.from_file(tmp_path / "whole" / "config.json")
    assert (found.vocab_size, found.head_size, found.block_size, found.windows[:6]) == (
        262208,
        256,
        131072,
        (1024, 1024, 1024),
    )


def test_converting_leaves_out_the_pictures_and_says_so(whole, tmp_path, capsys):
    folder, model = whole
    from_hf(folder, tmp_path / "ours")
    told = capsys.readouterr().out
    pictures = [name for name in model.state_dict() if "language_model" not in name and "lm_head" not in name]
    assert f"Left out: {len(pictures)} tensors for pictures" in told
    to_hf(tmp_path / "ours", tmp_path / "text")
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert isinstance(part, Gemma3ForCausalLM)
    assert_close(their_logits(part), their_logits(model))
    assert json.loads((tmp_path / "text" / "config.json").read_text())["eos_token_id"] == [1, 106]


@pytest.mark.parametrize("converted", [False, True])
def test_an_adapter_trained_here_fits_the_whole_model_in_peft(converted, whole, tmp_path, capsys):
    """Neither more nor less than was trained carries an adapter there: the blocks for pictures have names like ours."""
    folder, _ = whole
    base = from_hf(folder, tmp_path / "base") if converted else folder
    run = litfreeze.finetune(
        base,
        method="lora",
        out_dir=tmp_path / "run",
        data=RECORDS,
        lora_r=2,
        max_steps=3,
        max_seq_length=64,
    ).out_dir
    assert "The language model of one that also takes pictures." in capsys.readouterr().out
    to_peft(run / "final", tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder.resolve())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "peft")
    carrying = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert carrying and all(".language_model.layers." in name for name in carrying)
    expected = our_logits(open_checkpoint(run / "final"))
    assert_close(their_logits(adapted), expected)
    assert (expected - our_logits(open_checkpoint(folder))).abs().max() > 1e-4  # it does something

    merge_lora(run / "final", tmp_path / "merged")
    to_hf(tmp_path / "merged", tmp_path / "text")
    assert_close(their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "text")), expected)


def trained_by_peft(base, folder, targets):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape) if parameter.requires_grad else 0)
    model.save_pretrained(folder)
    return model


def test_an_adapter_of_peft_comes_in_and_goes_out_again(whole, tmp_path):
    folder, _ = whole
    theirs = trained_by_peft(folder, tmp_path / "theirs", r".*language_model.*(q_proj|down_proj)")
    opened = open_checkpoint(tmp_path / "theirs", folder)
    assert_close(our_logits(opened), their_logits(theirs))
    from_peft(tmp_path / "theirs", tmp_path / "ours", folder)
    write_peft(tmp_path / "again", open_checkpoint(tmp_path / "ours"))
    again, before = (
        safetensors.torch.load_file(tmp_path / d / "adapter_model.safetensors") for d in ("again", "theirs")
    )
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_an_adapter_over_pictures_too_is_refused(whole, tmp_path):
    folder, _ = whole
    trained_by_peft(folder, tmp_path / "theirs", ["q_proj"])
    with pytest.raises(UsageError, match=r"vision_tower.* has no place in the base"):
        open_checkpoint(tmp_path / "theirs", folder)


@pytest.mark.parametrize("text", [None, 3, {"model_type": "llama"}])
def test_without_a_language_model_of_its_kind_it_is_refused(text, whole, tmp_path):
    write_json(tmp_path / "config.json", WHOLE | {"text_config": text})
    with pytest.raises(UsageError, match="must have a text_config of model_type 'gemma3_text'"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_neither_is_refused(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "more")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        weights | {"audio_tower.weight": torch.ones(2)}, tmp_path / "more" / "model.safetensors"
    )
    with pytest.raises(UsageError, match=r"audio_tower\.weight has no place"):
        open_checkpoint(tmp_path / "more")
