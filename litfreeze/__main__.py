"""The command line: the table of subcommands, and how an error becomes a line and an exit code.

Nothing heavy is imported: the modules named here hold signatures at their top and import torch inside functions."""

import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Optional

from litfreeze.cli import NoCommand, parse
from litfreeze.errors import Interrupted, LitfreezeError

COMMANDS = {
    "finetune full": "litfreeze.finetune.full:setup",
    "finetune lora": "litfreeze.finetune.lora:setup",
    "merge_lora": "litfreeze.scripts.merge:merge_lora",
    "merge_delta": "litfreeze.scripts.merge:merge_delta",
    "generate": "litfreeze.generate.base:setup",
    "chat": "litfreeze.generate.chat:setup",
    "serve": "litfreeze.serve.serve:setup",
    "classify": "litfreeze.generate.classify:setup",
    "evaluate": "litfreeze.evaluate.evaluate:setup",
    "sweep": "litfreeze.scripts.sweep:setup",
    "layers": "litfreeze.scripts.layers:setup",
    "rank": "litfreeze.scripts.rank:setup",
    "diff": "litfreeze.scripts.diff:setup",
    "verify": "litfreeze.scripts.verify:setup",
    "convert from_hf": "litfreeze.scripts.convert:from_hf",
    "convert to_hf": "litfreeze.scripts.convert:to_hf",
    "convert from_peft": "litfreeze.scripts.convert:from_peft",
    "convert to_peft": "litfreeze.scripts.convert:to_peft",
    "convert from_gguf": "litfreeze.scripts.convert:from_gguf",
    "convert to_gguf": "litfreeze.scripts.convert:to_gguf",
    "download": "litfreeze.scripts.download:setup",
    "upload": "litfreeze.publish.upload:setup",
    "expand": "litfreeze.scripts.expand:setup",
    "init": "litfreeze.scripts.init:setup",
    "data show": "litfreeze.scripts.data:show",
    "cache ls": "litfreeze.scripts.cache:ls",
    "cache rm": "litfreeze.scripts.cache:rm",
}

EXTENSIONS = "litfreeze.commands"  # the entry points by which other packages bring commands: name = module:function
LONGEST = 1000  # characters of a line of an error


def main(argv: Optional[list[str]] = None) -> int:
    """Run one command line (by default the process's own) and return its exit code.

    0: done. 1: the run failed. 2: the input was wrong. 130, 143: interrupted. 141: whoever read our output left.
    """
    code = _run(sys.argv[1:] if argv is None else list(argv))
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        # gloo's threads may drop what is Python's while Python comes to its end, which is a crash
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed, or nobody reads it
                stream.flush()
        os._exit(code)
    return code


def _run(words: list[str]) -> int:
    debug = "--debug" in words
    try:
        function, arguments = parse([word for word in words if word != "--debug"], commands())
        function(**arguments)
        sys.stdout.flush()
    except NoCommand as choices:
        print(choices, file=sys.stderr)
        return choices.exit_code
    except Interrupted as stop:
        if stop.exit_code:
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if debug:
            traceback.print_exc()
        if not getattr(error, "told", False):
            print(f"error: {_told(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, LitfreezeError) else 1
    return 0


def commands() -> dict[str, str]:
    """The commands of the core, and those of extensions that are there."""
    points = [point for point in entry_points(group=EXTENSIONS) if find_spec(point.module.partition(".")[0])]
    return COMMANDS | {point.name: point.value for point in points}


def _told(error: Exception) -> str:
    if isinstance(error, LitfreezeError):
        return _fit(str(error))
    text = " ".join(str(error).split())
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return f"{type(error).__name__}: {text} (run again with --debug for the traceback)"


def _fit(text: str) -> str:
    """`text` as one or two lines of some length: names and values from a file can hold anything, a terminal's control
    characters too."""
    lines = text.splitlines()
    lines = lines if len(lines) <= 2 else [" ".join(lines)]
    lines = [line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}" for line in lines]
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed, as by `| head`. Then Python's own last flush is kept quiet."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
