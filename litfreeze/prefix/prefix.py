"""The frozen prefix: what lies below the lowest trained block gives the same for a record every time, so it runs once.

What comes out of it, rows (T, C) of the residual stream, is kept by an `ActivationStore` under the hash of the record's
tokens. The store's key is a hash of all else that decides those rows, so that a wrong hit cannot be."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any, Optional

import torch
from torch import Tensor, nn

from litfreeze.attention import kernel_name
from litfreeze.checkpoint.tensors import as_bytes, is_mapped
from litfreeze.config import Config
from litfreeze.data.batches import Batch, build_batch
from litfreeze.data.shelf import Sample
from litfreeze.freeze.plan import block_of
from litfreeze.heap import trim
from litfreeze.model import GPT
from litfreeze.precision import Precision
from litfreeze.prefix.store import ActivationStore

FORMAT = 1  # goes up when what is computed, or how it is stored, changes
AT_ONCE = 2048  # tokens that run through the prefix together


class Prefix:
    """The embedding and blocks 0 … `stop`-1 of `gpt`, for the records of a run.

    Records run through it in groups of about `AT_ONCE` tokens, neighbours in `samples`: whoever needs one of them
    first, it is made together with the same others, and so to the same bits. On a processor the weights are in memory
    one block at a time, on a GPU until all records are known; they come back if a record is needed again.

    Args:
        store: Keeps what was computed.
        samples: The records of the run, best in the order in which they are needed first.
        read: Gives a weight of the model by name, mapped from its file and in the dtype it is kept in.
        mode: The context that the model computes in (autocast).
        together: Other processes fill the same store, so that what is made is written at once.
        streamed: These weights are never all in memory.
        released: They have left `gpt` already."""

    def __init__(
        self,
        gpt: GPT,
        stop: int,
        store: ActivationStore,
        samples: Sequence[Sample],
        read: Callable[[str], Tensor],
        mode: Callable[[], AbstractContextManager[Any]],
        together: bool = False,
        streamed: bool = False,
        released: bool = False,
    ) -> None:
        self.gpt = gpt
        self.stop = stop
        self.store = store
        self.read = read
        self.mode = mode
        self.together = together
        self.streamed = streamed
        self.samples = samples
        self.group_of: dict[bytes, int] = {}
        self.groups: dict[int, list[int]] = {}  # indices of samples: these may lie on disk
        self.unknown: set[bytes] = set()
        start = 0
        for i, sample in enumerate(samples):
            if sample.digest not in self.group_of:
                self.group_of[sample.digest] = start // AT_ONCE
                self.groups.setdefault(start // AT_ONCE, []).append(i)
                start += len(sample.tokens) - 1
                if sample.digest not in store:
                    self.unknown.add(sample.digest)
        names = (name for name, _ in gpt.named_parameters())
        self.names = only_below(gpt.config, names, stop)
        self.released = released

    def fill(self, now: Iterable[Sample]) -> None:
        """Makes those of `now` that are unknown, and with them the others of their groups; and lets go of the weights
        once nothing is left to make."""
        now = list(now)
        if self.lacks(now) and self.together:
            self._look_again()
        if self.lacks(now) and not self.store.full:
            wanted = {self.group_of[sample.digest] for sample in now if sample.digest in self.unknown}
            self._make([self._unknown_of(i) for i in sorted(wanted)])
        if not self.unknown:
            self.release()

    def fill_all(self, rank: int, world_size: int, barrier: Callable[[], None]) -> None:
        """Makes all that is unknown, the processes sharing the work."""
        groups = [group for i in self.groups if (group := self._unknown_of(i))]
        if mine := groups[rank::world_size]:
            self._make(mine)
        self.store.flush()
        barrier()
        self._look_again()

    def stream(self, batch: Batch, samples: Sequence[Sample]) -> Tensor:
        """The residual stream above the prefix, (N, C) or (B, T, C), for a batch of `samples`."""
        width = self.gpt.config.n_embd
        rows: dict[int, Tensor] = {}
        for i in {place.sample for place in batch.places}:
            try:
                rows[i] = self.store.read((sample := samples[i]).digest)
            except KeyError:  # the disk is full, or what stood there is damaged
                rows[i] = self._make([[sample]])[sample.digest]
        x = torch.zeros(batch.tokens.numel(), width, dtype=self.gpt.stream, device=self.store.device)
        for row, i, start, stop in batch.places:
            x[row : row + stop - start] = rows[i][start:stop]
        return x.view(*batch.tokens.shape, width)

    def release(self) -> None:
        """Lets go of the weights: those of the blocks, and the embedding where the head does not need it."""
        if not self.released:
            self._let_go(self.names)
        self.released = True

    def restore(self) -> None:
        """Brings the weights back, mapped from their file."""
        if self.released:
            self._bring(self.names)
        self.released = False

    def give_up(self, stop: int) -> None:
        """Hands what is not below block `stop` back to the model, with its weights: everything if `stop` is 0."""
        if self.released:
            below = set(only_below(self.gpt.config, self.names, stop)) if stop else set()
            self._bring([name for name in self.names if name not in below])

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within it the whole model runs as any other: on a GPU all weights come back, on a processor a block's come
        when it is reached, and go after it if they were but mapped and not made."""
        if not self._by_block:
            self.restore()
            yield
            return
        self.release()
        hooks = []
        for i, block in enumerate(self.gpt.blocks[: self.stop]):
            own = self._names_of(i)
            hooks.append(block.register_forward_pre_hook(lambda *_, own=own: self._bring(self._absent(own))))
            hooks.append(block.register_forward_hook(lambda *_, own=own: self._let_go(self._mapped(own))))
        self._bring(self._names_of(None))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._let_go(self.names)

    def lacks(self, samples: list[Sample]) -> bool:
        """Whether one of `samples` is unknown."""
        return any(sample.digest in self.unknown for sample in samples)

    @property
    def _by_block(self) -> bool:
        return self.streamed or self.gpt.final_norm.weight.device.type == "cpu"

    def _names_of(self, block: Optional[int]) -> list[str]:
        return [name for name in self.names if block_of(name) == block]

    def _absent(self, names: list[str]) -> list[str]:
        return [name for name in names if not self.gpt.get_parameter(name).numel()]

    def _mapped(self, names: list[str]) -> list[str]:
        return [name for name in names if self.streamed or is_mapped(self.gpt.get_parameter(name))]

    def _unknown_of(self, group: int) -> list[Sample]:
        return [sample for i in self.groups[group] if (sample := self.samples[i]).digest in self.unknown]

    def _look_again(self) -> None:
        self.store.refresh()
        self.unknown = {digest for digest in self.unknown if digest not in self.store}

    @torch.no_grad()
    def _make(self, groups: list[list[Sample]]) -> dict[bytes, Tensor]:
        """Computes the rows of the samples in `groups`, each as one batch, and adds them to the store. Handed back is
        what the last group gave."""
        batches = [build_batch(group, list(range(len(group)))) for group in groups]
        made: dict[bytes, Tensor] = {}
        if not self._by_block:
            self.restore()
            for batch, group in zip(batches, groups, strict=True):
                made = self._keep(batch, group, self._run(batch, self._embed(batch), 0, self.stop))
            return made
        self.release()
        with Scratch(batches, self.gpt.config.n_embd, self.gpt.stream) as scratch:
            for i in (None, *range(self.stop)):
                own = self._names_of(i)
                self._bring(own)
                scratch.each(lambda b, x, i=i: self._embed(b) if i is None else self._run(b, x, i, i + 1))
                self._let_go(own)
            for j, (batch, group) in enumerate(zip(batches, groups, strict=True)):
                made = self._keep(batch, group, scratch.read(j))
        trim()  # of what large products took for a moment
        return made

    def _embed(self, batch: Batch) -> Tensor:
        device = self.gpt.final_norm.weight.device
        with self.mode():
            return self.gpt.embed_tokens(batch.tokens.to(device), batch.positions.to(device))

    def _run(self, batch: Batch, x: Tensor, start: int, stop: int) -> Tensor:
        device = self.gpt.final_norm.weight.device
        with self.mode():
            return self.gpt.run_blocks(x.to(device), batch.positions.to(device), batch.attention, start, stop)

    def _keep(self, batch: Batch, samples: list[Sample], x: Tensor) -> dict[bytes, Tensor]:
        """Cuts the stream (N, C) of `batch` into records. They are written together or not at all, so that what an
        interruption loses is made again as it was."""
        made = {}
        for place, span in zip(batch.places, batch.attention.spans, strict=True):
            sample = samples[place.sample]
            if place.stop == len(sample.tokens) - 1:  # not a beginning that several share
                made[sample.digest] = torch.cat([x[a:b] for a, b in (*span.before, span[:2])])
                self.store.add(sample.digest, made[sample.digest], more=place is not batch.places[-1])
                self.unknown.discard(sample.digest)
        if self.together:
            self.store.flush()
        return made

    def _bring(self, names: list[str]) -> None:
        for name in names:
            self._put(name, self.read(name).to(self.gpt.final_norm.weight.device))

    def _let_go(self, names: list[str]) -> None:
        for name in names:
            self._put(name, torch.empty(0, device=self.gpt.final_norm.weight.device))

    def _put(self, name: str, weight: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self.gpt.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))


