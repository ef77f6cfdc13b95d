"""The directory that is uploaded: a checkpoint in the form that its readers expect, with a card, and nothing that tells
of the machine it was made on."""

import json
import shutil
from pathlib import Path
from typing import Optional

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.hub import needed_files
from litfreeze.checkpoint.manifest import MANIFEST
from litfreeze.checkpoint.write import write_hf, write_peft
from litfreeze.json_file import read_json
from litfreeze.publish.public import public_manifest, without_places
from litfreeze.whole import whole_directory, write_text


def stage(out_dir: Path, checkpoint: Checkpoint, form: str, base: Optional[str], card: str) -> None:
    """Writes `checkpoint` to `out_dir`, whole or not at all, with `card` as its README.md: as Hugging Face's (`form`
    hf), as PEFT's (peft) or as it is (litfreeze). `base` is the name of its base on the Hub.

    Raises UsageError if the checkpoint has no such form, or `out_dir` already holds something."""
    with whole_directory(out_dir) as aside:
        if form == "hf":
            write_hf(aside, checkpoint)
        elif form == "peft":
            write_peft(aside, checkpoint, base)
        else:
            for name in needed_files(checkpoint.path):
                shutil.copyfile(checkpoint.path / name, aside / name)
        for name in ("config.json", "tokenizer_config.json"):
            _leave_places_out(aside / name)
        if form == "litfreeze":
            content = public_manifest(checkpoint.manifest, base, aside)
            write_text(aside / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        write_text(aside / "README.md", card)


def _leave_places_out(file: Path) -> None:
    """Other tools note in these files where they lay (`_name_or_path`, `tokenizer_file`), and read it nowhere."""
    if not file.is_file():
        return
    content = read_json(file)
    if (kept := without_places(content)) != content:
        write_text(file, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
