"""README.md of what is uploaded: what trained, from what, on which data, with which losses, and the command."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import yaml

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.compare import compare
from litfreeze.checkpoint.open import began_from
from litfreeze.cli import arguments
from litfreeze.errors import LitfreezeError
from litfreeze.finetune.recipe import command
from litfreeze.freeze.plan import EXTRAS, part_of
from litfreeze.publish.public import SCRIPTS, public_name, public_recipe

LIBRARY = {"hf": "transformers", "peft": "peft", "litfreeze": "litfreeze"}
# Of --train, in the order of the card
HYPER = ("lr", "lr_schedule", "lr_warmup_steps", "global_batch_size", "optimizer", "weight_decay", "beta1", "beta2")


def write_card(checkpoint: Checkpoint, form: str, repo: str, base: Optional[str], compared: str) -> str:
    """The card of `checkpoint` in the repository `repo`, in the form `form`. `base` is its base's name on the Hub, and
    `compared` says what was found when both were compared."""
    runs = [run for run in checkpoint.history if "step" in run]
    lora = checkpoint.lora
    front = {
        **({"base_model": base.partition("@")[0]} if base else {}),
        **({"base_model_relation": "adapter" if lora else "finetune"} if base else {}),
        "library_name": LIBRARY[form],
        "pipeline_tag": "text-classification" if checkpoint.config.labels else "text-generation",
        "tags": ["litfreeze", *(["lora"] if lora else [])],
    }
    what = f"An adapter ({lora.describe()})" if lora else "A model"
    made = "made with litfreeze, which fine-tunes chosen layers of a model."
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {repo.rpartition('/')[2]}",
        "",
        f"{what}{_over(base, checkpoint)}, {made}",
        "",
        *([f"**Compared with its base:** {compared}", ""] if compared else []),
        "## Use",
        "",
        *_use(checkpoint, form, repo, base),
        "",
        *(line for number, run in enumerate(runs, 1) for line in _of_run(run, number, len(runs), checkpoint)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def compared_with_base(checkpoint: Checkpoint) -> str:
    """What lies between `checkpoint` and the base it began from, or was merged into: every weight of both is read. Or
    that this is not known, and nothing where it has no base."""
    try:
        base = began_from(checkpoint)
        return "" if base is None else compare(base, checkpoint).summary().replace("\n", " ")
    except LitfreezeError:  # told without its places on this machine
        return "not known: it was not at hand when this card was written."


def _over(base: Optional[str], checkpoint: Checkpoint) -> str:
    if base:
        name, _, revision = base.partition("@")
        return f" over [{name}](https://huggingface.co/{name}){f' (revision {revision})' if revision else ''}"
    known = (checkpoint.manifest or {}).get("base") or {}
    return f" over `{public_name(known['path'])}`" if "path" in known else ""


def _use(checkpoint: Checkpoint, form: str, repo: str, base: Optional[str]) -> Iterator[str]:
    kind = "SequenceClassification" if checkpoint.config.labels else "CausalLM"
    ask = "classify --text" if checkpoint.config.labels else "generate --prompt"
    code = {
        "hf": [f"from transformers import AutoModelFor{kind}", "", f'AutoModelFor{kind}.from_pretrained("{repo}")'],
        "peft": [f"from peft import AutoPeftModelFor{kind}", "", f'AutoPeftModelFor{kind}.from_pretrained("{repo}")'],
    }
    if form in code:
        yield from ["```python", *code[form], "```", ""]
    yield from ["```", f"litfreeze {ask.replace(' ', f' --checkpoint_dir {repo} ')} 'Hello'", "```"]
    if checkpoint.prompt and checkpoint.prompt["style"] not in ("chat_template", "plain"):
        yield from ["", f"It was trained on prompts in the style `{checkpoint.prompt['style']}`."]


def _of_run(run: Mapping[str, Any], number: int, count: int, checkpoint: Checkpoint) -> Iterator[str]:
    """A section of its own for each run, oldest first."""
    yield from [f"## Training{f', run {number} of {count}' if count > 1 else ''}", "", "| | |", "| --- | --- |"]
    trained = (checkpoint.manifest or {}).get("training", {}).get("trained", []) if number == count else []
    for name, value in _facts(run, trained):
        yield f"| {name} | {value} |"
    yield ""
    if "recipe" in run and run.get("kind") in SCRIPTS:
        recipe = public_recipe(run["kind"], run["recipe"])
        yield from ["```", shlex.join(command(run["kind"], recipe)), "```", ""]


def _facts(run: Mapping[str, Any], trained: list[str]) -> Iterator[tuple[str, str]]:
    extras = [name for name in EXTRAS if name in {part_of(tensor) for tensor in trained}]
    layers = [f"blocks {run['layers']}"] if run.get("layers", "none") != "none" else []
    yield "layers trained", " and ".join([*layers, *extras]) or "none"
    if trained:
        yield "tensors trained", f"{len(trained):,}"
    if data := run.get("data"):
        counts = f"{data['train_samples']:,} samples for training, {data['val_samples']:,} for validation"
        yield "data", f"`{data['name']}`: {counts}"
    yield "length", f"{run['step']:,} steps, {run['epochs']:g} epochs, {run['tokens']:,} tokens"
    before, after = run.get("before"), run.get("after")
    if after:
        for key, name, form in (
            ("loss", "validation loss", "{:.4f}"),
            ("exact_match", "exact match", "{:.1%}"),
            ("macro_f1", "macro F1", "{:.1%}"),
            ("accuracy", "tokens right" if after.get("macro_f1") is None else "accuracy", "{:.1%}"),
        ):
            if after.get(key) is not None:
                start = form.format(before[key]) if before and before.get(key) is not None else "not measured"
                yield name, f"{start} before, {form.format(after[key])} after"
    for name, value in _hyperparameters(run):
        yield name, f"`{value}`"


def _hyperparameters(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the run went by, defaults included, as far as its recipe still means something."""
    try:
        options = arguments(f"finetune {run['kind']}", SCRIPTS[run["kind"]], run["recipe"])
    except (KeyError, LitfreezeError):  # an older litfreeze's
        return
    for name in HYPER:
        yield name, "3 % of the steps" if (value := getattr(options["train"], name)) is None else value
    yield "precision", run.get("precision")
    yield "seed", options["seed"]
