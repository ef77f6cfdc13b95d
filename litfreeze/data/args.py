"""The options of `--data`. No heavy import: the command line reads this file to print its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

from litfreeze.errors import UsageError


@dataclass
class DataArgs:
    """Where the records are and how they become tokens.

    Args:
        path: A .json, .jsonl, .csv, .txt or .parquet file, or a folder of them; a folder that datasets.save_to_disk
            made; or a set on the Hugging Face Hub, ORG/NAME or ORG/NAME@REVISION. `--data FILE` is short for
            `--data.path FILE`. Without it, the embedded SNIPS set.
        subset: Of a set on the Hub that has several: the name of one.
        split: Of a set with splits: the one to read. By default train, or the only one.
        val_split: And the one to validate on. By default validation, if there is one and neither split, val_path nor
            val_split_fraction says otherwise; a test split is used only if it is named here.
        format: The shape of a record; `auto` tells it from its keys. alpaca: instruction/input/output; chat: messages
            or conversations; completion: prompt/completion; text: text.
        prompt_style: How a record becomes text: chat_template (the checkpoint's own), alpaca, chatml, llama3 or plain.
            By default what the checkpoint was trained with, else its chat template, else alpaca.
        prompt_args: Variables for the chat template, such as {"enable_thinking": false}. Saved with the checkpoint.
        text_key: For --task classification: the key of the text. By default text, sentence, utterance, prompt,
            instruction or question.
        label_key: And that of the class: label, category, intent, class, completion, output or answer.
        mask_prompt: Learn from the responses only; false learns from every token.
        packing: `on` trains on streams of records without pads; `off` pads each to the longest of its micro-batch.
        share_prompts: Compute what records of a micro-batch begin with only once; needs packing.
        max_seq_length: Longest sample in tokens; by default 1024, or what the model can take if that is less.
        overlong: A longer record is cut at its end, or dropped. Both are counted. Plain text is cut into windows.
        bad_records: A record that cannot be read stops the run, or is skipped and counted.
        val_path: Validation records from a file, folder or set of their own, in place of a part of the others.
        val_split_fraction: Share of the records kept for validation, 0.1 unless said or `val_path` is given; 0 trains
            on all of them, without validation.
        seed: Fixes the split.
        keep: Where tokens are kept during the run: in memory; on disk, in a file that goes with the run, so that memory
            does not grow with the set; auto is memory up to 1 GB of them. What is learned is the same.
        keep_dir: The folder of that file, by default ~/.cache/litfreeze/samples.
    """

    exact: ClassVar[tuple[str, ...]] = ("keep", "keep_dir")  # a run may go on with others, and learns the same

    path: Optional[Path] = None
    subset: Optional[str] = None
    split: Optional[str] = None
    val_split: Optional[str] = None
    format: Literal["auto", "alpaca", "chat", "completion", "text"] = "auto"
    prompt_style: Optional[str] = None
    prompt_args: Optional[dict] = None  # of dict[str, Any] jsonargparse would read each text once more
    text_key: Optional[str] = None
    label_key: Optional[str] = None
    mask_prompt: bool = True
    packing: Literal["on", "off"] = "on"
    share_prompts: bool = True
    max_seq_length: Optional[int] = None
    overlong: Literal["cut", "drop"] = "cut"
    bad_records: Literal["stop", "skip"] = "stop"
    val_path: Optional[Path] = None
    val_split_fraction: Optional[float] = None
    seed: int = 42
    keep: Literal["auto", "memory", "disk"] = "auto"
    keep_dir: Optional[Path] = None

    def __post_init__(self) -> None:
        _check_length(self.max_seq_length)


@dataclass
class TextArgs:
    """The texts that `litfreeze classify` reads.

    Args:
        path: A file, a folder or a set on the Hub, as in finetune. `--data FILE` is short for `--data.path FILE`. If
            its records have labels, the answers are counted against them.
        subset: Of a set on the Hub that has several: the name of one.
        split: Of a set with several splits: the one to read.
        text_key: The key of the text. By default text, sentence, utterance, prompt, instruction or question.
        label_key: And that of the class, if there is one: label, category, intent, class, completion, output or answer.
        max_seq_length: Texts are cut behind so many tokens; by default 1024, or what the model can take if that is
            less, as in training.
        bad_records: A record that cannot be read stops the command, or is skipped and counted.
    """

    path: Optional[Path] = None
    subset: Optional[str] = None
    split: Optional[str] = None
    text_key: Optional[str] = None
    label_key: Optional[str] = None
    max_seq_length: Optional[int] = None
    bad_records: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        _check_length(self.max_seq_length)


def _check_length(length: Optional[int]) -> None:
    if length is not None and length < 2:
        raise UsageError(f"--data.max_seq_length {length}: a sample needs at least 2 tokens.")
