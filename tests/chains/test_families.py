"""Every family goes the whole way: chosen layers in full, an adapter on others, merged, and on in transformers."""

import pytest
import torch
from families import random_tokens, reference_model, write_json
from test_lora_chain import QUICK, hf_logits, litfreeze, logits

from litfreeze.__main__ import main
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.demo import MODEL_DIR, TRAIN_FILE

SHAPE = {
    "vocab_size": 1536, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
GEMMA = {**SHAPE, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 20}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "olmo2": SHAPE,
    "phi3": {
        **SHAPE,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [4.0, 8.0]},
    },
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "mixtral": {**SHAPE, **EXPERTS},
    "qwen3_moe": {**SHAPE, **EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [0], "norm_topk_prob": True},
}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """What makes a random model of a family, with the demo's tokenizer, in `base`."""
    monkeypatch.chdir(tmp_path)
    lines = TRAIN_FILE.read_text(encoding="utf-8").splitlines()[:40]
    (tmp_path / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def of(family: str) -> None:
        (tmp_path / "base").mkdir()
        fields = {"model_type": family, **FAMILIES[family]}
        reference_model(tmp_path / "base", fields).save_pretrained("base")
        write_json(tmp_path / "base/config.json", fields)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "base" / name).write_bytes((MODEL_DIR / name).read_bytes())

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_full_then_an_adapter_then_merged_then_in_transformers(base, tmp_path, capsys, family):
    base(family)
    few = f"--data few.jsonl --train.max_steps 4 --train.lr 1e-3 {QUICK}"
    told = litfreeze(f"finetune full --checkpoint_dir base --trainable_layers 2 --save_dtype float32 {few}", capsys)
    assert "frozen tensors are bit-identical" in told
    litfreeze("diff base out/finetune/full/final --expect_only 2", capsys)
    told = litfreeze(f"finetune lora --checkpoint_dir out/finetune/full/final --trainable_layers 1 {few}", capsys)
    assert "frozen tensors are bit-identical" in told
    litfreeze("merge_lora --dtype float32", capsys)
    litfreeze("convert to_hf --checkpoint_dir out/finetune/lora/final-merged --out_dir hf", capsys)
    tokens = random_tokens(1536, batch=2, length=30)
    ours = logits("out/finetune/lora/final-merged", tokens)
    torch.testing.assert_close(hf_logits("hf", tokens), ours, rtol=1e-3, atol=1e-3)
    assert (ours - logits("base", tokens)).abs().max() > 1e-2
    # What adapts attention alone can go on in PEFT
    litfreeze(f"finetune lora --checkpoint_dir base --lora_targets attn --out_dir attn {few}", capsys)
    litfreeze("convert to_peft --checkpoint_dir attn/final --out_dir peft", capsys)
    torch.testing.assert_close(logits("peft", tokens), logits("attn/final", tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_chosen_experts_train_and_no_other(base, capsys, family):
    base(family)
    few = f"--data few.jsonl --train.max_steps 6 --train.lr 1e-3 {QUICK}"
    where = "--trainable_layers 1,2 --trainable_modules experts.3,router"
    told = litfreeze(f"finetune full --checkpoint_dir base {where} --save_dtype float32 {few}", capsys)
    assert "mlp.experts.3" in told
    before, after = open_checkpoint("base"), open_checkpoint("out/finetune/full/final")
    changed = {name for name in before.layout() if not torch.equal(before.read(name), after.read(name))}
    parts = ("experts.3.gate_proj", "experts.3.up_proj", "experts.3.down_proj", "router")
    assert changed == {f"blocks.{i}.mlp.{part}.weight" for i in (1, 2) for part in parts}

    where = "--trainable_layers 2 --lora_targets experts.0"
    litfreeze(f"finetune lora --checkpoint_dir base {where} --out_dir lora {few}", capsys)
    adapted = open_checkpoint("lora/final").lora.ranks
    assert set(adapted) == {f"blocks.2.mlp.experts.0.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    # In transformers a block's experts are one tensor, which PEFT cannot adapt; merged they can go there
    assert main(["convert", "to_peft", "--checkpoint_dir", "lora/final", "--out_dir", "peft"]) == 2
    assert "Fold it in with litfreeze merge_lora" in capsys.readouterr().err
    litfreeze("merge_lora --checkpoint_dir lora/final --dtype float32 --out_dir merged", capsys)
    litfreeze("convert to_hf --checkpoint_dir merged --out_dir hf", capsys)
    tokens = random_tokens(1536, batch=2, length=30)
    torch.testing.assert_close(hf_logits("hf", tokens), logits("lora/final", tokens), rtol=1e-3, atol=1e-3)
    assert main(f"finetune full --checkpoint_dir base --compile {few}".split()) == 2
    assert "--compile does not go with experts" in capsys.readouterr().err
    assert main(["layers", "--checkpoint_dir", "base", "--trainable_modules", "experts.4"]) == 2
    assert "experts.0 to experts.3" in capsys.readouterr().err
