"""What each recipe would cost, by litfreeze's own estimates and without any weights: python config_hub/table.py

The table of config_hub/README.md is what this prints; a test compares them."""

from pathlib import Path
from types import SimpleNamespace

import torch

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.expand import expand
from litfreeze.cli import parse
from litfreeze.config import Config
from litfreeze.finetune.adapter import begin
from litfreeze.freeze.layers import spread
from litfreeze.freeze.memory import Memory, Thrift, estimate_memory
from litfreeze.freeze.plan import FreezePlan
from litfreeze.freeze.savings import Rows, Speed, Work, work
from litfreeze.freeze.words import plan_from_words
from litfreeze.model import meta_parameters
from litfreeze.precision import PRECISIONS
from litfreeze.presets import PRESETS

HERE = Path(__file__).parent / "finetune"
KINDS = ("full", "freeze", "lora", "llama_pro", "unfreeze")
RECORDS = 1000
RATE = 0.65 * 250e12  # FLOP/s: what training usually reaches of an A100's in large products of bf16


def recipes() -> list[Path]:
    """The recipes, small models first."""
    models = sorted((folder for folder in HERE.iterdir() if folder.is_dir()), key=lambda f: checkpoint(f.name)[1])
    return [folder / f"{kind}.yaml" for folder in models for kind in KINDS]


def checkpoint(name: str) -> tuple[Checkpoint, int]:
    """The model `name` without weights, stored in bf16, and its size."""
    config = Config.from_hf(PRESETS[name], name)
    parameters = meta_parameters(config)
    dtypes = dict.fromkeys(parameters, torch.bfloat16)
    made = Checkpoint(Path(name), Path(name), PRESETS[name], config, parameters, dtypes)
    return made, sum(p.numel() for p in parameters.values())


def plan_of(recipe: Path) -> tuple[FreezePlan, SimpleNamespace]:
    """What the recipe trains, over a model without weights, and its options. New blocks are put in where a recipe says
    so in its first line."""
    method = "lora" if recipe.stem == "lora" else "full"
    command = f"finetune {method}"
    given = parse([*command.split(), "--config", str(recipe)], {command: f"litfreeze.finetune.{method}:setup"})[1]
    options, base = SimpleNamespace(**given), checkpoint(recipe.parent.name)[0]
    first = recipe.read_text(encoding="utf-8").splitlines()[0].split()
    if "expand" in first:
        count = int(first[first.index("--new_blocks") + 1])
        base = expand(base, spread(base.config.n_layer, count, "new_blocks"))
    if method == "lora":
        return begin(base, options)[1], options
    return plan_from_words(base.config, options.trainable_layers, thaw=options.thaw), options


def costs(recipe: Path) -> tuple[FreezePlan, Memory, Work]:
    """Of a recipe in bf16-mixed, every micro-batch full and every token learned: what trains at any time, the memory,
    and the arithmetic of `RECORDS` records."""
    plan, options = plan_of(recipe)
    length = options.data.max_seq_length
    tokens = options.train.micro_batch_size * length
    thrift = Thrift(accumulate=options.train.global_batch_size > options.train.micro_batch_size)
    memory = estimate_memory(plan, PRECISIONS["bf16-mixed"], lambda _: torch.bfloat16, tokens, tokens, thrift)
    return plan, memory, work(plan, Rows.full(RECORDS, length))


def table() -> str:
    lines = [
        f"| recipe | trains | memory | seconds for {RECORDS:,} records | …once the frozen part is kept |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for recipe in recipes():
        plan, memory, done = costs(recipe)
        speed = Speed(RATE, RATE, RATE, RATE)
        first, later = speed.seconds(done), speed.seconds(done, kept=True)
        name = f"{recipe.parent.name}/{recipe.stem}"
        cells = [f"[{name}](finetune/{name}.yaml)", f"{plan.n_trained / 1e6:,.0f} M", f"{memory.total / 1e9:,.1f} GB"]
        lines.append(f"| {' | '.join([*cells, f'{first:,.0f}', f'{later:,.0f}' if done.prefix else ''])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
