"""What a run tells the person: before it starts, when it is done, and in report.md."""

import json
import resource
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.trained import Proof
from litfreeze.config import WITH_PICTURES
from litfreeze.confusion import table
from litfreeze.data.shelf import learned_of, lengths_of
from litfreeze.data.split import Samples
from litfreeze.demo import MODEL_DIR
from litfreeze.fields import DROPOUT
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.memory import Memory, beside_everything, describe_memory
from litfreeze.freeze.plan import FreezePlan, Part
from litfreeze.freeze.savings import Pass, Rows, describe_savings
from litfreeze.freeze.table import summary
from litfreeze.freeze.table import table as plan_table
from litfreeze.freeze.thaw import Stage
from litfreeze.outputs import FINAL, RECIPE, RESULTS
from litfreeze.sizes import megabytes
from litfreeze.train.exchange import Exchange
from litfreeze.train.job import Job
from litfreeze.train.monitor import Monitor
from litfreeze.train.outcome import Outcome, Scores
from litfreeze.train.pictures import draw_blocks, draw_confusion, draw_losses
from litfreeze.train.schedule import Schedule
from litfreeze.train.speed import measure_speed
from litfreeze.train.watch import ROWS, Seen
from litfreeze.whole import write_text


@dataclass(frozen=True)
class Report:
    """The facts of a run that are known before its first step."""

    job: Job
    samples: Samples
    schedule: Schedule
    device: torch.device
    stages: Sequence[Stage]

    def opening(self, prompt_style: Optional[str]) -> str:
        """What will train, on what, for how long, and what it will cost."""
        config, schedule = self.job.checkpoint.config, self.schedule
        tokens, _ = self.micro_batch()
        dropout = [f"{name} {value}" for name in DROPOUT if (value := self.job.checkpoint.hf_config.get(name))]
        return "\n".join(
            [
                f"Model     {self._name()} ({config.n_layer} blocks, {self.job.plan.n_parameters:,} parameters)",
                *(["          The language model of one that also takes pictures."] if self._sees() else []),
                *(f"          {note}" for note in self.job.notes),
                f"Data      {self.samples.describe().replace(chr(10), chr(10) + ' ' * 10)}",
                f"          {_what_is_read(prompt_style, config.labels)}",
                f"Run       {schedule.max_steps} steps of {self.job.train.global_batch_size} samples "
                f"(epochs: {schedule.epochs:.3g}), lr {self.job.train.lr:g} {self.job.train.lr_schedule} "
                f"after {schedule.warmup} warmup steps, {self.job.precision.name} on {self.device.type}"
                f"{', compiled' if self.job.compile else ''}",
                *([f"          Without dropout (config.json has {', '.join(dropout)})."] if dropout else []),
                f"Trains    {summary(self.job.plan)}",
                *([f"          {self.job.thawing.describe()}"] if self.job.thawing else []),
                "",
                plan_table(self.job.plan, self.job.train.lr),
                "",
                "Memory at its peak, estimated for "
                f"micro-batches of {self.job.train.micro_batch_size} (up to {tokens:,} tokens):",
                describe_memory(*self.memory()),
                "",
            ]
        )

    def _sees(self) -> bool:
        return self.job.checkpoint.whole.in_transformers in WITH_PICTURES

    def arithmetic(self, stage: Stage, cache: str, kept: Optional[int]) -> str:
        """What an epoch of `stage` will cost, and what freezing saves of it. `cache` says what became of the frozen
        prefix."""
        rows = Rows.of(self.samples.train)
        passes = (self.epoch_of(plan, rows) for plan in (stage.plan, FreezePlan.everything(self.job.plan.config)))
        return "\n".join([describe_savings(*passes, rows.tokens, kept), "", _of_cache(cache), ""])

    def epoch_of(self, plan: FreezePlan, rows: Rows) -> Pass:
        """What an epoch over the training records, `rows`, is if this plan trains."""
        speed = measure_speed(
            plan,
            self.job.precision,
            self.job.checkpoint.dtype,
            self.device,
            self.job.train.micro_batch_size,
            rows.tokens // len(self.samples.train),
            self.job.train.activation_checkpointing,
        )
        return Pass.of(plan, rows, speed, self.schedule.steps_per_epoch)

    def next_stage(self, stage: Stage, last: Stage, cache: str) -> str:
        """What begins to train and what ceases to and, where the frozen prefix is another one now, what became of it:
        `cache`, as above."""
        now, before = set(stage.plan.layers), set(last.plan.layers)
        changes = [
            f"{word} {format_layers(blocks)}"
            for word, blocks in (("thaws", now - before), ("freezes", before - now))
            if blocks
        ]
        told = f"Step {stage.start}: {', '.join(changes)}; {stage.plan.n_trained:,} parameters train."
        return told if stage.untouched == last.untouched else f"{told}\n{_of_cache(cache)}"

    def closing(self, out_dir: Path, outcome: Outcome, proof: Proof, exchange: Exchange, monitor: Monitor) -> str:
        """What came of it, where it lies, and what to type next."""
        final = shlex.quote(str(out_dir / FINAL))
        question = shlex.quote(exchange.question)
        lines = ["", *self._results(outcome, proof, monitor), "", *_dialogue(exchange), ""]
        if outcome.stopped:
            lines.append(f"Stopped early: {outcome.stopped}.")
        lines += [
            f"Written   {final}   (and {out_dir / 'report.md'}, {', '.join(self._beside(monitor, outcome))})",
            f"Next      litfreeze {self._ask(final, question)}",
            f"          {self._export(final, out_dir)}",
        ]
        return "\n".join(lines)

    def write(self, out_dir: Path, outcome: Outcome, proof: Proof, exchange: Exchange, monitor: Monitor) -> None:
        """report.md, its pictures, results.json and recipe.yaml in `out_dir`."""
        labels, scores = self.job.checkpoint.config.labels, outcome.after
        draw_losses(out_dir / "loss.png", monitor.rows, "record" if labels else "target token")
        if scores is not None and scores.confusion is not None:
            draw_confusion(out_dir / "confusion.png", scores.confusion, labels)
        if monitor.seen:
            draw_blocks(out_dir / "blocks.png", monitor.seen, self.job.plan.n_layer)
        fence = "```"
        write_text(out_dir / RECIPE, self.job.recipe)
        write_text(out_dir / RESULTS, json.dumps(self.figures(outcome), indent=2) + "\n")
        write_text(
            out_dir / "report.md",
            "\n".join(
                [
                    f"# {summary(self.job.plan)}",
                    "",
                    f"Base: {self._name()}. {self.samples.describe()}",
                    "",
                    *[f"- {line}" for line in self._results(outcome, proof, monitor)],
                    "",
                    "![loss](loss.png)",
                    "",
                    *_of_classes(scores, labels),
                    *_of_blocks(monitor.seen, self.job.checkpoint.config.new_blocks),
                    "## One validation record",
                    "",
                    fence,
                    *_dialogue(exchange),
                    fence,
                    "",
                    "## What trained",
                    "",
                    fence,
                    plan_table(self.job.plan, self.job.train.lr),
                    fence,
                    "",
                    "## Recipe",
                    "",
                    "`litfreeze finetune … --config recipe.yaml` repeats this run.",
                    "",
                    fence + "yaml",
                    self.job.recipe.rstrip(),
                    fence,
                    "",
                ]
            ),
        )

    def figures(self, outcome: Outcome) -> dict[str, Any]:
        """What the run came to, for programs."""
        reached = {name: None if value == float("inf") else value for name, value in asdict(outcome).items()}
        return {
            "method": self.job.method,
            "layers": format_layers(self.job.plan.layers),
            "trained_parameters": self.job.plan.n_trained,
            "parameters": self.job.plan.n_parameters,
            "epochs": outcome.step / self.schedule.steps_per_epoch,
            "peak_memory": peak_memory(self.device),
            **reached,
        }

    def _ask(self, final: str, question: str) -> str:
        if self.job.checkpoint.config.labels:
            return f"classify --checkpoint_dir {final} --text {question}"
        return f"generate --checkpoint_dir {final} --prompt {question}"

    def _export(self, final: str, out_dir: Path) -> str:
        if self.job.plan.lora is not None:
            return f"litfreeze merge_lora --checkpoint_dir {final}"
        return f"litfreeze convert to_hf --checkpoint_dir {final} --out_dir {shlex.quote(str(out_dir / 'hf'))}"

    def _name(self) -> str:
        path = self.job.checkpoint.path
        return "the embedded demo model" if path == MODEL_DIR else origin(path) or str(path)

    @staticmethod
    def _beside(monitor: Monitor, outcome: Outcome) -> list[str]:
        confusion = outcome.after is not None and outcome.after.confusion is not None
        pictures = ["loss.png", *(["confusion.png"] if confusion else []), *(["blocks.png"] if monitor.seen else [])]
        return [*pictures, "metrics.csv", RECIPE]

    def _results(self, outcome: Outcome, proof: Proof, monitor: Monitor) -> list[str]:
        lines = []
        if outcome.before:
            lines.append(f"Before    {outcome.before.describe()}")
        if outcome.after:
            lines.append(f"After     {outcome.after.describe()}")
            if outcome.best_step not in (0, outcome.step):
                kept = "kept in best/" if outcome.best_kept == outcome.best_step else "not kept"
                lines.append(f"Best      validation loss {outcome.best_loss:.4f} at step {outcome.best_step}, {kept}")
        lines.append(f"Frozen    {proof.describe()}")
        if monitor.seen:
            lines.append(f"Moved     {_most_moved(monitor.seen)}")
        if epochs := _epoch_seconds(monitor.rows, self.schedule.steps_per_epoch):
            lines.append(f"Epochs    {', '.join(f'{seconds:.1f}' for seconds in epochs[:10])} s of training each")
        lines.append(
            f"Speed     {outcome.step} steps in {outcome.seconds:.1f} s "
            f"({outcome.wall_seconds:.1f} s with validating and saving), "
            f"{outcome.tokens / max(outcome.seconds, 1e-9):,.0f} tokens/s, peak memory {describe_peak(self.device)}"
        )
        return lines

    def memory(self) -> tuple[Memory, Memory]:
        """Of the stage that needs the most, and of training everything."""
        alike = {(stage.plan.n_trained, stage.plan.lowest): stage.plan for stage in self.stages}
        job = self.job
        return beside_everything(
            alike.values(), job.precision, job.checkpoint.dtype, *self.micro_batch(), thrift=job.thrift
        )

    def micro_batch(self) -> tuple[int, int]:
        """Tokens and targets in the largest micro-batch that can happen."""
        count = self.job.train.micro_batch_size
        lengths, targets = lengths_of(self.samples.train) - 1, np.sort(learned_of(self.samples.train))
        return min(count, len(lengths)) * int(lengths.max()), int(targets[-count:].sum())


