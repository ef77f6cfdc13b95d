"""From the words of a command to what it would train and cost: the numbers of `litfreeze layers` and of a run's own
opening, for this data. Everything is checked that the run itself checks before it writes.

These functions run in the helper process (helper.py), and return what JSON can carry."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Optional

import torch

from litfreeze.__main__ import COMMANDS
from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.choose.rank import Ranking
from litfreeze.choose.words import check_words, has_ranks, put_ids
from litfreeze.cli import parse
from litfreeze.data.prompt import Prompt
from litfreeze.data.split import Samples, files_behind
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.finetune.setting import open_base, ranking, settled
from litfreeze.finetune.task import for_task
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.plan import EXTRAS, FreezePlan, Part, part_of
from litfreeze.freeze.rates import parse_rates, rate_groups
from litfreeze.freeze.savings import Pass, Rows
from litfreeze.freeze.table import summary, table
from litfreeze.freeze.thaw import Stage
from litfreeze.lora import is_lora
from litfreeze.outputs import RUNS
from litfreeze.tokenizer import Tokenizer
from litfreeze.train.job import Job
from litfreeze.train.keep import Keeper
from litfreeze.train.prepare import Prepared, job_samples, prepare
from litfreeze.train.report import Report

_read: dict[str, Samples] = {}  # the last samples that were read, by all they were made of


def plan(
    words: Optional[Sequence[str]], checkpoint: Optional[str], base: Optional[str], rankings: Mapping[str, Any]
) -> dict[str, Any]:
    """All about the run of `litfreeze WORDS`, which has the checkpoint and base named (None: the embedded model); with
    no words about that model alone.

    `rankings` are the answers of `rank` that are known. Returns `model`, and of `refused` (a text), `unranked` (the
    methods of rankings that the words name and that are not known) and `plan` the one that holds. Without a `model` the
    refusal is of the checkpoint itself."""
    try:
        opened = open_checkpoint(checkpoint or MODEL_DIR, base)
    except UsageError as error:
        return {"model": None, "refused": str(error)}
    found: dict[str, Any] = {"model": _model(opened)}
    if words is None:
        return found
    try:
        function, given = parse(words, COMMANDS)
        notes = []
        if has_ranks(given["trainable_layers"]):
            depth, new = opened.config.n_layer, opened.config.new_blocks
            named = {method for method, _ in check_words(given["trainable_layers"], depth, new).values()}
            if unranked := sorted(named - rankings.keys()):
                return {**found, "unranked": unranked}
            known = {method: Ranking(**rankings[method]) for method in named}
            layers, notes = put_ids(given["trainable_layers"], depth, new, known.__getitem__)
            given = {**given, "trainable_layers": layers}
        fabric, job = sys.modules[function.__module__].made(given)
        prepared = prepare(fabric, job, _samples)
        return {**found, "plan": _numbers(fabric.device, job, prepared), "notes": [*job.notes, *notes]}
    except UsageError as error:
        return {**found, "refused": str(error)}


def rank(words: Sequence[str], method: str) -> dict:
    """How `method` ranks the blocks of the model of `litfreeze WORDS`, on the records that it learns from first."""
    function, given = parse(words, COMMANDS)
    options = settled(function, words[1], {**given, "trainable_layers": None})
    opened = open_base(options.checkpoint_dir, options.untie_embeddings, options.base_dir)
    options, opened, _ = for_task(options, opened)
    return asdict(ranking(options, opened, method))


def set_rate(text: str, part: Part, rate: Optional[float], words: Sequence[str]) -> str:
    """The `--layer_lr` TEXT with `rate` for one block or extra; with None it has no rate of its own any more."""
    function, given = parse(words, COMMANDS)
    chosen = sys.modules[function.__module__].made(given)[1].plan
    rates = parse_rates(text, chosen) if text else {}
    rates.pop(part, None)
    if rate is not None:
        rates[part] = rate
    groups = []
    for each in dict.fromkeys(rates.values()):
        blocks = [part for part in rates if rates[part] == each and isinstance(part, int)]
        extras = [part for part in EXTRAS if rates.get(part) == each]
        groups.append(", ".join([format_layers(blocks)] * bool(blocks) + extras) + f":{each:g}")
    text = ", ".join(groups)
    if text:
        rate_groups(text)
        parse_rates(text, chosen)
    return text


def _model(opened: Checkpoint) -> dict[str, Any]:
    config = opened.config
    return {
        "name": "the embedded demo model" if opened.path == MODEL_DIR else opened.path.name,
        "n_layer": config.n_layer,
        "new": list(config.new_blocks),
        "tied": config.tie_embeddings,
        "classes": len(config.labels),
        "adapter": opened.lora.describe() if opened.lora else "",
    }


def _samples(job: Job, tokenizer: Tokenizer, prompt: Prompt) -> Samples:
    """The samples of `job`, which are read again only if something that they are made of is another."""
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files_behind(job.data)]
    checkpoint = job.checkpoint
    made_of = repr((facts, job.data, prompt, checkpoint.tokenizer_dir, checkpoint.config, job.eval.max_samples))
    if made_of not in _read:
        samples = job_samples(job, tokenizer, prompt)
        _read.clear()
        _read[made_of] = samples
    return _read[made_of]


def _numbers(device: torch.device, job: Job, prepared: Prepared) -> dict[str, Any]:
    plan, schedule, stages = job.plan, prepared.schedule, prepared.stages
    report = Report(job, prepared.samples, schedule, device, stages)
    keeper = Keeper(job, job.out_dir or RUNS, prepared.samples, schedule, stages, prepared.prompt)
    rows = Rows.of(prepared.samples.train)
    everything = report.epoch_of(FreezePlan.everything(plan.config), rows)
    epochs = [report.epoch_of(stage.plan, rows) for stage in stages]
    return {
        "summary": summary(plan),
        "table": table(plan, job.train.lr),
        "trained": plan.n_trained,
        "parameters": plan.n_parameters,
        "parts": {str(part): _part(plan, part, job.train.lr) for part in _parts(plan)},
        "layers": format_layers(plan.layers),
        "steps": schedule.max_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
        "warmup": schedule.warmup,
        "lr": job.train.lr,
        "precision": job.precision.name,
        "device": device.type,
        "data": prepared.samples.describe(),
        "memory": _memory(report),
        "disk": keeper.most(),
        "tokens": rows.tokens,
        "everything_epoch": everything.seconds,
        "stages": [
            _time(stage, epoch, rows.tokens, job, schedule.steps_per_epoch)
            for stage, epoch in zip(stages, epochs, strict=True)
        ],
        "thaws": job.thawing.describe() if job.thawing else "",
    }


def _memory(report: Report) -> dict[str, Any]:
    """Bytes by kind of the stage that needs most, and of training everything."""
    tokens, _ = report.micro_batch()
    plan, everything = map(asdict, report.memory())
    return {"tokens": tokens, "plan": plan, "everything": everything}


def _time(stage: Stage, epoch: Pass, tokens: int, job: Job, steps_per_epoch: int) -> dict[str, Any]:
    """One stage: when it is, what trains, what an epoch of it takes as it is and once its prefix is kept."""
    kept = stage.untouched > 0 and job.frozen.cache != "off"
    width = job.precision.stream if job.frozen.cache_dtype == "auto" else getattr(torch, job.frozen.cache_dtype)
    return {
        "start": stage.start,
        "stop": stage.stop,
        "blocks": stage.plan.layers,
        "trained": stage.plan.n_trained,
        "epoch": epoch.seconds,
        "cached_epoch": epoch.cached if kept else None,
        "prefix": format_layers(range(stage.untouched)) if kept else "",
        "kept": tokens * job.plan.config.n_embd * width.itemsize if kept else 0,
        "epochs": (stage.stop - stage.start) / steps_per_epoch,
    }


def _parts(plan: FreezePlan) -> list[Part]:
    return list(dict.fromkeys(map(part_of, plan.sizes)))


def _part(plan: FreezePlan, part: Part, lr: float) -> dict[str, Any]:
    names = [name for name in plan.sizes if part_of(name) == part]
    trained = [name for name in names if name in plan.trained]
    whole = [name for name in names if not is_lora(name)]
    full = [name for name in trained if not is_lora(name)]
    state = "frozen"
    if trained:
        state = "lora" if not full else "trains" if len(full) == len(whole) else "part"
    return {
        "state": state,
        "rates": sorted({lr * plan.lr_scale(name) for name in trained}),
        "trained": sum(plan.sizes[name] for name in trained),
        "size": sum(plan.sizes[name] for name in names),
    }