class Scratch:
    """The streams (N, C) of several batches, in a file that is gone when it is closed: a context."""

    def __init__(self, batches: list[Batch], width: int, dtype: torch.dtype) -> None:
        self.batches = batches
        self.shapes = [(batch.tokens.numel(), width) for batch in batches]
        self.starts = list(accumulate((n * width * dtype.itemsize for n, _ in self.shapes), initial=0))
        self.dtype = dtype

    def __enter__(self) -> "Scratch":
        self.file = tempfile.TemporaryFile()
        self.file.truncate(self.starts[-1])
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, j: int) -> Tensor:
        """The stream of batch `j`."""
        x = torch.empty(self.shapes[j], dtype=self.dtype)
        self.file.seek(self.starts[j])
        self.file.readinto(as_bytes(x).numpy())
        return x

    def each(self, work: Callable[[Batch, Tensor], Tensor]) -> None:
        """Puts `work(batch, stream)` in place of each stream."""
        for j, batch in enumerate(self.batches):
            after = work(batch, self.read(j)).cpu()
            self.file.seek(self.starts[j])
            self.file.write(as_bytes(after).numpy())


def prefix_names(names: Iterable[str], stop: int) -> list[str]:
    """Those of the parameters `names` that decide what comes out below block `stop`."""
    return [n for n in names if n.startswith(("embed.", "pos_embed.")) or block_of(n) in range(stop)]


def only_below(config: Config, names: Iterable[str], stop: int) -> list[str]:
    """Those of them that nothing above block `stop` needs: a tied head needs the embedding."""
    return [n for n in prefix_names(names, stop) if not (config.tie_embeddings and n == "embed.weight")]


def prefix_key(
    config: Config,
    stop: int,
    hashes: Mapping[str, str],
    precision: Precision,
    device: torch.device,
    dtype: torch.dtype,
    scales: Mapping[str, float] = {},
) -> str:
    """A hash of all that decides the rows of a record but its tokens: the mathematics, the weights (`hashes`, sha256 of
    each tensor of the prefix as stored; `scales` of the adapters in it), what they are computed in and by, and the
    `dtype` of the rows."""
    decides = {
        "format": FORMAT,
        # Neither the head nor which blocks are new decides anything here
        "config": asdict(replace(config, labels=(), tie_embeddings=False, new_blocks=())),
        "stop": stop,
        "weights": dict(sorted(hashes.items())),
        "precision": precision.name,
        "positions": "from 0 in each record",
        "kernel": f"{kernel_name(device, precision.compute, config)}, torch {torch.__version__}",
        "dtype": str(dtype),
        **({"adapters": dict(sorted(scales.items()))} if scales else {}),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
