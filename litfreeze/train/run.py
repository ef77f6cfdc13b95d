"""One fine-tuning run, from an opened checkpoint and a plan to a finished directory.

Every method comes through here; it brings its plan (what trains) and its writer (what is saved)."""

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.fabric import Fabric

from litfreeze.checkpoint.directory import Checkpoint, load_model
from litfreeze.checkpoint.tensors import replace_directory
from litfreeze.checkpoint.trained import Proof
from litfreeze.data.args import DataArgs
from litfreeze.data.prompt import Prompt
from litfreeze.data.samples import Samples, load_samples
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.plan import FreezePlan
from litfreeze.generate.sample import generate_tokens
from litfreeze.model import GPT
from litfreeze.precision import Precision
from litfreeze.tokenizer import Tokenizer
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.loop import Schedule, fit
from litfreeze.train.loss import NextToken
from litfreeze.train.monitor import Monitor
from litfreeze.train.optim import build_optimizer
from litfreeze.train.outcome import Outcome
from litfreeze.train.report import Exchange, Report

MAX_SEQ_LENGTH = 1024  # unless --data.max_seq_length says otherwise

Writer = Callable[[Path, GPT, Mapping[str, Any]], Proof]
"""Saves `model` to a new directory with the manifest's fields, and compares it with what the run began from."""


@dataclass(frozen=True)
class Job:
    """Everything a run needs, settled before the first process starts."""

    method: str  # "full", …: names the default out_dir and stands in the checkpoint
    checkpoint: Checkpoint
    plan: FreezePlan
    writer: Writer
    precision: Precision
    data: DataArgs
    train: TrainArgs  # lr and epochs filled in
    eval: EvalArgs
    out_dir: Optional[Path]
    seed: int
    recipe: str  # YAML of the options, for --config


@dataclass(frozen=True)
class Result:
    """What a run left: where, what it reached, and the proof about its frozen tensors."""

    out_dir: Path
    checkpoint_dir: Path
    outcome: Outcome
    proof: Proof


def run(fabric: Fabric, job: Job) -> Result:
    """The run, on one of `fabric`'s processes. Raises UsageError before training starts, RunError after."""
    if job.out_dir is not None and _used(job.out_dir):
        what = "already holds something" if job.out_dir.is_dir() else "is a file"
        raise UsageError(f"--out_dir {job.out_dir} {what}. Choose another, or move it away.")
    fabric.seed_everything(job.seed, workers=False, verbose=False)
    tokenizer = job.checkpoint.tokenizer()
    prompt = Prompt.choose(job.data.prompt_style, job.checkpoint.prompt, tokenizer, job.data.prompt_args)
    samples = _load_samples(job, tokenizer, prompt)
    prompted = any(len(sample.prompt_tokens) for sample in samples.train)  # plain text has no prompt
    saved_prompt = prompt.to_dict() if prompted else job.checkpoint.prompt
    schedule = Schedule.plan(len(samples.train), job.train, job.eval)
    out_dir = fabric.broadcast(_claim(job.out_dir, job.method) if fabric.is_global_zero else None)

    report = Report(job.checkpoint, job.plan, job.precision, job.train, samples, schedule, fabric.device, job.recipe)
    monitor = Monitor(out_dir, schedule.max_steps, job.train.log_interval, fabric.global_rank)
    monitor.say(report.opening(prompt.style if prompted else None))
    try:
        gpt = load_model(job.checkpoint, lambda n: job.precision.kept(n in job.plan.trained))
        job.plan.apply(gpt)
        model = fabric.setup_module(NextToken(gpt))
        optimizer = fabric.setup_optimizers(build_optimizer(gpt, job.plan, job.train, job.precision.name == "16-mixed"))

        def save(name: str, outcome: Outcome) -> Optional[Proof]:
            proof = None
            if fabric.is_global_zero:
                manifest = _manifest(job, saved_prompt, schedule, outcome)
                proof = _write(job.writer, out_dir / name, gpt, manifest)
                _keep_last(out_dir, job.train.keep_last or 2)
            return fabric.broadcast(proof)

        exchange = Exchange.first(tokenizer, samples.val or samples.train)
        answer_length = job.eval.max_new_tokens
        exchange.before = _answer(fabric, gpt, tokenizer, exchange.prompt_tokens, answer_length)
        outcome = fit(fabric, model, optimizer, samples, schedule, job.train, job.eval, monitor, save, job.seed)
        exchange.after = _answer(fabric, gpt, tokenizer, exchange.prompt_tokens, answer_length)
        proof = save("final", outcome)
        if fabric.is_global_zero and outcome.best_step == outcome.step:
            shutil.rmtree(out_dir / "best", ignore_errors=True)  # an earlier one, and worse than the final
    except KeyboardInterrupt:
        kept = sorted(child.name for child in out_dir.iterdir() if (child / "litfreeze.json").is_file())
        monitor.say(f"Stopped by hand. Kept in {out_dir}: {', '.join(kept) or 'no checkpoint yet'}.")
        raise
    finally:
        monitor.close()
    if fabric.is_global_zero:
        report.write(out_dir, outcome, proof, exchange, monitor.rows)
        monitor.say(report.closing(out_dir, outcome, proof, exchange))
    if proof.frozen_that_changed:
        raise RunError(f"Frozen tensors changed, which is a fault of litfreeze's own; see {out_dir / 'report.md'}.")
    return Result(out_dir, out_dir / "final", outcome, proof)


