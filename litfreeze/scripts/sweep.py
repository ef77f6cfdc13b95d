"""`litfreeze sweep`: which layers? Short runs of several choices, side by side."""

from pathlib import Path
from typing import Literal, Optional, Union

from litfreeze.data.args import DataArgs
from litfreeze.freeze.args import FrozenArgs
from litfreeze.place import PlaceArgs, PrecisionName
from litfreeze.train.args import SEED, EvalArgs, TrainArgs

CANDIDATES = ["-2:", "20%-80%", "every:4", "lora:all"]


def setup(
    candidates: list[Union[str, int]] = CANDIDATES,
    checkpoint_dir: Optional[Path] = None,
    out_dir: Path = Path("out/sweep"),
    task: Literal["language", "classification"] = "language",
    data: DataArgs = DataArgs(),
    train: TrainArgs = TrainArgs(),
    eval: EvalArgs = EvalArgs(save_best=False, max_new_tokens=1),
    frozen: FrozenArgs = FrozenArgs(),
    precision: Optional[PrecisionName] = None,
    accelerator: str = "auto",
    devices: Union[int, str] = "auto",
    seed: int = SEED,
) -> Path:
    """Train several choices of layers on one budget and compare what they reached, how long it took and what memory.

    Each runs in a process of its own, with the same records in the same order; one epoch unless --train says. What is
    finished in --out_dir, of the same model, data and options, is not run again. Each keeps a cache of its own, so that
    times can be compared; with --cache_dir they share one, and the first to fill it pays.

    Args:
        candidates: Layers in the words of --trainable_layers, one after another: "-2:" "last:4" rank:gradient:4. After
            lora: they get an adapter: lora:all.
        checkpoint_dir: A litfreeze or Hugging Face directory, or ORG/NAME on the Hub; else the embedded demo model.
        out_dir: Where the runs, sweep.json and sweep.png are written.
        task: As in finetune.
        data: The records to learn from; a part of them, or --data.val_path, is for validation.
        train: How long and how fast to train each.
        eval: When to measure.
        frozen: How what is frozen is made cheap.
        precision: By default 32-true on a CPU and bf16-mixed on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
        devices: How many, or which ones (0,2).
        seed: Fixes the order of the records and every other draw.
    """
    import shlex
    from dataclasses import replace
    from shutil import rmtree

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.choose.sweep import Candidate, hash_of_files, recommend, table, try_candidate, write
    from litfreeze.choose.words import check_words
    from litfreeze.data.split import files_behind
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.finetune import full, lora
    from litfreeze.finetune.recipe import command, recipe_yaml
    from litfreeze.finetune.setting import with_demo_data
    from litfreeze.outputs import claim

    candidates = [str(words) for words in ([candidates] if isinstance(candidates, (str, int)) else candidates)]
    if len(candidates) != len(set(candidates)) or not candidates:
        raise UsageError("--candidates names one twice." if candidates else "--candidates is empty.")
    data = data if isinstance(data, DataArgs) else DataArgs(path=Path(data))
    if data.val_split_fraction == 0 and data.val_path is None:
        raise UsageError("--data.val_split_fraction 0: a sweep compares validation losses. Leave it out.")
    if not eval.initial_validation:
        raise UsageError("--eval.initial_validation false: a sweep needs the loss before training. Leave it out.")
    base = open_checkpoint(checkpoint_dir or MODEL_DIR)
    if base.lora is not None:
        raise UsageError(f"{base.path} is an adapter: {base.lora.describe()}. Name a model, or merge it first.")
    if bool(base.config.labels) and task == "language":
        raise UsageError(f"{base.path} is a classifier. Say --task classification.")
    chosen = [Candidate.parse(words) for words in candidates]
    for candidate in chosen:
        check_words(candidate.layers, base.config.n_layer, base.config.new_blocks, "candidates")
    if train.epochs is None and train.max_steps is None and train.max_time is None:
        train = replace(train, epochs=1)
    given = with_demo_data(data)
    made_of = f"{base.weights_hash} {hash_of_files(files_behind(given))}"
    out_dir = claim(Path(out_dir), "sweep")
    shared = {
        "checkpoint_dir": checkpoint_dir, "task": task, "data": data, "train": train, "eval": eval,
        "frozen": frozen, "place": PlaceArgs(precision, accelerator=accelerator, devices=devices), "seed": seed,
    }  # fmt: skip
    tried = []
    for number, candidate in enumerate(chosen, 1):
        script = {"full": full, "lora": lora}[candidate.method].setup
        options = {**shared, "trainable_layers": candidate.layers}
        options |= {"save": "delta"} if candidate.method == "full" else {}
        print(f"{number}/{len(chosen)}  {candidate.words}", end="  ", flush=True)
        run_dir = out_dir / candidate.folder(recipe_yaml(script, options), made_of)
        if frozen.cache_dir is None:
            options["frozen"] = replace(frozen, cache_dir=run_dir.with_name(f"{run_dir.name}.cache"))
        one = try_candidate(candidate, run_dir, recipe_yaml(script, options))
        if frozen.cache_dir is None:
            rmtree(options["frozen"].cache_dir, ignore_errors=True)
        tried.append(one)
        told = f"validation loss {one.loss:.4f}, {one.seconds:,.1f} s" if one.results else f"failed: {one.failure}"
        print(told, flush=True)
    taken, sentence = recommend(tried)
    write(out_dir, tried, sentence)
    print(f"\n{table(tried)}\n\n{sentence}\n")
    print(f"Written   {out_dir / 'sweep.json'}, {out_dir / 'sweep.png'}, and each run beside them")
    method, layers = taken.candidate.method, taken.candidate.layers
    script = {"full": full, "lora": lora}[method].setup
    print(f"Next      {shlex.join(command(method, recipe_yaml(script, {**shared, 'trainable_layers': layers})))}")
    return out_dir