def _what_is_read(prompt_style: Optional[str], labels: Sequence[str]) -> str:
    if labels:
        return "Plain text; after the last token of each comes its class."
    return f"Prompt style: {prompt_style}." if prompt_style else "Plain text."


def _of_cache(told: str) -> str:
    return "Cache     " + told.replace("\n", "\n" + " " * 10)


def _last_looks(seen: Sequence[Seen]) -> dict[Part, tuple[Seen, Seen]]:
    """The first and the last look at each part."""
    looks: dict[Part, tuple[Seen, Seen]] = {}
    for one in seen:
        looks[one.part] = looks.get(one.part, (one, one))[0], one
    return looks


def _most_moved(seen: Sequence[Seen]) -> str:
    last = sorted((last for _, last in _last_looks(seen).values()), key=lambda one: -one.drift)
    told = ", ".join(f"{one.part} by {100 * one.drift:.2g} %" for one in last[:4])
    if len(last) > 4:
        told += f", … least {last[-1].part} by {100 * last[-1].drift:.2g} %"
    return f"{told} of its weights' length (estimated at step {seen[-1].step}; blocks.png has all)"


def _of_blocks(seen: Sequence[Seen], new: Sequence[int]) -> list[str]:
    """A section of report.md."""
    if not seen:
        return []
    lines = [
        "## What the blocks did",
        "",
        "| | gradient norm, first and last look | a step moves it by | moved since the start by |",
        "| --- | --- | --- | --- |",
    ]
    looks = _last_looks(seen)
    for part in sorted(looks, key=lambda part: (isinstance(part, str), part)):
        first, last = looks[part]
        name = f"block {part}{' (new)' if part in new else ''}" if isinstance(part, int) else part
        lines.append(
            f"| {name} | {first.grad_norm:.2g} (step {first.step}), {last.grad_norm:.2g} (step {last.step}) "
            f"| {100 * last.update_ratio:.2g} % | {100 * last.drift:.2g} % (step {last.step}) |"
        )
    told = f"Shares of the length of its weights, from {ROWS} rows of each matrix; an adapter counts as what it makes."
    return [*lines, "", told, "", "![blocks](blocks.png)", ""]


