"""Training of Llama-3.2-1B's shape on one GPU: tokens/s, MFU and peak memory: python benchmarks/gpu.py

Random weights, streams of fixed length: what trains full, in its last 2 blocks, in blocks 10 and 11 and by LoRA, in
bf16-mixed and bf16-true, by litfreeze and beside it by transformers, PEFT and (with --litgpt_python) litgpt, each in a
process of its own. Prints a Markdown table; README.md in this folder says what its columns mean. With
`--tiny --accelerator cpu` the same script runs on a small shape in less than a minute. Exits 1 if a row failed or the
losses of one did not agree with the others'."""

import argparse
import csv
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

LR, SEED, LORA_R, LORA_ALPHA = 1e-4, 0, 8, 16
WORKS = {"full": (), "last 2": (14, 15), "10,11": (10, 11), "LoRA": ()}  # by the blocks that train in full
PRECISIONS = ("bf16-mixed", "bf16-true")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LOSS_TOLERANCE = 1e-2  # relative, in the first step: bf16 has 8 bits

# FLOP/s of dense bf16 products by data sheet: the first of these words that the device's name has
PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "A40": 150e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table: who does which work."""

    by: str
    work: str
    precision: str
    cache: bool = False
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.work}{', cache full' if self.cache else ''}{', compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Size:
    """How much is trained on: `records` streams of `length` positions are an epoch, of as many steps as warm up."""

    length: int
    batch: int
    warmup: int
    steps: int

    @property
    def records(self) -> int:
        return self.batch * self.warmup


@dataclass
class Told:
    """What a process tells of a row. Memory is the GPU's, or (`reserved` None) what the process had resident."""

    seconds: float = math.nan  # of the steps after warming up
    first_step: float = math.nan
    losses: Sequence[float] = ()
    allocated: int = 0
    reserved: Optional[int] = None
    failed: str = ""


def rows_of(compile_all: bool, litgpt: bool) -> list[Row]:
    """All rows, in the order in which they are run: those at the end are missing if the time is over."""
    ours = [Row("litfreeze", work, precision) for precision in PRECISIONS for work in WORKS]
    cached = [Row("litfreeze", "last 2", precision, cache=True) for precision in PRECISIONS]
    compiled = [Row(row.by, row.work, row.precision, compiled=True) for row in (ours if compile_all else ours[:1])]
    peers = [Row("PEFT" if row.work == "LoRA" else "transformers", row.work, row.precision) for row in ours]
    others = [Row("litgpt", row.work, row.precision) for row in ours if row.work != "LoRA"]
    here = [row for row in peers if find_spec("transformers") and (row.by != "PEFT" or find_spec("peft"))]
    return [*ours, *cached, *here, *compiled, *(others if litgpt else [])]


# --- in a process of its own: before the first row -------------------------------------------------------------------


def prepare(folder: Path, size: Size, tiny: bool, accelerator: str) -> dict[str, Any]:
    """Writes model, text and tokens to `folder`, and tells what is known of this machine and of the works."""
    import torch
    from floor import Choice, batch_rows, step_flops

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.data.args import DataArgs
    from litfreeze.data.prompt import Prompt
    from litfreeze.data.samples import load_samples
    from litfreeze.presets import PRESETS
    from litfreeze.scripts.convert import to_hf
    from litfreeze.scripts.init import setup as init

    shape = {**PRESETS["llama-3.2-1b"], **({**TINY, "vocab_size": 1536} if tiny else {})}
    (folder / "shape.json").write_text(json.dumps({**shape, "eos_token_id": 0}), encoding="utf-8")
    init(out_dir=folder / "drawn", config_file=folder / "shape.json", dtype="bfloat16")
    to_hf(folder / "drawn", folder / "model")
    checkpoint = open_checkpoint(folder / "model")
    tokenizer = checkpoint.tokenizer()
    # Words of one token each, so that every stream is full: nothing is padded or cut anywhere
    tokens = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    words = [word for word in tokens if re.fullmatch(" [a-z]+", word) and len(tokenizer.encode(word)) == 1]
    drawn = random.Random(SEED).choices(words, k=size.records * size.length)  # and behind them the end of the text
    (folder / "text.txt").write_text("".join(drawn), encoding="utf-8")
    data = DataArgs(path=folder / "text.txt", val_split_fraction=0)
    samples = load_samples(data, tokenizer, Prompt.choose(None, None, tokenizer, None), size.length).train
    assert [len(sample.tokens) for sample in samples] == [size.length + 1] * size.records
    (folder / "tokens.json").write_text(json.dumps([s.tokens.tolist() for s in samples]), encoding="utf-8")

    positions = batch_rows(samples[: size.batch], share=False)
    everything = range(checkpoint.config.n_layer)
    flops = {
        work: step_flops(
            checkpoint.config,
            *positions,
            Choice(frozenset(blocks or everything), LORA_R if work == "LoRA" else 0, head=work == "full"),
        )
        for work, blocks in WORKS.items()
    }
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else "this CPU"
    sheet = next((peak for word, peak in PEAKS.items() if re.search(rf"\b{word}\b", name)), None)
    return {
        "device": name,
        "torch": torch.__version__,
        "measured": matmul_rate(device, torch.bfloat16, 1.0),
        "sheet": sheet if on_gpu else None,
        "flops": flops,
        "parameters": sum(math.prod(shape) for _, shape in checkpoint.layout().values()),
    }


