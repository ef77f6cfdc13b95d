"""How much memory a plan needs: weights, gradients, optimizer state, activations."""

from dataclasses import dataclass

import torch

from litfreeze.freeze.plan import FreezePlan, block_of


@dataclass(frozen=True)
class Precision:
    """What the weights are kept in while training. Under *-mixed only what trains has an fp32 master."""

    name: str  # Fabric's word
    trained: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype

    def kept(self, trained: bool) -> torch.dtype:
        return self.trained if trained else self.frozen


PRECISIONS = {
    p.name: p
    for p in (
        Precision("32-true", torch.float32, torch.float32, torch.float32),
        Precision("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        Precision("bf16-mixed", torch.float32, torch.bfloat16, torch.bfloat16),
        Precision("16-mixed", torch.float32, torch.float16, torch.float16),
    )
}


@dataclass(frozen=True)
class Memory:
    """Bytes by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(plan: FreezePlan, precision: Precision, batch_tokens: int, target_tokens: int) -> Memory:
    """An estimate for AdamW and micro-batches of `batch_tokens` tokens, `target_tokens` of them with a loss.

    Activations are what autograd keeps: nothing below the lowest trained block, and the input of a linear layer only
    where its weight trains."""
    trained = plan.n_trained
    frozen = plan.n_parameters - trained
    return Memory(
        weights=trained * precision.trained.itemsize + frozen * precision.frozen.itemsize,
        gradients=trained * precision.trained.itemsize,
        optimizer=2 * trained * precision.trained.itemsize,
        activations=_activations(plan, precision, batch_tokens, target_tokens),
    )


def _activations(plan: FreezePlan, precision: Precision, batch_tokens: int, target_tokens: int) -> int:
    config = plan.config
    C, I = config.n_embd, config.intermediate_size  # noqa: E741
    heads = (config.n_head + config.n_query_groups) * config.head_size
    per_token = 0
    for i in range(max(plan.lowest, 0), config.n_layer):
        names = {n.split(".", 2)[2] for n in plan.trained if block_of(n) == i}
        per_token += 4 * C + 2 * heads  # the two norms; q, k, v and what attention gives
        per_token += 3 * I if config.mlp == "gated" else I  # what the activation and the product need
        per_token += C * any(n.startswith(("attn.q_", "attn.k_", "attn.v_")) for n in names)
        per_token += C * any(n.startswith(("mlp.gate_", "mlp.up_")) for n in names)
        per_token += I * ("mlp.down_proj.weight" in names)
    logits = 2 * target_tokens * config.vocab_size * 4
    return batch_tokens * per_token * precision.compute.itemsize + logits


def describe_memory(plan: FreezePlan, precision: Precision, batch_tokens: int, target_tokens: int) -> str:
    """Two lines: this plan, and training everything."""
    lines = []
    everything = FreezePlan.everything(plan.config)
    for label, memory in (
        ("this plan", estimate_memory(plan, precision, batch_tokens, target_tokens)),
        ("everything", estimate_memory(everything, precision, batch_tokens, target_tokens)),
    ):
        kinds = ("weights", "gradients", "optimizer", "activations")
        parts = " + ".join(f"{kind} {megabytes(getattr(memory, kind))}" for kind in kinds)
        lines.append(f"{label:>10}: {parts} = {megabytes(memory.total)}")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    """Bytes as a person reads them: MB up to a gigabyte, then GB (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
