"""`litfreeze evaluate`: checkpoints and their base side by side, on your own records and on lm-eval's tasks."""

from pathlib import Path
from typing import Any, Literal, Optional, Union

from litfreeze.data.args import DataArgs
from litfreeze.freeze.layers import Names
from litfreeze.train.args import TrainArgs


def setup(
    checkpoint_dir: Union[str, list[str], None] = None,
    base_dir: Optional[Path] = None,
    data: DataArgs = DataArgs(),
    tasks: Names = None,
    include_path: Optional[Path] = None,
    num_fewshot: Optional[int] = None,
    limit: Optional[int] = None,
    with_base: bool = True,
    json: Optional[Path] = None,
    micro_batch_size: int = TrainArgs.micro_batch_size,
    precision: Optional[Literal["32-true", "bf16-true"]] = None,
    accelerator: str = "auto",
) -> list[dict[str, Any]]:
    """Measure checkpoints, and the base they were trained from, on the same records and tasks, in one table.

    On records: the loss of a target token, its exponential (perplexity), the share of targets that the greedy choice
    hits, and the share of responses that greedy decoding would write word for word; of a classifier, accuracy and macro
    F1. These are what finetune tells of its validation records. Loss and perplexity compare models of one tokenizer.

    Args:
        checkpoint_dir: One, or several as a,b: litfreeze, Hugging Face or PEFT directories, or ORG/NAME on the Hub;
            without it, the embedded demo model.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        data: The records; all of them are looked at. Without them and --tasks, the embedded validation utterances.
        tasks: Tasks of lm-eval, as a,b (needs litfreeze[eval]). Their metrics stand in the same table.
        include_path: A folder of task files (YAML) of your own. With data of your own they need no network.
        num_fewshot: Examples before each question, in place of the task's own number.
        limit: Take only the first so many of the records, and of each task's questions.
        with_base: Measure the base of a checkpoint that was trained here too, asked in the same way.
        json: Write every figure to this file.
        micro_batch_size: Records in one forward pass.
        precision: By default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
    """
    from dataclasses import replace

    from litfreeze.checkpoint.load import load_model
    from litfreeze.demo import VAL_FILE
    from litfreeze.errors import UsageError
    from litfreeze.evaluate.columns import columns_of
    from litfreeze.evaluate.records import read_all, score
    from litfreeze.evaluate.table import describe, write_figures
    from litfreeze.launch import one_device
    from litfreeze.whole import check_new_file

    data = data if isinstance(data, DataArgs) else DataArgs(path=Path(data))
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks or [])
    names = [name.strip() for name in names]
    if not names and (include_path is not None or num_fewshot is not None):
        raise UsageError(f"--{'include_path' if include_path is not None else 'num_fewshot'} is for --tasks.")
    for option, number, least in (
        ("limit", limit, 1), ("micro_batch_size", micro_batch_size, 1), ("num_fewshot", num_fewshot, 0)
    ):  # fmt: skip
        if number is not None and number < least:
            raise UsageError(f"--{option} {number} must be at least {least}.")
    check_new_file("json", json)
    columns, notes = columns_of(checkpoint_dir, base_dir, with_base)
    has_records = data.path is not None or not names
    if has_records:
        data = replace(data, path=data.path or VAL_FILE)
        records, told = read_all(columns, data, limit)
        notes.insert(0, told)
    elif data != DataArgs():
        raise UsageError("--data.… stands without --data FILE, and only --tasks are looked at.")
    if names:
        from litfreeze.evaluate.harness import check_tasks, load_tasks, run_tasks

        if columns[0].checkpoint.config.labels:
            raise UsageError(f"--tasks: {columns[0].name} is a classifier and writes nothing.")
        loaded = load_tasks(names, include_path, num_fewshot)
        check_tasks(loaded, min(column.checkpoint.config.block_size for column in columns))
    fabric, kept = one_device(accelerator, precision)
    figures = []
    for i, column in enumerate(columns):
        model = load_model(column.checkpoint, lambda _: kept.frozen).to(fabric.device)
        found: dict[str, Any] = {"name": column.name, "path": str(column.checkpoint.path)}
        if has_records:
            found["records"] = score(fabric, model, records[i], data, micro_batch_size)
        if names:
            found["tasks"] = run_tasks(model, column.checkpoint.tokenizer(), loaded, limit)
        figures.append(found)
        del model  # before the next one is loaded
    print("\n".join([*notes, *([""] if notes else []), describe(figures)]))
    if json is not None:
        write_figures(Path(json), figures, str(data.path) if data.path else None, limit)
        print(f"\nWritten   {json}")
    return figures