# --- in a process of its own: a row ----------------------------------------------------------------------------------


def matmul_rate(device: Any, dtype: Any, seconds: float) -> float:
    """FLOPs per second of a square product, the best seen within `seconds`."""
    import torch

    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, device=device, dtype=dtype)
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        b = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    del b
    return 2 * size**3 / fastest


def run_litfreeze(row: Row, folder: Path, size: Size, accelerator: str) -> Told:
    from litfreeze.data.args import DataArgs
    from litfreeze.finetune.full import setup as full
    from litfreeze.finetune.lora import setup as lora
    from litfreeze.freeze.args import FrozenArgs
    from litfreeze.place import PlaceArgs
    from litfreeze.train.args import EvalArgs, TrainArgs

    blocks = WORKS[row.work]
    method = {"trainable_layers": list(blocks), "save": "delta"} if blocks else {}
    method = {"lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0} if row.work == "LoRA" else method
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (lora if row.work == "LoRA" else full)(
            checkpoint_dir=folder / "model",
            out_dir=Path(place) / "run",
            data=DataArgs(path=folder / "text.txt", val_split_fraction=0, max_seq_length=size.length),
            train=TrainArgs(
                lr=LR, max_steps=size.warmup + size.steps, global_batch_size=size.batch, micro_batch_size=size.batch,
                lr_schedule="constant", lr_warmup_steps=0, beta2=0.999, max_norm=None,
            ),
            eval=EvalArgs(max_new_tokens=1),
            frozen=FrozenArgs(cache="disk" if row.cache else "off", cache_dir=Path(place) / "cache"),
            place=PlaceArgs(row.precision, row.compiled, accelerator, 1),
            seed=SEED,
            **method,
        )  # fmt: skip
        with (Path(place) / "run" / "metrics.csv").open(newline="", encoding="utf-8") as lines:
            steps = [line for line in csv.DictReader(lines) if line["train_loss"]]
    ends = [float(step["seconds"]) for step in steps]
    losses = [float(step["train_loss"]) for step in steps]
    return Told(ends[-1] - ends[size.warmup - 1], ends[0], losses, *memory())


def run_peer(row: Row, folder: Path, size: Size, accelerator: str) -> Told:
    """The loop that a user of transformers, PEFT or litgpt writes, on the same batches."""
    import torch
    import torch.nn.functional as F

    device = torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    mixed = row.precision == "bf16-mixed"
    model, block, logits_of = load_peer(row, folder, torch.float32 if mixed else torch.bfloat16, size)
    chosen = tuple(block.format(i) for i in WORKS[row.work])
    if row.work != "LoRA":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not chosen or any(part in name for part in chosen))
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0.0, fused=True)
    records = torch.tensor(json.loads((folder / "tokens.json").read_text(encoding="utf-8")), device=device)
    losses, ends, began = [], [], time.perf_counter()
    for step in range(size.warmup + size.steps):
        epoch, within = divmod(step, size.warmup)
        order = list(range(size.records))
        random.Random(SEED + epoch).shuffle(order)
        batch = records[order[within * size.batch : (within + 1) * size.batch]]  # (B, T + 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = logits_of(batch[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter() - began)
    return Told(ends[-1] - ends[size.warmup - 1], ends[0], losses, *memory())