def _load_samples(job: Job, tokenizer: Tokenizer, prompt: Prompt) -> Samples:
    """The samples, no longer than the model can take; validation at most `--eval.max_samples`, drawn once."""
    block_size = job.checkpoint.config.block_size
    length = job.data.max_seq_length or min(block_size, MAX_SEQ_LENGTH)
    if length > block_size:
        raise UsageError(f"--data.max_seq_length {length} is more than the {block_size} positions this model has.")
    samples = load_samples(job.data, tokenizer, prompt, length)
    most = job.eval.max_samples
    if most is not None and len(samples.val) > most:
        drawn = random.Random(job.data.seed).sample(samples.val, most)
        samples = replace(samples, val=drawn, val_unused=len(samples.val) - most)
    if not samples.val and (job.eval.patience is not None or job.eval.interval is not None):
        raise UsageError("--eval.patience and --eval.interval need validation records, and there are none.")
    top = max(int(sample.tokens.max()) for sample in samples.train + samples.val)
    known = job.checkpoint.config.vocab_size
    if top >= known:
        raise UsageError(
            f"{job.checkpoint.path}: the tokenizer gives id {top}, but the model has {known} embeddings. "
            "The tokenizer belongs to another model."
        )
    return samples


def _claim(out_dir: Optional[Path], method: str) -> Path:
    """A directory of this run's own: the one asked for, or the next free default."""
    number = 1
    while out_dir is None:
        default = Path("out/finetune") / (method if number == 1 else f"{method}-{number}")
        out_dir, number = (None if _used(default) else default), number + 1
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out_dir {out_dir} cannot be made: {error.strerror}.") from None
    return out_dir


def _used(path: Path) -> bool:
    """It is there and holds more than the logs of a run that ended before it saved anything."""
    if not path.is_dir():
        return path.exists()
    return any(child.name not in ("metrics.csv", "tensorboard") for child in path.iterdir())


def _manifest(job: Job, prompt: Optional[dict], schedule: Schedule, outcome: Outcome) -> dict[str, Any]:
    base = job.checkpoint
    return {
        "kind": job.method,
        "base": {"path": str(base.path.resolve()), "weights_hash": base.weights_hash},
        "prompt": prompt,
        "training": {
            "layers": format_layers(job.plan.layers),
            "trained": sorted(job.plan.trained),
            "step": outcome.step,
            "epochs": round(outcome.step / schedule.steps_per_epoch, 3),
            "tokens": outcome.tokens,
            "precision": job.precision.name,
            "before": asdict(outcome.before) if outcome.before else None,
            "after": asdict(outcome.after) if outcome.after else None,
            "recipe": job.recipe,
        },
    }


def _write(writer: Writer, target: Path, gpt: GPT, manifest: Mapping[str, Any]) -> Proof:
    """An earlier `best` stays until the new one is whole."""
    if not target.exists():
        return writer(target, gpt, manifest)
    fresh = target.with_name(f"{target.name}.new")
    proof = writer(fresh, gpt, manifest)
    replace_directory(fresh, target)
    return proof


def _keep_last(out_dir: Path, count: int) -> None:
    for old in sorted(out_dir.glob("step-*"))[:-count]:
        shutil.rmtree(old)


@torch.no_grad()
def _answer(fabric: Fabric, gpt: GPT, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int) -> str:
    """What the model says greedily; every process enters, since every process holds a part of the model."""
    gpt.eval()
    with fabric.autocast():
        ids = list(generate_tokens(gpt, prompt, max_new_tokens, tokenizer.eos_ids))
    return tokenizer.decode(ids)
