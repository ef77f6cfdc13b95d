"""What a run leaves in its folder on its way: checkpoints, and the point to go on from."""

import hashlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch

from litfreeze.checkpoint.resume import read_facts, write_resume
from litfreeze.checkpoint.tensors import replace_directory
from litfreeze.checkpoint.trained import Proof, write_trained
from litfreeze.data.samples import Samples
from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.thaw import Stage
from litfreeze.model import GPT
from litfreeze.outputs import BEST, FINAL, RESUME
from litfreeze.train.job import Job
from litfreeze.train.loop import Schedule
from litfreeze.train.outcome import Outcome, Scores


@dataclass(frozen=True)
class Keeper:
    """Writes the folder `out_dir` of one run. On one process only."""

    job: Job
    out_dir: Path
    samples: Samples
    schedule: Schedule
    stages: Sequence[Stage]
    prompt: Optional[dict[str, Any]]  # the style to save with the checkpoints

    def checkpoint(self, name: str, gpt: GPT, plan: FreezePlan, outcome: Outcome) -> Optional[Proof]:
        """The final one as `--save` says and with its proof; others with what trained alone, unless that is everything.
        `plan` is what has trained so far. An earlier checkpoint of that name stays until the new one is whole."""
        separable = plan.trained != set(plan.sizes)
        if name != FINAL:
            return self._write(name, gpt, plan, outcome, whole=not separable, prove=False)
        if self.job.save == "both" and separable:
            self._write(f"{FINAL}-delta", gpt, plan, outcome, whole=False, prove=False)
        return self._write(FINAL, gpt, plan, outcome, whole=self.job.save != "delta" or not separable, prove=True)

    def interval(
        self,
        name: str,
        gpt: GPT,
        plan: FreezePlan,
        optimizer: torch.optim.Optimizer,
        outcome: Outcome,
        more: Mapping[str, Any],
    ) -> None:
        """A checkpoint on the way and the point to go on from, with what `more` it needs; of the checkpoints only the
        last few stay."""
        self.checkpoint(name, gpt, plan, outcome)
        reached = {name: value for name, value in asdict(outcome).items() if value != float("inf")}
        facts = {
            "method": self.job.method,
            "recipe": self.job.recipe,
            "folder": str(Path.cwd()),
            "outcome": reached,
            **more,
            **self._fixed(),
        }
        write_resume(self.out_dir, gpt, plan.trained, optimizer, facts)
        for old in sorted(self.out_dir.glob("step-*"))[: -(self.job.train.keep_last or 2)]:
            shutil.rmtree(old)

    def point(self) -> tuple[Outcome, dict[str, Any]]:
        """Where the interrupted run stood, and all that was kept with it. Raises UsageError if there is nothing to go
        on from, or what the run was made of has changed."""
        facts = read_facts(self.out_dir)
        for name, value in self._fixed().items():
            if facts.get(name) != value:
                raise UsageError(
                    f"--resume {self.out_dir}: the {name} of this run changed since it was interrupted. "
                    "Put it back, or start a new run."
                )
        reached = facts["outcome"]
        scores = {name: Scores(**reached[name]) for name in ("before", "after") if reached[name] is not None}
        return Outcome(**{**reached, **scores}), facts

    def done(self, outcome: Outcome) -> None:
        """Removes what only an unfinished run needs, and an earlier best checkpoint that the final one has beaten."""
        shutil.rmtree(self.out_dir / RESUME, ignore_errors=True)
        if outcome.best_step == outcome.step:
            shutil.rmtree(self.out_dir / BEST, ignore_errors=True)

    def stopped(self) -> str:
        """What is there, and how to go on, after an interruption."""
        kept = sorted(child.name for child in self.out_dir.iterdir() if (child / "litfreeze.json").is_file())
        told = f"Stopped by hand. Kept in {self.out_dir}: {', '.join(kept) or 'no checkpoint yet'}."
        if (self.out_dir / RESUME).is_dir():
            told += f"\nGo on with: litfreeze finetune {self.job.method} --resume {shlex.quote(str(self.out_dir))}"
        return told

    def _write(
        self, name: str, gpt: GPT, plan: FreezePlan, outcome: Outcome, whole: bool, prove: bool
    ) -> Optional[Proof]:
        job, known = self.job, self._manifest(plan, outcome)

        def write(place: Path) -> Optional[Proof]:
            return write_trained(place, job.checkpoint, gpt, plan, known, whole, prove, job.save_dtype)

        return replace_directory(self.out_dir / name, write)

    def _manifest(self, plan: FreezePlan, outcome: Outcome) -> dict[str, Any]:
        job = self.job
        return {
            "kind": job.method,
            "prompt": self.prompt,
            "training": {
                "began_from": str(job.checkpoint.path.resolve()),
                "layers": format_layers(plan.layers),
                "trained": sorted(plan.trained),
                "lr": job.train.lr,
                "lora_plus_ratio": job.plan.lora_plus_ratio,
                "step": outcome.step,
                "epochs": round(outcome.step / self.schedule.steps_per_epoch, 3),
                "tokens": outcome.tokens,
                "precision": job.precision.name,
                "before": outcome.before and asdict(replace(outcome.before, confusion=None)),
                "after": outcome.after and asdict(replace(outcome.after, confusion=None)),
                "recipe": job.recipe,
            },
            "history": job.checkpoint.history,
        }

    def _fixed(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation, by the word a person knows."""
        job = self.job
        planned = sorted(job.plan.trained)
        if len(self.stages) > 1:
            planned += [f"{stage.start} {stage.plan.layers}" for stage in self.stages]
        digest = hashlib.sha256()
        for sample in self.samples.train + self.samples.val:
            digest.update(sample.tokens.tobytes() + b"|" + sample.labels.tobytes())
        checkpoint = job.checkpoint
        return {
            "base": checkpoint.whole.weights_hash,
            "checkpoint": checkpoint.weights_hash,
            "adapter": checkpoint.lora and checkpoint.lora.to_dict(),
            "data": digest.hexdigest(),
            "plan": hashlib.sha256("\n".join(planned).encode()).hexdigest(),
            "steps": self.schedule.max_steps,
        }
