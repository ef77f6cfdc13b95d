"""EleutherAI's lm-eval over our model: https://github.com/EleutherAI/lm-evaluation-harness

Its own `HFLM`, over transformers, is what this agrees with: how contexts and continuations are cut into tokens, what
stands before an empty context, what is left of one that is too long, and where an answer ends."""

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from tqdm import tqdm

from litfreeze.data.batches import build_batch, groups_of
from litfreeze.data.shelf import IGNORE, Sample
from litfreeze.errors import RunError, UsageError, did_you_mean
from litfreeze.freeze.memory import logit_rows
from litfreeze.generate.sample import Sampling, generate_tokens
from litfreeze.generate.text import until
from litfreeze.model import GPT
from litfreeze.tokenizer import Tokenizer

MISSING = "--tasks needs lm-eval. Install it: pip install 'litfreeze[eval]'."
SEED = 1234  # of the examples before a question: lm-eval's
NEW_TOKENS = 256  # of an answer, where a task does not say: HFLM's number

try:
    from lm_eval.api.model import TemplateLM
except ImportError:
    raise UsageError(MISSING) from None


Results = dict[str, dict[str, tuple[float, Optional[float]]]]  # task -> metric -> its value and standard error


class Ours(TemplateLM):
    """A model that lm-eval asks: `loglikelihood` is `TemplateLM`'s, over `_loglikelihood_tokens`."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.tokens = model, tokenizer
        self._device = model.embed.weight.device
        self.max_length = model.config.block_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self.tokens.eos_id is None:
            raise RunError("This tokenizer names no token that ends a text (eos_token), which lm-eval needs.")
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: BOS, if the tokenizer names one."""
        return self.tokens.bos_id if self.tokens.names_bos else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **_: Any) -> list[int]:
        """Tokens with those that the tokenizer itself puts around a text, unless it begins with them already."""
        if add_special_tokens is None:
            prefix = self.tokens.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        return self.tokens.encode(string, special_tokens=add_special_tokens)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (what was asked, context, continuation): the log-probability of the continuation, and whether greedy
        decoding would write it. What is too long loses its beginning."""
        samples = []
        for asked, context, continuation in requests:
            if not continuation:
                raise RunError(f"A task asks how likely {asked[1]!r} is, which has no token of its own there.")
            tokens = (context + continuation)[-(self.max_length + 1) :]
            labels = np.full(len(tokens), IGNORE, np.int32)
            labels[-len(continuation) :] = tokens[-len(continuation) :]
            samples.append(Sample(np.array(tokens, np.int32), labels, "", (0, len(tokens))))
        found: list[tuple[float, bool]] = []
        # In their order: the choices of a question stand together, and it is read once for all of them
        groups = groups_of([len(sample.tokens) for sample in samples], range(len(samples)))
        for group in tqdm(groups, desc="Scored", unit="batch", disable=None, leave=False):
            batch = move_data_to_device(build_batch(samples, group), self._device)
            x = self.model.embed_tokens(batch.tokens, batch.positions)  # (N, C)
            x = self.model.run_blocks(x, batch.positions, batch.attention, rows=batch.rows)  # (M, C)
            sums, missed = torch.zeros(2, len(group), dtype=torch.float64, device=x.device)
            size = logit_rows(self.model.config.vocab_size)
            parts = (part.split(size) for part in (x, batch.targets, batch.records))
            for rows, targets, records in zip(*parts, strict=True):
                shares = self.model.logits(rows).float().log_softmax(-1)  # (m, V)
                sums.index_add_(0, records, shares.gather(-1, targets[:, None])[:, 0].double())
                missed.index_add_(0, records, (shares.argmax(-1) != targets).double())
            found += [(total, wrong == 0) for total, wrong in zip(sums.tolist(), missed.tolist(), strict=True)]
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, cut into windows that the model can take."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, one after another, up to what ends it."""
        shown = tqdm(requests, desc="Answered", disable=None, leave=False)
        return [self._answer(*request.args, seed) for seed, request in enumerate(shown)]

    def _answer(self, context: str, asked: dict[str, Any], seed: int) -> str:
        from lm_eval.models.utils import handle_stop_sequences

        until_words, count, sampling = generation(asked)
        end = self.tokens.decode([self.eot_token_id], skip_special_tokens=False)
        stops = [stop for stop in handle_stop_sequences(until_words, end) if stop]
        room = self.max_length - count
        tokens = self.tok_encode(context)[-room:]
        stop_ids, texts = self.tokens.ends(stops)
        new = generate_tokens(self.model, tokens, count, stop_ids, sampling, seed)
        return "".join(until(self.tokens.stream(), new, texts))


