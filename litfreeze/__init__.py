"""litfreeze: fine-tune chosen layers of a language model.

`litfreeze.finetune(...)` is a run, `litfreeze.load(...)` a checkpoint to ask. No heavy import here: the command line
begins with this file."""

from pathlib import Path
from typing import Any, Optional, Union

from litfreeze import finetune
from litfreeze.errors import Interrupted, LitfreezeError, RunError, UsageError
from litfreeze.version import __version__

__all__ = ["Interrupted", "LitfreezeError", "RunError", "UsageError", "__version__", "finetune", "load"]


def load(
    checkpoint_dir: Union[Path, str, None] = None,
    base_dir: Union[Path, str, None] = None,
    prompt_style: Optional[str] = None,
    precision: Optional[str] = None,
    accelerator: str = "auto",
) -> Any:
    """A checkpoint in memory, as a `litfreeze.generate.loaded.Model`: `generate`, `chat`, `logits`, `module`.

    Args:
        checkpoint_dir: A litfreeze directory (whole, a delta or an adapter), a Hugging Face or PEFT one, or ORG/NAME on
            the Hub; else the embedded demo model.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        prompt_style: chat_template, alpaca, chatml, llama3 or plain; by default the one it was trained with.
        precision: 32-true or bf16-true; by default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.

    Raises:
        UsageError: There is no such checkpoint or device, or it is a classifier.
    """
    from litfreeze.generate.loaded import loaded

    return loaded(checkpoint_dir, base_dir, prompt_style, precision, accelerator)
