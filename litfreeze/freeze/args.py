"""Options about what is frozen: LLaMA-Factory's words, when it thaws, how fast it learns then, how it is made cheap.
No heavy import: the command line reads this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional, Union

from litfreeze.errors import UsageError
from litfreeze.freeze.layers import Layers, Names
from litfreeze.sizes import parse_size


@dataclass
class FrozenArgs:
    """What makes a run cheap. What is learned is the same, but for freeze_quantize and a cache_dtype that is not auto.

    Args:
        cache: Keep what comes out of the blocks below the lowest trained one, so that they run once per record: on
            disk, in ram, on the gpu, or off; auto is disk where it is exact and pays.
        cache_dir: Where such activations are kept for later runs; by default ~/.cache/litfreeze/prefix.
        cache_limit: Size that folder may reach; what was not used for longest goes first.
        cache_dtype: Keep activations in this dtype; auto is the one they are computed in, which is exact.
        stream_frozen: Fill the cache before training, with one frozen block in memory at a time, for models that are
            larger than memory. The samples before and after training are then left out.
        fused_backward: Step each parameter inside of backward, as soon as its gradient is there, so that gradients do
            not exist all at once. Needs --train.max_norm null and steps of one micro-batch on one process.
        shard_frozen: With --strategy fsdp, spread frozen weights over the processes too: less memory on each, and every
            block is sent to all when it is at work. Nothing is cached then.
        freeze_quantize: Keep frozen linear weights, from the lowest trained block up, in int8 or nf4 while training.
            Checkpoints have them as they are in the base. Needs bitsandbytes.
    """

    flat: ClassVar[bool] = True  # on the command line these options have no group's name before them
    exact: ClassVar[tuple[str, ...]] = (  # a run may go on with others, and learns the same to the bit
        "cache", "cache_dir", "cache_limit", "stream_frozen", "fused_backward", "shard_frozen",
    )  # fmt: skip

    cache: Literal["auto", "disk", "ram", "gpu", "off"] = "auto"
    cache_dir: Optional[Path] = None
    cache_limit: Union[int, str] = "50GB"
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    stream_frozen: bool = False
    fused_backward: bool = False
    shard_frozen: bool = False
    freeze_quantize: Optional[Literal["int8", "nf4"]] = None

    def __post_init__(self) -> None:
        parse_size(self.cache_limit)
        if self.stream_frozen and self.cache == "off":
            raise UsageError("--stream_frozen fills the cache, and --cache off has none. Leave one of them out.")
        if self.shard_frozen and self.cache not in ("auto", "off"):
            raise UsageError(
                f"--shard_frozen keeps nothing, and --cache {self.cache} asks for it. Leave one of them out."
            )


@dataclass
class FactoryArgs:
    """LLaMA-Factory's words for what trains.

    Args:
        freeze_trainable_layers: LLaMA-Factory's word: n > 0 trains the last n blocks, n < 0 the first n.
        freeze_trainable_modules: LLaMA-Factory's word for trainable_modules.
        freeze_extra_modules: LLaMA-Factory's word for trainable_extra.
        freeze_trainable_layers_ids: Block ids in the style of the LLaMA-Factory patches: 1,2,10.
        use_llama_pro: With freeze_trainable_layers n: the last block of each of n equal groups, as there.
    """

    flat: ClassVar[bool] = True

    freeze_trainable_layers: Optional[int] = None
    freeze_trainable_modules: Names = None
    freeze_extra_modules: Names = None
    freeze_trainable_layers_ids: Layers = None
    use_llama_pro: bool = False


@dataclass
class ThawArgs:
    """Which of the blocks that may train do so when; by default all of them from beginning to end.

    Args:
        unfreeze: Blocks that begin to train at a step (200), an epoch (2e) or a share of the run (50%), and may freeze
            again: '0:14,15; 200:12,13; 50%:8-11; 80%:freeze 14,15'. gradual:4 thaws the last four, one after another
            from the top. Takes the place of trainable_layers.
        lisa_layers: LISA: so many blocks train at a time, drawn anew out of all, or of those of trainable_layers.
        lisa_interval: Steps between two draws; 20 unless said.
    """

    flat: ClassVar[bool] = True

    unfreeze: Optional[str] = None
    lisa_layers: Optional[int] = None
    lisa_interval: Optional[int] = None

    def __post_init__(self) -> None:
        if self.unfreeze is not None and self.lisa_layers is not None:
            raise UsageError("--unfreeze and --lisa_layers both say when blocks train. Keep one of them.")
        if self.lisa_interval is not None and self.lisa_layers is None:
            raise UsageError("--lisa_interval needs --lisa_layers, the number of blocks that train at a time.")
        for name in ("lisa_layers", "lisa_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} must be at least 1.")


@dataclass
class RateArgs:
    """How fast each layer learns; by default all at --train.lr.

    Args:
        layer_lr: Learning rates of their own for some of what trains: '0-7:1e-6, 8-13:1e-5, head:5e-5'. The rest learns
            at train.lr, and the schedule goes for all.
        lr_decay_by_depth: Each block learns so many times as fast as the one above it, as 0.9; the highest that trains
            at train.lr. What layer_lr names keeps that rate.
    """

    flat: ClassVar[bool] = True

    layer_lr: Optional[str] = None
    lr_decay_by_depth: Optional[float] = None

    def __post_init__(self) -> None:
        decay = self.lr_decay_by_depth
        if decay is not None and not 0 < decay <= 1:
            raise UsageError(f"--lr_decay_by_depth {decay} must be above 0 and at most 1, such as 0.9.")