def generation(asked: dict[str, Any]) -> tuple[Any, int, Sampling]:
    """What ends an answer, how many tokens it may have and how they are drawn, of a task's generation_kwargs. Raises
    UsageError for what litfreeze does not know."""
    from lm_eval.models.utils import normalize_gen_kwargs

    asked = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
    ends, count, draws = asked.pop("until", []), asked.pop("max_gen_toks"), asked.pop("do_sample")
    drawn = Sampling(float(asked.pop("temperature", 1.0)), asked.pop("top_k", None), float(asked.pop("top_p", 1.0)))
    if asked.pop("num_beams", 1) != 1:
        asked["num_beams"] = None
    if asked:
        raise UsageError(f"A task asks for {', '.join(asked)}, which litfreeze does not know in generation.")
    return ends, count, drawn if draws else Sampling()


def check_tasks(loaded: dict[str, Any], positions: int) -> None:
    """Raises UsageError for a task whose answers a model of so many `positions` cannot give."""
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        try:
            _, count, _ = generation(task.get_config("generation_kwargs") or {})
        except UsageError as error:
            raise UsageError(f"--tasks {name}: {error}") from None
        if count >= positions:
            raise UsageError(f"--tasks {name} asks for answers of {count} tokens; a model has {positions} positions.")


def load_tasks(names: Sequence[str], include_path: Optional[Path], num_fewshot: Optional[int]) -> dict[str, Any]:
    """lm-eval's own tasks and those in `include_path`, with their data. Raises UsageError for a name that is none of
    them, and for a number of examples that a task does not take; RunError if its data cannot be had."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include_path {include_path} is no folder here.")
    with quiet():
        own = include_path and TaskManager(include_path=str(include_path), include_defaults=False)
        if own and set(names) <= set(own.all_subtasks):
            manager = own  # to look through lm-eval's thousands takes seconds
        else:
            manager = TaskManager(include_path=include_path and str(include_path))
        for name in names:
            if name not in manager.all_tasks:
                raise UsageError(f"--tasks: lm-eval has no task {name!r}.{did_you_mean(name, manager.all_tasks)}")
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # whatever becomes of a task's file, its code and its data
            reason = " ".join(str(error).split())[:300]
            raise RunError(f"--tasks {','.join(names)} cannot be loaded: {type(error).__name__}: {reason}") from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own == 0 != num_fewshot:
            raise UsageError(f"--num_fewshot {num_fewshot}: the task {name} is made for none.")
        task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
    return loaded


def run_tasks(model: GPT, tokenizer: Tokenizer, loaded: dict[str, Any], limit: Optional[int]) -> Results:
    """What lm-eval measures of `model` in the tasks that `load_tasks` gave."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # every model gets the same examples
    with quiet():
        results = evaluate(Ours(model, tokenizer), loaded, limit=limit, log_samples=False)["results"]
    found: Results = {}
    for task, metrics in results.items():
        rows = found.setdefault(task, {})
        for key, value in metrics.items():
            name, _, filtered = key.partition(",")
            if isinstance(value, (int, float)) and filtered and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{filtered}")
                label = name if filtered == "none" else f"{name} ({filtered})"
                rows[label] = float(value), error if isinstance(error, float) else None
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """While it is entered lm-eval tells of errors alone, and shows its bars on a terminal alone."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield
