"""How fast each layer learns: `--layer_lr` and `--lr_decay_by_depth`, as factors on the learning rate in the plan."""

import re
from dataclasses import replace

from litfreeze.errors import UsageError
from litfreeze.freeze.args import RateArgs
from litfreeze.freeze.layers import format_layers, parse_layers
from litfreeze.freeze.plan import EXTRAS, FreezePlan, Part, part_of
from litfreeze.lora import B

GRAMMAR = "'0-7:1e-6, 8-13:1e-5, head:5e-5'"


def with_rates(plan: FreezePlan, rates: RateArgs, lr: float) -> FreezePlan:
    """`plan` with the rates that `rates` asks for, where `lr` is the highest one unless said. What has a rate of its
    own does not decay.

    Raises UsageError for words that are not understood, for what has two rates, and for what has one and does not
    train."""
    if rates.lr_decay_by_depth is not None:
        plan = _decayed(plan, rates.lr_decay_by_depth)
    if rates.layer_lr is None:
        return plan
    wanted = parse_rates(rates.layer_lr, plan)
    scales = dict(plan.lr_scales)
    for name in plan.trained:
        if (rate := wanted.get(part_of(name))) is not None:
            scales[name] = rate / lr * (plan.lora_plus_ratio if name.endswith(f".{B}") else 1.0)
    return replace(plan, lr_scales={name: scale for name, scale in scales.items() if scale != 1})


def parse_rates(text: str, plan: FreezePlan) -> dict[Part, float]:
    """'0-7:1e-6, last:2:1e-5, head:5e-5' as the rate of each block and extra. Raises UsageError as `with_rates`."""
    found: dict[Part, float] = {}
    for words, rate in rate_groups(text):
        extras = [word for word in words if word in EXTRAS]
        blocks = [word for word in words if word not in EXTRAS]
        config = plan.config
        parts: list[Part] = [*extras]
        if bare := [word for word in blocks if re.fullmatch("-[0-9]+", word)]:
            raise UsageError(
                f"--layer_lr {text!r}: {bare[0]} is one block, counted from the top. Write its id, or "
                f"{bare[0]}::{rate:g} for it and all above it."
            )
        if blocks:
            parts += parse_layers(blocks, config.n_layer, "layer_lr", config.new_blocks)
        if not parts:
            raise UsageError(f"--layer_lr {text!r}: {rate:g} is the rate of no block.")
        if twice := [part for part in parts if part in found]:
            raise UsageError(f"--layer_lr {text!r}: {_name(twice[0])} has two rates, {found[twice[0]]:g} and {rate:g}.")
        found |= dict.fromkeys(parts, rate)
    training = {part_of(name) for name in plan.trained}
    if plan.config.tie_embeddings and "head" in found and "embed" in training:
        raise UsageError("--layer_lr head: the head is the embedding here, one tensor. Give embed a rate.")
    if idle := [part for part in found if part not in training]:
        layers = [part for part in training if isinstance(part, int)]
        trains = ", ".join([format_layers(layers)] * bool(layers) + [part for part in EXTRAS if part in training])
        raise UsageError(f"--layer_lr: {_name(idle[0])} has a rate and does not train; what trains: {trains}.")
    return found


def rate_groups(text: str) -> list[tuple[list[str], float]]:
    """The words of each group and its rate, which is what stands behind a colon and lies between 0 and 1: `last:2` is a
    word, `last:2:1e-5` a word and a rate."""
    found, words = [], []
    for part in text.split(","):
        word, _, last = part.strip().rpartition(":")
        rate = _rate(last)
        if not word or rate is None:
            words.append(part.strip())
            continue
        found.append(([*words, word.strip()], rate))
        words = []
    if words or not found:
        raise UsageError(
            f"--layer_lr {text!r}: {words[-1]!r} has no learning rate above 0 and below 1. Write layers:rate, as in "
            f"{GRAMMAR}."
        )
    return found


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        return None
    return rate if 0 < rate < 1 else None


def _decayed(plan: FreezePlan, decay: float) -> FreezePlan:
    """Each block `decay` times as fast as the one above it, from the highest that trains down; the embedding as if it
    were a block below all (Howard and Ruder, arXiv 1801.06146; by depth as in Clark et al., arXiv 2003.10555)."""
    top = max(plan.layers, default=-1)
    scales = dict(plan.lr_scales)
    for name in plan.trained:
        part = part_of(name)
        block = -1 if part == "embed" else part
        if isinstance(block, int):
            scales[name] = plan.lr_scale(name) * decay ** (top - block)
    return replace(plan, lr_scales={name: scale for name, scale in scales.items() if scale != 1})


def _name(part: Part) -> str:
    return f"block {part}" if isinstance(part, int) else part
