"""Saving what a run trained, and proving what it left alone."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.open import identity
from litfreeze.checkpoint.tensors import same_bits
from litfreeze.checkpoint.write import stored_as, write_checkpoint, write_over_base
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.quantize import Quantised


@dataclass
class Proof:
    """What was compared while saving, tensor by tensor, against the checkpoint that the run began from.

    Compared is the weight in memory, before it is rounded to the saved dtype; `rounded_back` are chosen tensors that
    this rounding returned to the base's values. Of frozen weights that were `quantised` in memory, none is there to
    compare. `sha256` is over the frozen tensors as they were saved."""

    frozen: int = 0
    trained: int = 0
    frozen_that_changed: list[str] = field(default_factory=list)
    trained_that_did_not: list[str] = field(default_factory=list)
    quantised: Counter[str] = field(default_factory=Counter)  # int8 or nf4 -> how many of the frozen
    rounded_back: list[str] = field(default_factory=list)
    sha256: str = ""
    save_dtype: Optional[torch.dtype] = None

    def describe(self) -> str:
        """One line, or one for each thing that is wrong."""
        lines = []
        if self.frozen:
            same = self.frozen - len(self.frozen_that_changed)
            cast = f", saved as {self.save_dtype}".replace("torch.", "") if self.save_dtype else ""
            lines.append(
                f"{same} of {self.frozen} frozen tensors are bit-identical to the base{cast} "
                f"(sha256 {self.sha256[:16]}…)"
            )
            for kind, count in self.quantised.items():
                lines[0] += f", {count} of them kept in {kind} while training"
        else:
            lines.append("nothing was frozen")
        moved = self.trained - len(self.trained_that_did_not)
        lines[0] += f"; {moved} of {self.trained} chosen tensors have changed."
        for names, what in (
            (self.frozen_that_changed, "frozen, and yet changed"),
            (self.trained_that_did_not, "chosen, and yet unchanged"),
            (self.rounded_back, "changed, but rounded back to the base's values when saved"),
        ):
            if names:
                more = f" and {len(names) - 4} more" if len(names) > 4 else ""
                lines.append(f"{what}: {', '.join(names[:4])}{more}")
        return "\n".join(lines)


def write_trained(
    out_dir: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    plan: FreezePlan,
    manifest: Mapping[str, Any],
    whole: bool,
    prove: bool = True,
    save_dtype: Optional[torch.dtype] = None,
) -> Optional[Proof]:
    """Writes what a run made of `checkpoint`: what is frozen from its own bytes, what trained from `weights`,
    rounded once. One tensor is in memory at a time. A frozen weight that is empty there has left the model, untouched.

    `whole` writes every weight, else only what differs from the base, an adapter included. `prove` compares every
    tensor with `checkpoint`, also those that are not written. Dtypes are those of `checkpoint` unless `save_dtype`
    names one for all that is written."""
    proof = Proof(save_dtype=save_dtype)

    def read(name: str) -> Tensor:
        trained = name in plan.trained
        if not prove:
            return weights[name].detach() if trained else checkpoint.read(name)
        before, after = checkpoint.read(name), weights[name].detach()
        same = (name not in plan.trained and not after.numel()) or same_bits(before, after, after.dtype)
        if trained:
            proof.trained += 1
            proof.trained_that_did_not += [name] if same else []
            rounded = not same and save_dtype is None and same_bits(after, before, before.dtype)
            proof.rounded_back += [name] if rounded else []
            return after
        proof.frozen += 1
        if isinstance(weights[name], Quantised):
            proof.quantised[weights[name].kind] += 1
        proof.frozen_that_changed += [] if same else [name]
        return before

    if whole:
        layout = {name: (save_dtype or dtype, shape) for name, (dtype, shape) in checkpoint.layout().items()}
        config = checkpoint.hf_config if save_dtype is None else stored_as(checkpoint.hf_config, save_dtype)
        manifest = {**manifest, "base": identity(checkpoint.whole, Path(out_dir))}
        written = write_checkpoint(out_dir, config, layout, read, manifest, checkpoint.tokenizer_dir)
    else:
        names = plan.trained.union(checkpoint.tensors if checkpoint.base is not None else ())

        def dtype(name: str) -> torch.dtype:
            return save_dtype if save_dtype is not None and name in names else checkpoint.dtype(name)

        written = write_over_base(out_dir, checkpoint, names, dtype, read, manifest)
    if not prove:
        return None
    hashes = written["tensors"] if whole else {**checkpoint.whole.tensor_hashes, **written["tensors"]}
    for name in weights:
        if name not in written["tensors"]:
            read(name)
    frozen = sorted(name for name in weights if name not in plan.trained)
    proof.sha256 = hashlib.sha256("".join(hashes[name] for name in frozen).encode()).hexdigest()
    return proof
