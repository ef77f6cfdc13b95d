"""What is common to all that goes to and comes from the Hugging Face Hub: names, tokens, and what its errors mean.

ORG/NAME or ORG/NAME@REVISION names a model or a dataset. Tokens go from the option or the environment to
huggingface_hub, and nowhere else."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Optional

from litfreeze.errors import LitfreezeError, RunError, UsageError

MISSING = "{}s on the Hugging Face Hub need huggingface_hub. Install it: pip install 'litfreeze[{}]'."
EXTRAS = {"model": "hub", "dataset": "data"}
NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-][\w./-]*))?", re.ASCII)
HINT = "log in (hf auth login), set HF_TOKEN or give --token"


def is_hub_name(word: Path | str) -> bool:
    """Whether `word` has the form ORG/NAME or ORG/NAME@REVISION. A relative path may have it too."""
    return NAME.fullmatch(str(word)) is not None


def library(kind: str = "model") -> ModuleType:
    """huggingface_hub. Raises UsageError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(MISSING.format(kind.capitalize(), EXTRAS[kind])) from None
    return huggingface_hub


@contextmanager
def with_token(token: Optional[str]) -> Iterator[None]:
    """While it is entered huggingface_hub goes by `token`, if there is one: it looks into the environment first."""
    before = os.environ.get("HF_TOKEN")
    os.environ |= {} if token is None else {"HF_TOKEN": token}
    try:
        yield
    finally:
        if token is not None:
            os.environ.pop("HF_TOKEN")
            os.environ |= {} if before is None else {"HF_TOKEN": before}


@contextmanager
def talking(name: str, kind: str, here: Callable[[], str], bars: bool = False) -> Iterator[None]:
    """While it is entered huggingface_hub may be asked about the model or dataset (`kind`) `name`: its bars are shown
    on a terminal alone, and its errors become one or two lines of ours. `here` says what of it is in the cache."""
    hub = library(kind)
    import httpx2
    from huggingface_hub.utils import are_progress_bars_disabled, logging

    quiet = not are_progress_bars_disabled() and not (bars and sys.stderr.isatty())
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells every attempt
    if quiet:
        hub.utils.disable_progress_bars()
    try:
        yield
    except LitfreezeError:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, hub.errors.HFValidationError) as error:
        raise _told(error, name, kind, here) from None
    finally:
        logging.set_verbosity(level)
        if quiet:
            hub.utils.enable_progress_bars()


def _told(error: Exception, name: str, kind: str, here: Callable[[], str]) -> LitfreezeError:
    """What a person can do about an `error` of huggingface_hub's or of what lies under it."""
    import httpx2

    errors, place = library().errors, library().constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it looked into its cache because of that
    repo, revision = NAME.fullmatch(name).groups()
    page = f"{place}/{repo}" if kind == "model" else f"{place}/{kind}s/{repo}"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UsageError(f"HF_HUB_OFFLINE is set, and {here()}")
    if isinstance(error, errors.GatedRepoError):
        return UsageError(f"{repo} is gated: ask for access at {page}, then {HINT}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{page} has no revision {revision or 'main'!r}; {page}/refs lists them.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(f"{place} has no {kind} {repo}, or a private one. For that, {HINT}.")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo!r} is no name on the Hub: {reason(error)}")
    if status in (401, 403):
        return UsageError(f"{place} refuses the token for {repo} ({status}). Give one that is good for it: {HINT}.")
    if isinstance(error, (httpx2.ConnectError, httpx2.TimeoutException, httpx2.ProxyError, httpx2.InvalidURL)):
        return RunError(f"There is no network: {place} cannot be reached ({reason(error)}), and {here()}")
    if status is not None:
        return RunError(f"{place} answered {status} for {repo}. Try again later.")
    return RunError(
        f"The transfer of {repo} was cut ({reason(error)}).\nFiles that are whole are kept; the same command goes on "
        "with the others."
    )


def reason(error: Exception) -> str:
    """The first 160 characters of its text, in one line."""
    return " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
