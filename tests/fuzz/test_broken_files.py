"""Every file that a command reads, broken in two thousand ways (pytest -m "matrix or not matrix" tests/fuzz)."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from attempts import attempt, draw, linked
from damage import break_bytes, break_file, break_json, break_start, break_tensors, no_file

CHUNK = 20
FEW = 5  # where a case takes seconds


@dataclass(frozen=True)
class Kind:
    seed: str
    file: str
    count: int
    commands: tuple[str, ...]
    damage: Callable = break_json
    chunk: int = CHUNK


OPEN = "rank --method random --checkpoint_dir {0}"
LAYERS = "layers --checkpoint_dir {0} --trainable_layers -2:"
SAY = "generate --checkpoint_dir {0} --prompt Hi --max_new_tokens 1"
READ = "finetune full --checkpoint_dir {0} --data {data} --train.max_steps 1"
GO_ON = "finetune lora --checkpoint_dir {0} --data {data} --train.max_steps 1"
AGAIN = "finetune lora --resume {0}"
DIFF = "diff {0} {demo}"
VERIFY = "verify {0}"
INIT = "init --config_file {0}/config.json --out_dir out"
FROM_HF = "convert from_hf {0} out"
TO_HF = "convert to_hf --checkpoint_dir {0} --out_dir out"
FROM_PEFT = "convert from_peft {0} out"
TO_PEFT = "convert to_peft {0} --out_dir out"
FROM_GGUF = "convert from_gguf {0}/model.gguf out"
TO_GGUF = "convert to_gguf --checkpoint_dir {0} --out_file out/model.gguf --dtype q4_0"
MERGE = "merge_delta {0} --out_dir out"
CLASSIFY = "classify {0} --text Hi"

INDEX, STEP = "model.safetensors.index.json", "resume/step-000002"
KINDS = {
    "config.json": Kind("demo", "config.json", 300, (OPEN, SAY, LAYERS, OPEN, INIT)),
    "config.json of hf": Kind("hf", "config.json", 60, (OPEN, FROM_HF, SAY)),
    "config.json of a classifier": Kind("classifier", "config.json", 80, (CLASSIFY, OPEN)),
    "litfreeze.json": Kind("demo", "litfreeze.json", 140, (VERIFY, SAY, TO_HF)),
    "litfreeze.json of a delta": Kind("delta", "litfreeze.json", 80, (VERIFY, SAY, DIFF, MERGE)),
    "litfreeze.json of an adapter": Kind("adapter", "litfreeze.json", 140, (GO_ON, VERIFY, SAY, TO_PEFT)),
    "safetensors": Kind("demo", "litfreeze.safetensors", 120, (OPEN, SAY, DIFF, LAYERS), break_tensors),
    "safetensors of hf": Kind("hf", "model.safetensors", 60, (OPEN, DIFF), break_tensors),
    "safetensors of an adapter": Kind("adapter", "trained.safetensors", 60, (SAY, VERIFY), break_tensors),
    "index": Kind("sharded", INDEX, 120, (OPEN, SAY)),
    "pytorch_model.bin": Kind("pickled", "pytorch_model.bin", 80, (OPEN, DIFF), break_bytes),
    "tokenizer.json": Kind("demo", "tokenizer.json", 160, (SAY, READ, SAY, VERIFY)),
    "tokenizer_config.json": Kind("demo", "tokenizer_config.json", 160, (SAY, READ)),
    "adapter_config.json": Kind("peft", "adapter_config.json", 160, (SAY, OPEN, FROM_PEFT, GO_ON)),
    "adapter_model.safetensors": Kind("peft", "adapter_model.safetensors", 60, (SAY, OPEN), break_tensors),
    "model.gguf": Kind("gguf", "model.gguf", 60, (FROM_GGUF,), break_start),
    "tokenizer.json for gguf": Kind("demo", "tokenizer.json", 60, (TO_GGUF,)),
    "resume.json": Kind("interrupted", f"{STEP}/resume.json", 40, (VERIFY, AGAIN), chunk=FEW),
    "state.safetensors": Kind("interrupted", f"{STEP}/state.safetensors", 40, (VERIFY, AGAIN), break_tensors, FEW),
}
CHUNKS = [  # CI has time for every eighth one
    pytest.param(name, chunk, marks=pytest.mark.matrix if chunk % 8 else ())
    for name, kind in KINDS.items()
    for chunk in range(kind.count // kind.chunk)
]


@pytest.mark.parametrize(("name", "chunk"), CHUNKS)
def test_a_broken_file(name, chunk, seed, cwd, tmp_path):
    kind = KINDS[name]
    good = seed(kind.seed)
    data = (good / kind.file).read_bytes()
    demo = seed("demo")
    for number in range(chunk * kind.chunk, (chunk + 1) * kind.chunk):
        rng = draw(name, number)
        place = linked(good, tmp_path / f"{number}")
        if number % 50 == 49:
            no_file(place / kind.file, rng)
        else:
            break_file(place / kind.file, kind.damage(data, rng))
        command = kind.commands[number % len(kind.commands)]
        attempt(command.format(place, demo=demo, data=tmp_path / "no.jsonl").split(), f"{name} {number}")
        shutil.rmtree(place)
        for left in cwd.iterdir():
            shutil.rmtree(left)