def _of_classes(scores: Optional[Scores], labels: Sequence[str]) -> list[str]:
    """A section of report.md."""
    if scores is None or scores.confusion is None:
        return []
    return ["## The classes", "", *table(np.array(scores.confusion), labels), "", "![confusion](confusion.png)", ""]


def _epoch_seconds(rows: list[dict[str, Any]], steps_per_epoch: int) -> list[float]:
    """Training seconds of every whole epoch, from the rows of metrics.csv: of those whose two ends were logged."""
    until = {0: 0.0} | {row["step"]: row["seconds"] for row in rows if row.get("seconds") is not None}
    ends = [step for step in until if step % steps_per_epoch == 0 and step - steps_per_epoch in until]
    return [until[step] - until[step - steps_per_epoch] for step in ends]


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process held: on the GPU if it trains there, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_peak(device: torch.device) -> str:
    return megabytes(peak_memory(device)) + (" on the GPU" if device.type == "cuda" else "")


def _dialogue(exchange: Exchange) -> list[str]:
    return [
        f"{exchange.given:<10}{_shorten(exchange.prompt)}",
        f"Expected  {_shorten(exchange.expected)}",
        f"Before    {_shorten(exchange.before)}",
        f"After     {_shorten(exchange.after)}",
    ]


def _shorten(text: str, width: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