def load_peer(row: Row, folder: Path, dtype: Any, size: Size) -> tuple[Any, str, Callable[[Any], Any]]:
    """The peer's model, how the name of a parameter of a block begins, and what gives its logits."""
    if row.by == "litgpt":
        from litgpt import Config
        from litgpt.model import GPT
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from safetensors.torch import load_file

        hf = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
        names = {
            "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
            "n_query_groups": "num_key_value_heads", "head_size": "head_dim", "intermediate_size": "intermediate_size",
            "vocab_size": "vocab_size", "padded_vocab_size": "vocab_size",
        }  # fmt: skip
        shape = {ours: hf[theirs] for ours, theirs in names.items()}
        config, state = Config.from_name("Llama-3.2-1B", **shape, block_size=size.length), {}
        weights = {}
        for file in (folder / "model").glob("*.safetensors"):
            weights |= load_file(file)
        copy_weights_hf_llama(config, {}, state, weights)
        state.setdefault("lm_head.weight", state["transformer.wte.weight"])  # it has no tied head: this one is its own
        model = GPT(config)
        model.load_state_dict(state)
        return model.to(dtype), "transformer.h.{}.", model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    if row.by == "PEFT":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model, "layers.{}.", lambda tokens: model(input_ids=tokens, use_cache=False).logits


def memory() -> tuple[int, Optional[int]]:
    """The most bytes allocated and reserved on the GPU or, without one, resident."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), None


def child(job: dict[str, Any]) -> None:
    """Does what `job` says, and prints a line of JSON for each of its rows; all else goes to stderr."""
    answers, size, folder = sys.stdout, Size(**job["size"]), Path(job["folder"])
    with redirect_stdout(sys.stderr):
        if "rows" not in job:
            print(json.dumps(prepare(folder, size, job["tiny"], job["accelerator"])), file=answers, flush=True)
        for row in (Row(**given) for given in job.get("rows", ())):
            try:
                told = (run_litfreeze if row.by == "litfreeze" else run_peer)(row, folder, size, job["accelerator"])
            except Exception as error:
                text = " ".join(str(error).split())[:120]
                told = Told(failed=f"{type(error).__name__}: {text}")
            print(json.dumps(asdict(told)), file=answers, flush=True)


# --- the processes ---------------------------------------------------------------------------------------------------


def ask(python: object, job: dict[str, Any], seconds: float) -> tuple[list[Any], bool]:
    """What a process answers to `job`, and whether it came to its end: it is stopped when `seconds` are over."""
    words = [str(python), __file__, "--child", json.dumps(job)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not job["tiny"]:
        environment["TORCHINDUCTOR_CACHE_DIR"] = f"{job['folder']}/inductor"  # what was compiled before does not count
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        ended = True
        try:
            printed, _ = process.communicate(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            ended = False
            process.kill()
            printed, _ = process.communicate()
        if ended and process.returncode:
            errors.seek(0)
            print(errors.read()[-2000:], file=sys.stderr)
    return [json.loads(line) for line in printed.splitlines()], ended


def measure(rows: Sequence[Row], args: argparse.Namespace, job: dict[str, Any], until: float) -> dict[Row, Told]:
    """What the processes tell of each row that there was time for."""
    found: dict[Row, Told] = {}
    longest: dict[str, float] = {}  # a process of each contestant took so long
    # What takes no time is done in as few processes as there are contestants
    groups = [[row for row in rows if row.by == by] for by in dict.fromkeys(row.by for row in rows)]
    for group in groups if args.tiny else [[row] for row in rows]:
        by, began = group[0].by, time.monotonic()
        if began + longest.get(by, 0.0) > until:
            continue
        python = args.litgpt_python if by == "litgpt" else sys.executable
        answers, ended = ask(python, {**job, "rows": [asdict(row) for row in group]}, until - began)
        longest[by] = max(longest.get(by, 0.0), time.monotonic() - began)
        failed = {"failed": "its process crashed"}
        for i, row in enumerate(group if ended else group[: len(answers)]):
            found[row] = Told(**(answers[i] if i < len(answers) else failed))
            took = f"{longest[by]:.0f} s for {len(group)}"
            print(f"{row.by}, {row.title}, {row.precision}: {found[row].failed or 'done'} ({took})", file=sys.stderr)
    return found


# --- the table -------------------------------------------------------------------------------------------------------

HEADINGS = ("work", "precision", "by", "tokens/s", "times the peer", "MFU, floor", "MFU, 6N", "peak, GB", "loss")


def cells(row: Row, found: dict[Row, Told], size: Size, known: dict[str, Any]) -> Sequence[str]:
    """The row as the table has it."""
    told, begin = found[row], (row.title, row.precision, row.by)
    if told.failed:
        return *begin, f"failed: {told.failed}", *[""] * (len(HEADINGS) - 4)
    peak = known["sheet"] or known["measured"]
    tokens = size.steps * size.batch * size.length / told.seconds
    floor = size.steps * known["flops"][row.work] / told.seconds / peak
    peers = [other for other in found if (other.work, other.precision) == (row.work, row.precision)]
    fastest = min(
        (found[peer].seconds for peer in peers if peer.by != "litfreeze" and not found[peer].failed), default=0
    )
    held = f"{told.allocated / 1e9:.1f}" + ("" if told.reserved is None else f" ({told.reserved / 1e9:.1f} reserved)")
    return (
        *begin, f"{tokens:,.0f}", f"{fastest / told.seconds:.2f}" if fastest and row.by == "litfreeze" else "",
        f"{100 * floor:.1f} %", f"{600 * known['parameters'] * tokens / peak:.1f} %", held,
        f"{told.losses[0]:.3f} → {told.losses[-1]:.3f}",
    )  # fmt: skip


def disagreements(found: dict[Row, Told]) -> list[str]:
    """The rows whose loss in the first step, from the same weights on the same batch, is not litfreeze's."""
    wrong = []
    for row, told in found.items():
        ours = found.get(Row("litfreeze", row.work, row.precision))
        if not told.failed and ours is not None and not ours.failed:
            first, expected = told.losses[0], ours.losses[0]
            if not abs(first - expected) <= LOSS_TOLERANCE * expected:
                wrong.append(f"{row.by}, {row.title}, {row.precision}: {first:.4f}, where litfreeze has {expected:.4f}")
    return wrong


