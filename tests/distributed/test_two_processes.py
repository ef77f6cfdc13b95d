"""Two processes train as one does, whoever starts them and however what trains lies on them."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import litfreeze
from litfreeze.demo import MODEL_DIR, TRAIN_FILE

# An odd global batch, so that one process runs out of samples while the other has some left; every process enters every
# validation, look, save and answer
STEPS = [
    "--accelerator", "cpu", "--train.max_steps", "4", "--train.global_batch_size", "7", "--train.micro_batch_size", "2",
    "--train.lr", "1e-4", "--eval.interval", "1", "--eval.max_samples", "9", "--train.watch_interval", "1",
    "--train.save_interval", "1",
]  # fmt: skip
PLANS = {
    "full": "full --save_dtype float32",
    "selective": "full --trainable_layers 5,11 --trainable_extra final_norm --save_dtype float32",
    "lora": "lora --trainable_layers 0,1 --full_layers 11 --lora_dropout 0",
    "unfreezing": "full --unfreeze 0:11;2:9,10;3:freeze:11 --save_dtype float32",
    "classifier": "full --task classification --trainable_layers 11 --save_dtype float32",
}
PLANS = {name: [word.replace("freeze:", "freeze ") for word in words.split()] for name, words in PLANS.items()}


# Pairs beside those that CI tries: pytest tests/distributed -m matrix
MATRIX = pytest.mark.matrix
DDP, FSDP1 = (pytest.param(strategy, marks=MATRIX) for strategy in ("ddp", "fsdp1"))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "litfreeze", "finetune", *map(str, words)]


def run(words: list[str], **more) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **more)


def reached(out_dir: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms, in their order, and the final weights."""
    columns = ("train_loss", "grad_norm", "val_loss")
    with (out_dir / "metrics.csv").open(encoding="utf-8") as lines:
        losses = [float(row[column]) for row in csv.DictReader(lines) for column in columns if row[column]]
    return losses, load_file(next((out_dir / "final").glob("*.safetensors")))


