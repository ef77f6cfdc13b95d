"""How much memory a plan needs: weights, gradients, optimizer state, activations."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Optional

import torch

from litfreeze.freeze.optimizers import state_bytes
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.freeze.quantize import quantised_bytes
from litfreeze.precision import Precision
from litfreeze.sizes import megabytes

LOGITS = 64 * 1024**2  # bytes of fp32 logits that the loss makes at once
SLICE = 6 * 1024**2  # bytes of the head that a processor's cache holds: the loss takes it by such slices


@dataclass(frozen=True)
class Memory:
    """Bytes by kind, at the moment when they are the most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class Thrift:
    """What a run does to need less.

    Attributes:
        optimizer: As in `--train.optimizer`.
        fused_backward: A gradient lives while it is made; a tied embedding's grows through the whole of backward,
            beside one other.
        quantize: What frozen weights are kept in where they can be.
        recompute: A block's activations exist while backward is in it, and before only what enters it.
        accumulate: A step has more than one micro-batch: gradients of the last one are there while the next one runs.
            Of one alone they come as its activations go.
    """

    optimizer: str = "adamw"
    fused_backward: bool = False
    quantize: Optional[str] = None
    recompute: bool = False
    accumulate: bool = True


def estimate_memory(
    plan: FreezePlan,
    precision: Precision,
    stored: Callable[[str], torch.dtype],
    batch_tokens: int,
    target_tokens: int,
    thrift: Thrift = Thrift(),
) -> Memory:
    """An estimate for micro-batches of `batch_tokens` tokens, `target_tokens` of them with a loss. The parameter `name`
    has the dtype `stored(name)` in its checkpoint.

    Activations are what autograd keeps: nothing below the lowest trained block, the input of a linear layer only where
    its weight trains, the logits of `logit_rows` targets at a time (through a frozen head, a slice of them), and under
    mixed precision the masters' copies in less. The head's gradient is made with the loss, beside the one that is
    there. An adapter adds its input (and under dropout a copy of its own), what lies between A and B and, for DoRA,
    what its magnitudes scale."""
    sizes = sorted(plan.sizes[name] for name in plan.trained)
    head = "embed.weight" if plan.config.tie_embeddings else "head.weight"
    of_head = plan.sizes[head] if head in plan.trained else 0
    alive, left = _activations(plan, precision, batch_tokens, thrift.recompute)
    packed = quantised_bytes(plan, thrift.quantize) if thrift.quantize else {}
    kept = {name: n * precision.kept(name in plan.trained, stored(name)).itemsize for name, n in plan.sizes.items()}

    def moment(gradients: int, activations: int, logits: int) -> Memory:
        return Memory(
            weights=sum({**kept, **packed}.values()),
            gradients=gradients * precision.trained.itemsize,
            optimizer=state_bytes(plan, thrift.optimizer, precision.trained),
            activations=activations,
            logits=logits,
        )

    logits = _logits(plan, precision, target_tokens)
    if thrift.fused_backward:
        return moment(sum(sizes[-2:]), alive, logits)
    if thrift.accumulate:
        return moment(sum(sizes) + of_head, alive, logits)
    begins = moment(of_head, alive, logits)
    ends = moment(sum(sizes) + of_head * plan.config.tie_embeddings, left, 0)  # a tied one's two are added in the end
    return max(begins, ends, key=lambda memory: memory.total)


def beside_everything(
    plans: Iterable[FreezePlan],
    precision: Precision,
    stored: Callable[[str], torch.dtype],
    batch_tokens: int,
    target_tokens: int,
    thrift: Thrift = Thrift(),
) -> tuple[Memory, Memory]:
    """What the hungriest of `plans`, which are of one model, needs, and what training everything would. The rest is
    `estimate_memory`'s."""
    plans = list(plans)
    given = (precision, stored, batch_tokens, target_tokens)
    everything = FreezePlan.everything(plans[0].config)
    return (
        max((estimate_memory(plan, *given, thrift) for plan in plans), key=lambda memory: memory.total),
        estimate_memory(everything, *given, replace(thrift, quantize=None)),
    )


def logit_rows(vocabulary: int) -> int:
    """Rows of logits, each over `vocabulary` words, that the loss makes at once."""
    return max(16, LOGITS // (4 * vocabulary))


def _logits(plan: FreezePlan, precision: Precision, target_tokens: int) -> int:
    """Bytes of the logits that are there at once: in fp32, and as the head gives them."""
    config = plan.config
    vocabulary = config.n_outputs
    head = "embed.weight" if config.tie_embeddings else "head.weight"
    learns = head in plan.trained or (plan.lora is not None and "head" in plan.lora.ranks)
    if not learns and config.final_softcap is None:
        vocabulary = min(vocabulary, SLICE // (config.n_embd * precision.compute.itemsize))
    wide = 4 + precision.compute.itemsize * (precision.compute != torch.float32)
    return min(target_tokens, logit_rows(vocabulary)) * vocabulary * wide


def _activations(plan: FreezePlan, precision: Precision, batch_tokens: int, recompute: bool) -> tuple[int, int]:
    """Bytes that are there when backward begins, and when its last block is done."""
    each = [batch_tokens * _per_token(plan, precision, i) for i in range(max(plan.lowest, 0), plan.n_layer)]
    entering = batch_tokens * plan.config.n_embd * precision.stream.itemsize
    copies = plan.n_trained * precision.compute.itemsize * (precision.compute != precision.trained)
    if recompute:
        return len(each) * entering + max(each, default=0) + copies, max(each, default=0)
    return sum(each) + copies, 0


def _per_token(plan: FreezePlan, precision: Precision, i: int) -> int:
    """Bytes that autograd keeps of each token in block `i`."""
    config = plan.config
    width, wide = config.n_embd, config.intermediate_size
    each = config.n_expert_per_token if config.has_experts(i) else 1  # MLPs that a row goes through
    if config.has_experts(i):
        wide = config.moe_intermediate_size
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
    stream *= config.pre_norm + config.post_norm
    inside = 2 * (config.n_head + config.n_query_groups) * config.head_size * attention  # q, k, v and what it gives
    inside += each * wide * (3 if config.mlp == "gated" else 1)  # what the activation and the product need
    inside += width * (trains("q_proj", "k_proj", "v_proj") + each * trains("gate_proj", "up_proj"))
    inside += each * wide * trains("down_proj")
    for module in adapted:
        into, out = (plan.sizes[name] // lora.ranks[module] for name in lora.parameters(module)[:2])
        inside += lora.ranks[module] + 2 * into * (lora.dropout > 0) + out * lora.dora
    return stream * precision.stream.itemsize + inside * precision.compute.itemsize


def describe_memory(plan: Memory, everything: Memory) -> str:
    """Two lines: this plan, and training everything."""
    lines = []
    for label, memory in (("this plan", plan), ("everything", everything)):
        kinds = ("weights", "gradients", "optimizer", "activations", "logits")
        parts = " + ".join(f"{kind} {megabytes(getattr(memory, kind))}" for kind in kinds)
        lines.append(f"{label:>10}: {parts} = {megabytes(memory.total)}")
    return "\n".join(lines)
