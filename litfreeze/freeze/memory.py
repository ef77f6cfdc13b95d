"""How much memory a plan needs: weights, gradients, optimizer state, activations."""

from dataclasses import dataclass

from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.precision import Precision

ROWS = 1024  # rows of logits that the loss makes at once


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

    Activations are what autograd keeps: nothing below the lowest trained block, the input of a linear layer only where
    its weight trains, the logits of `ROWS` targets at a time, and under mixed precision the masters' low-precision
    casts. An adapter adds its input (and under dropout a copy of its own), what lies between A and B and, for DoRA,
    what its magnitudes scale."""
    trained = plan.n_trained
    frozen = plan.n_parameters - trained
    activations = batch_tokens * sum(_per_token(plan, precision, i) for i in range(max(plan.lowest, 0), plan.n_layer))
    logits = precision.compute.itemsize + 4  # as the head gives them, and the fp32 probabilities
    activations += min(target_tokens, ROWS) * plan.config.vocab_size * logits
    activations += trained * precision.compute.itemsize * (precision.compute != precision.trained)
    return Memory(
        weights=trained * precision.trained.itemsize + frozen * precision.frozen.itemsize,
        gradients=trained * precision.trained.itemsize,
        optimizer=2 * trained * precision.trained.itemsize,
        activations=activations,
    )


def _per_token(plan: FreezePlan, precision: Precision, i: int) -> int:
    """Bytes that autograd keeps of each token in block `i`."""
    config = plan.config
    width, wide = config.n_embd, config.intermediate_size
    trained = plan.trained_in_block(i)

    lora = plan.lora
    adapted = [module for module in (lora.ranks if lora else ()) if block_of(module) == i]
    shared = adapted if lora and lora.dropout == 0 else []  # under dropout each adapter keeps an input of its own

    def trains(*modules: str) -> bool:
        ends = tuple(f".{module}" for module in modules)
        return any(n.removesuffix(".weight").endswith(ends) for n in trained) or any(m.endswith(ends) for m in shared)

    # Backward ends in the lowest block: what lies below its first trained weight is not kept there
    above = i > plan.lowest
    norm_1 = above or any(".norm_1." in name for name in trained)
    attention = norm_1 or any(".attn." in name for name in trained)
    norm_2 = attention or any(".norm_2." in name for name in trained)
    stream = 2 * width * (norm_1 + norm_2)  # what enters and leaves the two norms, in the residual stream's dtype
    inside = 2 * (config.n_head + config.n_query_groups) * config.head_size * attention  # q, k, v and what it gives
    inside += 3 * wide if config.mlp == "gated" else wide  # what the activation and the product need
    inside += width * (trains("q_proj", "k_proj", "v_proj") + trains("gate_proj", "up_proj"))
    inside += wide * trains("down_proj")
    for module in adapted:
        into, out = (plan.sizes[name] // lora.ranks[module] for name in lora.parameters(module)[:2])
        inside += lora.ranks[module] + 2 * into * (lora.dropout > 0) + out * lora.dora
    return stream * precision.stream.itemsize + inside * precision.compute.itemsize


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
