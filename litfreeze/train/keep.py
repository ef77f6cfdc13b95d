"""What a run leaves in its folder on its way: checkpoints, and the point to go on from."""

import hashlib
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from litfreeze.checkpoint.resume import Point, newest_point, points, weights_of, write_point
from litfreeze.checkpoint.trained import Proof, write_trained
from litfreeze.data.hf_datasets import is_on_hub
from litfreeze.data.split import Samples
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.optimizers import state_bytes
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.thaw import Stage
from litfreeze.outputs import BEST, FINAL, RECIPE, RESUME, kept_steps, step_of
from litfreeze.sizes import megabytes
from litfreeze.train.job import Job
from litfreeze.train.outcome import Outcome, Scores
from litfreeze.train.schedule import Schedule
from litfreeze.whole import clean_directory, remove_directory, replace_directory, write_text

KEPT = 2  # checkpoints on the way, and points to go on from, unless said: if the last is damaged, one is behind it


@dataclass(frozen=True)
class Keeper:
    """Writes the folder `out_dir` of one run. On one process only."""

    job: Job
    out_dir: Path
    samples: Samples
    schedule: Schedule
    stages: Sequence[Stage]
    prompt: Optional[dict[str, Any]]  # the style to save with the checkpoints

    @property
    def keep(self) -> int:
        """How many checkpoints on the way, and how many points to go on from, stay."""
        return self.job.train.keep_last or KEPT

    def most(self) -> dict[str, int]:
        """The most bytes that the run will keep at one time, by what they are for."""
        sizes = self._sizes
        needed = {"the final checkpoint": sizes[FINAL]}
        keep = self.keep + 1  # a new one is written before an old one goes
        if self.job.eval.save_best and self.samples.val:
            needed["the best one, and one that takes its place"] = 2 * sizes[BEST]
        if self.job.train.save_interval:
            needed[f"{keep} steps' checkpoints and points to go on from"] = keep * (sizes[BEST] + sizes[RESUME])
        return needed

    def check_room(self) -> None:
        """Raises UsageError unless the disk has room for all that the run will keep at one time."""
        needed, free = self.most(), shutil.disk_usage(self.out_dir).free
        if sum(needed.values()) > free:
            parts = ", ".join(f"{megabytes(size)} for {what}" for what, size in needed.items())
            raise UsageError(
                f"--out_dir {self.out_dir}: {megabytes(free)} are free there, and this run keeps up to "
                f"{megabytes(sum(needed.values()))}: {parts}. Make room, choose another disk, or keep less (--save "
                "delta, --train.keep_last 1, --eval.save_best false)."
            )

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Bytes of the final checkpoint, of one on the way and of a point to go on from."""
        job, plan = self.job, self.job.plan
        dtypes = {name: job.save_dtype or job.checkpoint.dtype(name) for name in plan.sizes}
        stored = {name: size * dtypes[name].itemsize for name, size in plan.sizes.items()}
        whole, chosen = sum(stored.values()), sum(stored[name] for name in plan.trained)
        final = {"full": whole, "delta": chosen, "both": whole + chosen}[job.save]
        trained = sum(plan.sizes[name] for name in plan.trained) * job.precision.trained.itemsize
        state = state_bytes(plan, job.train.optimizer, job.precision.trained)
        return {FINAL: final, BEST: chosen, RESUME: trained + state}

    def size_of(self, name: str) -> int:
        """Bytes of what is kept on the way under this name."""
        sizes = self._sizes
        return sizes[BEST] if name == BEST else sizes[BEST] + sizes[RESUME]

    def _claim_room(self, size: int) -> None:
        """Raises RunError if the disk lacks `size` bytes."""
        free = shutil.disk_usage(self.out_dir).free
        if size > free:
            raise RunError(f"{megabytes(size)} are needed in {self.out_dir}, and {megabytes(free)} are free.")

    def checkpoint(
        self, name: str, weights: Mapping[str, Tensor], plan: FreezePlan, outcome: Outcome
    ) -> Optional[Proof]:
        """The final one as `--save` says and with its proof; others with what trained alone, unless that is everything.
        `plan` is what has trained so far, and in `weights`, which has all of them for the final one. An earlier
        checkpoint of that name stays until the new one is whole. Raises RunError if the disk has no room."""
        separable = plan.trained != set(plan.sizes)
        self._claim_room(self._sizes[FINAL if name == FINAL else BEST])
        if name != FINAL:
            return self._write(name, weights, plan, outcome, whole=not separable, prove=False)
        if self.job.save == "both" and separable:
            self._write(f"{FINAL}-delta", weights, plan, outcome, whole=False, prove=False)
        return self._write(FINAL, weights, plan, outcome, whole=self.job.save != "delta" or not separable, prove=True)

    def interval(
        self, name: str, state: Mapping[str, Tensor], plan: FreezePlan, outcome: Outcome, more: Mapping[str, Any]
    ) -> None:
        """A checkpoint on the way and the point to go on from, with what `more` it needs; of both only the last few
        stay. Raises RunError if the disk has no room."""
        self.checkpoint(name, weights_of(state), plan, outcome)
        reached = {name: value for name, value in asdict(outcome).items() if value != float("inf")}
        facts = {
            "method": self.job.method,
            "recipe": self.job.recipe,
            "ranked": self.job.ranked,
            "folder": str(Path.cwd()),
            "outcome": reached,
            **more,
            **self._fixed,
        }
        self._claim_room(self._sizes[RESUME])
        write_point(self.out_dir, outcome.step, state, facts, self.keep)
        for old in kept_steps(self.out_dir)[self.keep :]:
            remove_directory(old)

    def point(self) -> tuple[Outcome, Point]:
        """Where the interrupted run stood, and all that was kept with it. Raises UsageError if there is nothing to go
        on from, or what the run was made of has changed."""
        point = newest_point(self.out_dir)
        for name, value in self._fixed.items():
            if point.facts.get(name) != value:
                raise UsageError(
                    f"--resume {self.out_dir}: the {name} of this run changed since it was interrupted. "
                    "Put it back, or start a new run."
                )
        reached = point.facts["outcome"]
        scores = {name: Scores(**reached[name]) for name in ("before", "after") if reached[name] is not None}
        return Outcome(**{**reached, **scores}), point

    def begin(self, step: int) -> None:
        """Makes the folder ready for a run from `step` on: what a killed one left half-written goes, and so does what
        an earlier attempt had kept of later steps. Then writes the recipe."""
        for folder in (self.out_dir, self.out_dir / RESUME):
            clean_directory(folder)
        for folder in (self.out_dir, self.out_dir / RESUME):
            kept = kept_steps(folder)
            later = [each for each in kept if step_of(each) > step]
            for each in later + kept[len(later) :][self.keep :]:
                remove_directory(each)
        if step == 0 and (self.out_dir / BEST).is_dir():
            remove_directory(self.out_dir / BEST)
        write_text(self.out_dir / RECIPE, self.job.recipe)

    def done(self, outcome: Outcome) -> None:
        """Removes what only an unfinished run needs, and an earlier best checkpoint that the final one has beaten."""
        for name in [*([BEST] if outcome.best_step == outcome.step else []), RESUME]:
            if (self.out_dir / name).is_dir():
                remove_directory(self.out_dir / name)

    def stopped(self) -> str:
        """What is there, and how to go on, after an interruption."""
        kept = sorted(child.name for child in self.out_dir.iterdir() if (child / "litfreeze.json").is_file())
        told = f"Kept in {self.out_dir}: {', '.join(kept) or 'no checkpoint yet'}."
        if points(self.out_dir):
            told += f"\nGo on with: litfreeze finetune {self.job.method} --resume {shlex.quote(str(self.out_dir))}"
        return told

    def _write(
        self, name: str, weights: Mapping[str, Tensor], plan: FreezePlan, outcome: Outcome, whole: bool, prove: bool
    ) -> Optional[Proof]:
        job, known = self.job, self._manifest(plan, outcome)

        def write(place: Path) -> Optional[Proof]:
            return write_trained(place, job.checkpoint, weights, plan, known, whole, prove, job.save_dtype)

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
                "data": {
                    "name": str(path) if is_on_hub(path := Path(job.data.path)) else path.resolve().name,
                    "train_samples": len(self.samples.train),
                    "val_samples": len(self.samples.val),
                },
                "precision": job.precision.name,
                "before": outcome.before and asdict(replace(outcome.before, confusion=None)),
                "after": outcome.after and asdict(replace(outcome.after, confusion=None)),
                "recipe": job.recipe,
            },
            "history": job.checkpoint.history,
        }

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        """What must not change between an interrupted run and its continuation, by the word a person knows."""
        job = self.job
        planned = sorted(job.plan.trained)
        if len(self.stages) > 1:
            planned += [f"{stage.start} {stage.plan.layers}" for stage in self.stages]
        digest = hashlib.sha256()
        for sample in chain(self.samples.train, self.samples.val):
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
