"""`litfreeze verify`: whether a checkpoint, or all that a run keeps, is still what was written."""

from pathlib import Path


def setup(path: Path) -> list:
    """Read every byte of a checkpoint, or of all checkpoints of a run, and compare it with the hashes on record.

    The exit code is 1 if something is damaged.

    Args:
        path: A litfreeze, Hugging Face or PEFT directory, or the folder of a run; or ORG/NAME on the Hub.
    """
    from litfreeze.checkpoint.hub import located
    from litfreeze.checkpoint.verify import verify
    from litfreeze.errors import RunError, UsageError

    folder = located(path)
    if not folder.is_dir():
        raise UsageError(f"{path} is no directory here.")
    verdicts = []
    for verdict in verify(folder):
        verdicts.append(verdict)
        told = "damaged" if verdict.fault else "whole"
        print(f"{told:9} {verdict.path}: {verdict.fault or verdict.what}", flush=True)
    if damaged := [verdict for verdict in verdicts if verdict.fault]:
        raise RunError(f"{len(damaged)} of {len(verdicts)} damaged. What was whole can be used on.")
    return verdicts
