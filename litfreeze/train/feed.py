"""What the model is given, micro-batch by micro-batch: the batch and, over a frozen prefix, the stream above it."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Optional

from lightning_fabric import Fabric
from torch import Tensor

from litfreeze.data.args import DataArgs
from litfreeze.data.batches import Batch, build_batch
from litfreeze.data.shelf import Sample
from litfreeze.prefix.prefix import Prefix

Given = tuple[Batch, Optional[Tensor], int]  # the arguments of `NextToken.forward`


class Feed:
    """Makes of indices into `samples` what the model's forward takes, the next one while a GPU is at work.

    With a `prefix`, its rows are read, after those that are missing were made, a good many at once."""

    def __init__(
        self, fabric: Fabric, samples: Sequence[Sample], data: DataArgs, share: bool, prefix: Optional[Prefix] = None
    ) -> None:
        self.fabric = fabric
        self.samples = samples
        self.packed = data.packing == "on"
        self.share = share and data.share_prompts
        self.prefix = prefix
        # On a processor a second thread's work would only get in the way of the first one's
        self.beside = fabric.device.type != "cpu"
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="litfreeze-feed")
        self.coming: tuple[list[int], Optional[Future]] = ([], None)

    def given(self, micro_batches: list[list[int]], then: Optional[list[int]] = None) -> Iterator[Given]:
        """For each of `micro_batches`, on the device. `then` is the first one of the next time."""
        if self.prefix is not None:
            self.prefix.fill(self.samples[i] for i in chain(*micro_batches))
        for indices, after in zip(micro_batches, [*micro_batches[1:], then], strict=True):
            expected, future = self.coming
            batch, below = future.result() if future is not None and expected == indices else self._make(indices)
            self.coming = ([], None)
            if after is not None and self.beside and not self._lacks(after):
                self.coming = after, self.worker.submit(self._make, after)
            batch, below = self.fabric.to_device((batch, below))
            yield batch, below, 0 if self.prefix is None else self.prefix.stop

    def _lacks(self, indices: list[int]) -> bool:
        """Whether the prefix has yet to run for one of them."""
        return self.prefix is not None and self.prefix.lacks([self.samples[i] for i in indices])

    def _make(self, indices: list[int]) -> tuple[Batch, Optional[Tensor]]:
        batch = build_batch(self.samples, indices, self.packed, self.share)
        return batch, None if self.prefix is None else self.prefix.stream(batch, self.samples)