def agree(ours: Path, alone: Path) -> None:
    (losses, weights), (single, others) = reached(ours), reached(alone)
    assert len(losses) == len(single) and losses == pytest.approx(single, rel=1e-5)
    assert set(weights) == set(others)
    assert all(torch.allclose(weights[name], others[name], rtol=0, atol=1e-5) for name in others)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder in which one process has trained a plan."""
    place = tmp_path_factory.mktemp("alone")

    def of(plan: str) -> Path:
        if not (place / plan).exists():
            done = run(command(*PLANS[plan], *STEPS, "--devices", 1, "--out_dir", place / plan))
            assert done.returncode == 0, done.stderr
        return place / plan

    return of


IN_CI = {"ddp": ("selective",), "fsdp": ("selective", "classifier"), "fsdp1": ("selective",)}


@pytest.mark.parametrize(
    ("plan", "strategy"),
    [
        pytest.param(plan, strategy, marks=() if plan in tried else MATRIX)
        for strategy, tried in IN_CI.items()
        for plan in PLANS
    ],
)
def test_the_same_losses_and_the_same_weights(tmp_path, alone, plan, strategy):
    out = tmp_path / "two"
    done = run(command(*PLANS[plan], *STEPS, "--devices", 2, "--strategy", strategy, "--out_dir", out))
    assert done.returncode == 0, done.stderr
    agree(out, alone(plan))
    if plan in ("selective", "unfreezing"):
        weights, base = reached(out)[1], load_file(MODEL_DIR / "litfreeze.safetensors")
        trained = {"selective": ("blocks.5.", "blocks.11.", "final_norm."), "unfreezing": ("blocks.9.", "blocks.1")}[
            plan
        ]
        frozen = [name for name in weights if not name.startswith(trained)]
        assert len(frozen) > 70 and all(torch.equal(weights[name], base[name].float()) for name in frozen)
    if plan == "classifier":
        confusions = [
            json.loads((place / "results.json").read_text(encoding="utf-8"))["after"]["confusion"]
            for place in (out, alone(plan))
        ]
        assert confusions[0] == confusions[1] and sum(map(sum, confusions[0])) == 9


@MATRIX
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_other_precisions(tmp_path, precision):
    """Two processes add up in another order than one, which 16 bits round."""
    losses = {}
    for strategy in ("auto", "ddp", "fsdp", "fsdp1"):
        own = ["--devices", 1 if strategy == "auto" else 2, "--strategy", strategy, "--out_dir", tmp_path / strategy]
        done = run(command(*PLANS["selective"], *STEPS, "--train.max_steps", "2", "--precision", precision, *own))
        assert done.returncode == 0, done.stderr
        losses[strategy] = reached(tmp_path / strategy)[0]
    assert all(found == pytest.approx(losses["auto"], rel=2e-2) for found in losses.values())


@MATRIX
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp1"])
def test_activations_computed_again(tmp_path, alone, strategy):
    words = [*PLANS["unfreezing"], *STEPS, "--train.activation_checkpointing", "--devices", 2, "--strategy", strategy]
    done = run(command(*words, "--out_dir", tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    agree(tmp_path / "two", alone("unfreezing"))


@MATRIX
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp1"])
def test_new_blocks(tmp_path, strategy):
    good = run([sys.executable, "-m", "litfreeze", "expand", "--new_blocks", "2", "--out_dir", tmp_path / "deeper"])
    assert good.returncode == 0, good.stderr
    words = ["full", "--checkpoint_dir", tmp_path / "deeper", "--data", TRAIN_FILE, "--trainable_layers", "new"]
    for processes in (1, 2):
        own = ["--devices", processes, "--strategy", strategy, "--out_dir", tmp_path / str(processes)]
        done = run(command(*words, *STEPS, "--save_dtype", "float32", *own))
        assert done.returncode == 0, done.stderr
    agree(tmp_path / "2", tmp_path / "1")


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")


@pytest.mark.parametrize(
    ("plan", "strategy", "more"),
    [
        pytest.param("selective", "fsdp", "--shard_frozen", marks=MATRIX),
        ("lora", "fsdp", "--shard_frozen"),
        pytest.param("selective", "ddp", "--compile", marks=[needs_compiler, MATRIX]),
        pytest.param("selective", "fsdp", "--compile", marks=[needs_compiler, MATRIX]),
        pytest.param("selective", "fsdp1", "--compile", marks=[needs_compiler, MATRIX]),
    ],
)
def test_frozen_weights_may_lie_on_both_and_blocks_be_compiled(tmp_path, alone, plan, strategy, more):
    words = [*PLANS[plan], *STEPS, "--devices", 2, "--strategy", strategy, more, "--out_dir", tmp_path / "two"]
    done = run(command(*words))
    assert done.returncode == 0, done.stderr
    agree(tmp_path / "two", alone(plan))
    assert "frozen tensors are bit-identical to the base" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--strategy fsdpp", "auto, ddp, fsdp, fsdp1"),
        ("--shard_frozen", "--shard_frozen needs --strategy fsdp"),
        ("--shard_frozen --strategy fsdp --devices 2 --cache disk", "--shard_frozen keeps nothing, and --cache disk"),
        ("--strategy fsdp --devices 2 --train.optimizer muon", "does not go with --train.optimizer muon yet"),
        *(
            pytest.param(words, told, marks=MATRIX)
            for words, told in (
                (
                    "--strategy fsdp --devices 2 --stream_frozen --trainable_layers 11",
                    "not go with --stream_frozen yet",
                ),
                (
                    "--strategy fsdp --devices 2 --shard_frozen --lisa_layers 2",
                    "beside blocks that thaw",
                ),
                ("--strategy fsdp1 --devices 2 --shard_frozen", "--strategy fsdp1 does not go with --shard_frozen"),
            )
        ),
    ],
)
def test_what_does_not_go_together_is_told(tmp_path, words, told):
    wrong = run(command("full", *words.split(), "--accelerator", "cpu", "--out_dir", tmp_path / "run"))
    assert wrong.returncode == 2 and told in wrong.stderr, wrong.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("2", "fsdp"), ("1", "auto")),
        pytest.param(("1", "auto"), ("2", "fsdp"), marks=MATRIX),
        pytest.param(("2", "ddp"), ("2", "fsdp1"), marks=MATRIX),
        pytest.param(("2", "fsdp1"), ("2", "fsdp"), marks=MATRIX),
    ],
)
def test_a_run_goes_on_with_other_processes_than_it_began_with(tmp_path, alone, first, then):
    """What is saved does not tell how many there were."""
    out = tmp_path / "run"
    processes, strategy = first
    words = [*PLANS["unfreezing"], *STEPS, "--devices", processes, "--strategy", strategy, "--out_dir", out]
    cut = stopped(words, "SIGINT", step=3, rank=int(processes) - 1)
    assert cut.returncode == 130, cut.stderr
    assert f"Go on with: litfreeze finetune full --resume {out}" in cut.stdout
    assert [path.name for path in sorted((out / "resume").iterdir())][-1] == "step-000003"
    done = run(command("full", "--resume", out, "--devices", then[0], "--strategy", then[1]))
    assert done.returncode == 0, done.stderr
    agree(out, alone("unfreezing"))


def stopped(words: list[object], number: str, step: int, rank: int) -> subprocess.CompletedProcess:
    """A run of which one process gets a signal in the middle of a step."""
    told = {"STOP_SIGNAL": number, "STOP_STEP": str(step), "STOP_RANK": str(rank)}
    script = Path(__file__).with_name("stopping.py")
    return run([sys.executable, str(script), "finetune", *map(str, words)], env={**os.environ, **told})


@pytest.mark.parametrize(
    ("rank", "strategy"),
    [(1, "fsdp"), *(pytest.param(*pair, marks=MATRIX) for pair in [(0, "ddp"), (1, "ddp"), (0, "fsdp"), (1, "fsdp1")])],
)
def test_when_one_is_lost_the_others_stop_and_say_so(tmp_path, alone, rank, strategy):
    out = tmp_path / "run"
    words = [*PLANS["selective"], *STEPS, "--devices", 2, "--strategy", strategy, "--out_dir", out]
    began = time.monotonic()
    lost = stopped(words, "SIGKILL", step=3, rank=rank)
    assert time.monotonic() - began < 60
    assert lost.returncode != 0
    if rank == 1:
        assert "error: Another process of this run was lost" in lost.stderr and "Traceback" not in lost.stderr
        assert f"--resume {out}" in lost.stdout
    done = run(command("full", "--resume", out, "--devices", 2, "--strategy", strategy))
    assert done.returncode == 0, done.stderr
    agree(out, alone("selective"))


def test_what_is_wrong_is_told_once(tmp_path):
    for words in (["--data", "gone.jsonl"], ["--out_dir", str(tmp_path)], ["--train.lr_warmup_steps", "90"]):
        (tmp_path / "something").touch()
        wrong = run(command("full", *words, *STEPS, "--devices", 2), cwd=tmp_path)
        told = [line for line in wrong.stderr.splitlines() if "error" in line]
        assert wrong.returncode == 2 and len(told) == 1 and told[0].startswith("error: "), wrong.stderr


@pytest.mark.parametrize("strategy", [DDP, "fsdp", FSDP1])
def test_two_hosts_meet_by_torchrun(tmp_path, alone, strategy):
    """Each has an agent of its own, which finds the other by an address and a port. What they find there is this
    process: an agent that serves the other may leave while that one still waits for its word (torch 2.13)."""
    out, store = tmp_path / "two", torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-id", "one", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}",
             "--rdzv-conf", "is_host=0", "--local-addr", f"127.0.0.{host + 1}",
             "-m", "litfreeze", "finetune", *PLANS["selective"], *STEPS, "--strategy", strategy,
             "--out_dir", str(out)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    told = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    agree(out, alone("selective"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "litfreeze"]
FABRIC = [
    Path(sys.executable).with_name("fabric"), "run", "--accelerator", "cpu", "--devices", "2",
    Path(litfreeze.__file__).with_name("__main__.py"), "--",
]  # fmt: skip


@pytest.mark.parametrize(
    "launcher", [pytest.param(TORCHRUN, id="torchrun"), pytest.param(FABRIC, id="fabric run", marks=MATRIX)]
)
def test_others_start_them(tmp_path, alone, launcher):
    done = run([*launcher, "finetune", *PLANS["selective"], *STEPS, "--out_dir", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    agree(tmp_path / "two", alone("selective"))
