"""What a plan says, for people: a table from the bottom of the model to its top, and one line."""

from typing import Optional

from litfreeze.aligned import aligned
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.modules import inner
from litfreeze.freeze.plan import EXTRAS, FreezePlan, block_of
from litfreeze.lora import is_lora, linear_layers


def table(plan: FreezePlan, lr: Optional[float] = None) -> str:
    """What trains and what is frozen, bottom to top; neighbours that are alike share a row. If not all learns at
    one rate, the rates stand there too, those of parameters at `lr` times their scale."""
    rows: list[tuple[str, str, int, int]] = []
    run: list[int] = []

    def flush() -> None:
        if run:
            names = [n for n in plan.sizes if block_of(n) in run]
            label = f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}"
            rows.append(_row(plan, label, names, lr))
            run.clear()

    embed = "embed (also the head)" if plan.config.tie_embeddings else "embed"
    rows.append(_row(plan, embed, _part(plan, "embed"), lr))
    for i in range(plan.config.n_layer):
        if run and _state(plan, i) != _state(plan, run[-1]):
            flush()
        run.append(i)
    flush()
    rows.append(_row(plan, "final_norm", _part(plan, "final_norm"), lr))
    if _part(plan, "head"):
        rows.append(_row(plan, "head", _part(plan, "head"), lr))
    rows.append(("total", "", plan.n_trained, plan.n_parameters))
    cells = [("", "", "trained", "parameters", "share of the model")]
    for label, state, trained, size in rows:
        share = f"{100 * trained / plan.n_parameters:.2f} %"
        cells.append((label, state, f"{trained:,}" if trained else "-", f"{size:,}", share))
    lines = aligned(cells, "<<>>>")
    return "\n".join([*lines[:-1], lines[1], lines[-1]])


def summary(plan: FreezePlan) -> str:
    """One line: what trains, and its share."""
    full = [name for name in plan.trained if not is_lora(name)]
    layers = sorted({block_of(name) for name in full} - {None})
    blocks = [_blocks(layers)] if layers else []
    outside = [e for e in EXTRAS if any(n in full for n in _part(plan, e))]
    partly = any(n not in plan.trained for n in plan.sizes if block_of(n) in layers and not is_lora(n))
    what = " + ".join(blocks + outside) + (" (in part)" if partly else "")
    if plan.lora is not None:
        adapted = sorted({block_of(module) for module in plan.lora.ranks} - {None})
        where = ([_blocks(adapted)] if adapted else []) + (["head"] if "head" in plan.lora.ranks else [])
        what = f"{plan.lora.describe()} on {' + '.join(where)}" + (f", and in full {what}" if full else "")
    share = 100 * plan.n_trained / plan.n_parameters
    return f"{what}: {plan.n_trained:,} of {plan.n_parameters:,} parameters train ({share:.2f} %)"


def _part(plan: FreezePlan, part: str) -> list[str]:
    begins = ("embed.", "pos_embed.") if part == "embed" else (f"{part}.",)
    return [name for name in plan.sizes if name.startswith(begins)]


def _state(plan: FreezePlan, i: int) -> frozenset[tuple[str, float]]:
    return frozenset((inner(name), plan.lr_scale(name)) for name in plan.trained_in_block(i))


def _row(plan: FreezePlan, label: str, names: list[str], lr: Optional[float]) -> tuple[str, str, int, int]:
    trained = [name for name in names if name in plan.trained]
    full = [name for name in trained if not is_lora(name)]
    states = []
    if full:
        partly = len(full) < sum(not is_lora(name) for name in names)
        part = sorted({inner(name).removesuffix(".weight") for name in full}) if partly else []
        states.append(" ".join(["trains", *([_few(part)] if part else [])]))
    if len(trained) > len(full):
        adapted = dict.fromkeys(name.rpartition(".")[0] for name in trained if is_lora(name))
        linear = [module for module in linear_layers(plan.config) if any(n.startswith(f"{module}.") for n in names)]
        each = list(dict.fromkeys(module.rpartition(".")[2] for module in adapted))
        states.append("LoRA on " + ("every linear layer" if len(adapted) == len(linear) > 1 else _few(each)))
    if trained and lr is not None and plan.lr_scales:
        scales = sorted({plan.lr_scale(name) for name in trained})
        states.append("lr " + _few([f"{lr * scale:.3g}" for scale in scales]))
    state = "; ".join(states) or "frozen"
    return label, state, sum(plan.sizes[n] for n in trained), sum(plan.sizes[n] for n in names)


def _few(words: list[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _blocks(layers: list[int]) -> str:
    return f"block{'s' * (len(layers) > 1)} {format_layers(layers)}"
