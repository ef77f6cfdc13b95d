"""The journey of the README: train chosen blocks, generate, export, and go on in transformers."""

import re

import torch

from litfreeze.__main__ import main
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint


def litfreeze(line: str, capsys) -> str:
    assert main(line.split()) == 0
    return capsys.readouterr().out


def test_from_the_first_command_to_transformers(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    told = litfreeze("finetune full --trainable_layers 10,11 --train.max_steps 30", capsys)
    losses = [float(x) for x in re.findall(r"^(?:Before|After) +validation loss ([0-9.]+)", told, re.M)]
    assert losses[1] < losses[0] / 2
    assert "frozen tensors are bit-identical" in told
    assert "litfreeze generate --checkpoint_dir out/finetune/full/final" in told

    # A second run goes on from the first, with other layers, and overwrites nothing
    litfreeze(
        "finetune full --checkpoint_dir out/finetune/full/final --trainable_layers 0-3 --trainable_modules mlp "
        "--train.max_steps 5 --train.lr 1e-3",
        capsys,
    )
    second = "out/finetune/full-2/final"
    assert (
        open_checkpoint(second).manifest["base"]["weights_hash"]
        == open_checkpoint("out/finetune/full/final").weights_hash
    )

    answer = litfreeze(f"generate --checkpoint_dir {second} --prompt Hello --max_new_tokens 12", capsys).strip()
    litfreeze(f"convert to_hf --checkpoint_dir {second} --out_dir hf", capsys)
    model = AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("hf")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(written[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer

    checkpoint = open_checkpoint(second)
    ours = load_model(checkpoint, lambda _: torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=0, atol=1e-4)

    # The export is itself a checkpoint to train from
    litfreeze("finetune full --checkpoint_dir hf --trainable_layers last:1 --train.max_steps 2", capsys)


def test_every_command_runs_on_the_embedded_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert litfreeze("generate --max_new_tokens 5", capsys).strip()
    assert "blocks 10,11" in litfreeze("layers --trainable_layers 10,11", capsys)
    litfreeze("convert to_hf", capsys)
    litfreeze("convert from_hf --checkpoint_dir out/hf --out_dir again", capsys)
    assert open_checkpoint("again").weights_hash == open_checkpoint_of_demo().weights_hash
    litfreeze("init --preset demo --tokenizer_dir out/hf --out_dir random", capsys)
    assert "Trains" in litfreeze("finetune full --checkpoint_dir random --train.max_steps 1", capsys)


def open_checkpoint_of_demo():
    from litfreeze.demo import MODEL_DIR

    return open_checkpoint(MODEL_DIR)