def notes(rows: Sequence[Row], found: dict[Row, Told], args: argparse.Namespace, known: dict[str, Any]) -> list[str]:
    """What the table does not say by itself."""
    sheet, measured = known["sheet"], f"{known['measured'] / 1e12:,.3g} TFLOP/s measured in bf16 products"
    given = f"{sheet / 1e12:,.0f} TFLOP/s by data sheet ({measured})" if sheet else measured
    lines = [f"{known['device']}, torch {known['torch']}. MFU is of {given}."]
    for row, told in found.items():
        plain = found.get(Row(row.by, row.work, row.precision))
        if row.compiled and plain is not None and not told.failed and not plain.failed:
            lines.append(
                f"Compiled, {row.work} in {row.precision} is {plain.seconds / told.seconds:.2f} times as fast; its "
                f"first step took {told.first_step:.1f} s, without {plain.first_step:.1f} s."
            )
    if missing := [f"{row.title} in {row.precision} by {row.by}" for row in rows if row not in found]:
        lines.append(f"Not run within {args.minutes:g} minutes: {'; '.join(missing)}.")
    absent = [name for name in ("transformers", "peft") if not find_spec(name)]
    if absent:
        lines.append(f"Left out, since not installed: {', '.join(absent)}.")
    if not args.litgpt_python:
        lines.append("litgpt was left out: no --litgpt_python was given.")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small shape and few steps; figures then mean nothing")
    parser.add_argument("--accelerator", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="what trains; by default all")
    parser.add_argument("--compile", action="store_true", help="each of litfreeze's rows compiled too, not one alone")
    parser.add_argument("--minutes", type=float, default=8, help="what has not been run by then is left out, and told")
    parser.add_argument("--batch", type=int, help="streams in a step; 8 unless said")
    parser.add_argument("--steps", type=int, help="measured ones, after 5 that warm up; 20 unless said")
    parser.add_argument("--litgpt_python", type=Path, help="the python of an environment with litgpt")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    size = (
        Size(32, args.batch or 2, 2, args.steps or 3) if args.tiny else Size(1024, args.batch or 8, 5, args.steps or 20)
    )
    rows = [row for row in rows_of(args.compile, args.litgpt_python is not None) if row.work in args.works]
    with tempfile.TemporaryDirectory() as folder:
        job = {"folder": folder, "size": asdict(size), "tiny": args.tiny, "accelerator": args.accelerator}
        answers, ended = ask(sys.executable, job, until - time.monotonic())
        if not answers:
            print("No model could be made" + ("." if ended else f" within {args.minutes:g} minutes."), file=sys.stderr)
            return 1
        found, known = measure(rows, args, job, until), answers[0]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(cells(row, found, size, known) for row in rows if row in found)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    wrong = disagreements(found)
    print("\n" + "\n".join([*notes(rows, found, args, known), *(f"LOSSES DIFFER: {line}" for line in wrong)]))
    return int(bool(wrong) or any(told.failed for told in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
