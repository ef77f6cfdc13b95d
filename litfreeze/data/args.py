"""The options of `--data`. No heavy import: the command line reads this file to print its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from litfreeze.errors import UsageError


@dataclass
class DataArgs:
    """Where the records are and how they become tokens.

    Args:
        path: A .json, .jsonl, .csv or .txt file, or a folder of them. `--data FILE` is short for `--data.path FILE`.
            Without it, the embedded SNIPS set.
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
        val_path: Validation records from a file or folder of their own, in place of a split.
        val_split_fraction: Share of the records kept for validation, 0.1 unless said or `val_path` is given; 0 trains
            on all of them, without validation.
        seed: Fixes the split.
    """

    path: Optional[Path] = None
    format: Literal["auto", "alpaca", "chat", "completion", "text"] = "auto"
    prompt_style: Optional[str] = None
    prompt_args: Optional[dict[str, Any]] = None
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

    def __post_init__(self) -> None:
        _check_length(self.max_seq_length)


@dataclass
class TextArgs:
    """The texts that `litfreeze classify` reads.

    Args:
        path: A .json, .jsonl, .csv or .txt file, or a folder of them. `--data FILE` is short for `--data.path FILE`. If
            its records have labels, the answers are counted against them.
        text_key: The key of the text. By default text, sentence, utterance, prompt, instruction or question.
        label_key: And that of the class, if there is one: label, category, intent, class, completion, output or answer.
        max_seq_length: Texts are cut behind so many tokens; by default 1024, or what the model can take if that is
            less, as in training.
        bad_records: A record that cannot be read stops the command, or is skipped and counted.
    """

    path: Optional[Path] = None
    text_key: Optional[str] = None
    label_key: Optional[str] = None
    max_seq_length: Optional[int] = None
    bad_records: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        _check_length(self.max_seq_length)


def _check_length(length: Optional[int]) -> None:
    if length is not None and length < 2:
        raise UsageError(f"--data.max_seq_length {length}: a sample needs at least 2 tokens.")
