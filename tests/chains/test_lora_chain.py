"""The long journeys: train, continue, continue, merge, train again, and go on in transformers and PEFT.

On the embedded model in every detail, and once on the real SmolLM2."""

import json
import re
from pathlib import Path

import pytest
import torch

from litfreeze.__main__ import main
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.demo import MODEL_DIR, TRAIN_FILE

QUICK = "--train.global_batch_size 8 --eval.max_samples 16 --eval.max_new_tokens 2 --data.val_split_fraction 0.2"


def litfreeze(line: str, capsys) -> str:
    assert main(line.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@torch.no_grad()
def logits(path, tokens) -> torch.Tensor:
    return load_model(open_checkpoint(path), lambda _: torch.float32)(tokens)


def peft_logits(base, adapter, tokens) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        return model(tokens).logits


def hf_logits(path, tokens) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits


@pytest.fixture
def sets(tmp_path, monkeypatch) -> list[str]:
    """Three sets of records: a.jsonl, b.jsonl, c.jsonl."""
    monkeypatch.chdir(tmp_path)
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()
    for i, name in enumerate("abc"):
        Path(f"{name}.jsonl").write_text("\n".join(lines[40 * i : 40 * (i + 1)]), encoding="utf-8")
    return ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_lora_continued_twice_and_merged(sets, capsys):
    litfreeze(
        f"finetune lora --data {sets[0]} --train.max_steps 12 {QUICK} --use_rslora --trainable_layers 0-5", capsys
    )
    for i, data in enumerate(sets[1:]):
        before = "out/finetune/lora" + (f"-{i + 1}" if i else "")
        told = litfreeze(
            f"finetune lora --checkpoint_dir {before}/final --data {data} --train.max_steps 6 {QUICK}", capsys
        )
        assert "Continues LoRA (rank-stabilised) r 8, alpha 16" in told and "going on with" in told
        assert f"out/finetune/lora-{i + 2}/final" in told
    told = litfreeze("merge_lora", capsys)
    assert "out/finetune/lora-3/final" in told
    merged = open_checkpoint("out/finetune/lora-3/final-merged")
    assert [(run["kind"], run["step"]) for run in merged.history] == [("lora", 12), ("lora", 6), ("lora", 6)]

    tokens = torch.arange(3, 60)[None]
    adapter = logits("out/finetune/lora-3/final", tokens)
    litfreeze("merge_lora --dtype float32 --out_dir exact", capsys)
    torch.testing.assert_close(logits("exact", tokens), adapter, rtol=1e-5, atol=1e-5)
    assert (logits(merged.path, tokens) - adapter).abs().max() < 0.2  # within bf16's rounding

    # The same adapter in PEFT, over the base as transformers has it, and back
    litfreeze(f"convert to_hf --checkpoint_dir {MODEL_DIR} --out_dir base_hf", capsys)
    litfreeze("convert to_peft out/finetune/lora-3/final --out_dir peft --base_name base_hf", capsys)
    torch.testing.assert_close(peft_logits("base_hf", "peft", tokens), adapter, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits("peft", tokens), adapter, rtol=1e-5, atol=1e-5)
    litfreeze(f"finetune lora --checkpoint_dir peft --data {sets[0]} --train.max_steps 2 {QUICK}", capsys)
    litfreeze("generate --checkpoint_dir peft --prompt Hello --max_new_tokens 3", capsys)


def test_full_then_lora_then_merge_then_selective_then_lora(sets, capsys):
    """Every kind of output is a beginning for every other."""
    a, b, c = sets
    steps = f"--train.max_steps 4 {QUICK}"
    litfreeze(f"finetune full --data {a} {steps} --trainable_layers 10,11 --save both", capsys)
    litfreeze(f"finetune lora --checkpoint_dir out/finetune/full/final --data {b} {steps} --use_dora", capsys)
    litfreeze("merge_lora", capsys)
    litfreeze(
        f"finetune full --checkpoint_dir out/finetune/lora/final-merged --data {c} {steps} --trainable_layers 3 "
        "--save delta",
        capsys,
    )
    delta = "out/finetune/full-2/final"
    told = litfreeze(
        f"finetune lora --checkpoint_dir {delta} --data {a} {steps} --full_layers 0 --trainable_layers 1-11", capsys
    )
    assert "and in full block 0" in told
    last = open_checkpoint("out/finetune/lora-2/final")
    assert [run["kind"] for run in last.history] == ["full", "lora", "full", "lora"]
    assert last.base.path.resolve() == Path("out/finetune/lora/final-merged").resolve()  # flat: over what is whole
    litfreeze("merge_lora --dtype float32", capsys)
    litfreeze("convert to_hf --checkpoint_dir out/finetune/lora-2/final-merged --out_dir hf", capsys)
    tokens = torch.arange(3, 60)[None]
    torch.testing.assert_close(
        hf_logits("hf", tokens), logits("out/finetune/lora-2/final", tokens), rtol=1e-4, atol=1e-4
    )

    # The delta is the whole, and what did not train can be proved
    both = [open_checkpoint(f"out/finetune/full/{name}") for name in ("final", "final-delta")]
    assert both[0].weights_hash == both[1].weights_hash
    litfreeze("merge_delta --checkpoint_dir out/finetune/full/final-delta --out_dir again", capsys)
    assert open_checkpoint("again").weights_hash == both[0].weights_hash
    litfreeze(f"diff {MODEL_DIR} out/finetune/full/final-delta --expect_only 10,11", capsys)
    assert main(["diff", str(MODEL_DIR), "again", "--expect_only", "11"]) == 1
    assert "10" in capsys.readouterr().err


def test_lora_on_a_real_model_ends_in_transformers_and_peft(smollm2, sets, capsys):
    told = litfreeze(
        f"finetune lora --checkpoint_dir {smollm2} --data a.jsonl --trainable_layers 24-29 --out_dir one {QUICK} "
        "--lora_targets q_proj,down_proj --train.max_steps 6 --train.lr 2e-3",
        capsys,
    )
    told += litfreeze(
        f"finetune lora --checkpoint_dir one/final --data b.jsonl --train.max_steps 4 --out_dir two {QUICK}", capsys
    )
    losses = [float(x) for x in re.findall(r"^(?:Before|After) +validation loss ([0-9.]+)", told, re.M)]
    assert losses[1] < 0.85 * losses[0] and losses[3] < losses[2]
    litfreeze("merge_lora --checkpoint_dir two/final --out_dir merged --dtype float32", capsys)
    litfreeze("convert to_hf --checkpoint_dir merged --out_dir hf", capsys)
    litfreeze("convert to_peft two/final --out_dir peft", capsys)
    assert json.loads(Path("peft/adapter_config.json").read_text())["base_model_name_or_path"] == str(smollm2.resolve())
    tokens = torch.arange(100, 140)[None]
    ours = logits("two/final", tokens)
    for theirs in (hf_logits("hf", tokens), peft_logits(smollm2, "peft", tokens)):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    asked = "Play some jazz by Miles Davis on Spotify"
    assert main(["generate", "--checkpoint_dir", "two/final", "--prompt", asked, "--max_new_tokens", "8"]) == 0
    answer = capsys.readouterr().out.strip()
    assert answer == transformers_answer("hf", asked, 8)


def transformers_answer(path, question: str, length: int) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    written = model.generate(**chat, max_new_tokens=length, do_sample=False)
    return tokenizer.decode(written[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip()
