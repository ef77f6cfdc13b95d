"""FreezePlan: for every parameter of a model, does it train?

The only place that decides `requires_grad`. The optimizer, the writer, the report and the table all ask it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from torch import nn

from litfreeze.config import Config
from litfreeze.errors import RunError, UsageError, did_you_mean
from litfreeze.freeze.layers import Spec, parse_layers
from litfreeze.freeze.modules import narrow
from litfreeze.lora import B, LoRA, model_parameters

Part = Union[int, str]  # a block's id, or one of
EXTRAS = ("embed", "head", "final_norm")


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters train. Names are those of `GPT.named_parameters()`, matched whole: block 1 is never block 10."""

    config: Config
    sizes: Mapping[str, int]  # every parameter -> elements, an adapter's included
    trained: frozenset[str]
    lora: Optional[LoRA] = None
    lr_scales: Mapping[str, float] = field(default_factory=dict)  # parameter -> times the learning rate, if not 1
    lora_plus_ratio: float = 1.0

    @classmethod
    def everything(cls, config: Config) -> "FreezePlan":
        """Every parameter trains."""
        sizes = _sizes(config)
        return cls(config, sizes, frozenset(sizes))

    @classmethod
    def choose(
        cls, config: Config, layers: Spec, modules: Optional[Iterable[str]] = None, extra: Iterable[str] = ()
    ) -> "FreezePlan":
        """The blocks of `layers` train, or only `modules` inside them, and `extra` outside of them.

        A module is a path component (attn, mlp, q_proj, norm_1, bias), `norm` for all norms, a glob, or `re:` and a
        regular expression that must match the full name. Raises UsageError if a word matches nothing, nothing is left
        to train, or a tied head is asked for without the embedding it is the same tensor as."""
        sizes = _sizes(config)
        chosen = set(parse_layers(layers, config.n_layer, new=config.new_blocks))
        inside = [name for name in sizes if block_of(name) in chosen]
        if modules is not None:
            inside = narrow(inside, list(modules), all_names=[n for n in sizes if block_of(n) is not None])
        trained = frozenset(inside) | _outside(config, sizes, list(extra))
        if not trained:
            raise UsageError("Nothing would train: name layers, or --trainable_extra embed, head or final_norm.")
        return cls(config, sizes, trained)

    @classmethod
    def adapter(
        cls,
        config: Config,
        lora: LoRA,
        full: Iterable[str] = (),
        lora_plus_ratio: float = 1.0,
        full_lr_ratio: float = 1.0,
    ) -> "FreezePlan":
        """The adapter trains, and the weights `full` themselves.

        LoRA+ (Hayou et al., arXiv 2402.12354) trains B at `lora_plus_ratio` times the learning rate; `full`, less a
        classifier's head, train at `full_lr_ratio` times it. Raises UsageError if a layer would carry an adapter and
        train in full too."""
        full = frozenset(full)
        if both := sorted(name for name in lora.ranks if f"{name}.weight" in full):
            raise UsageError(f"{both[0]} cannot train in full and carry an adapter too. Leave it out of one of them.")
        trained = full.union(*(lora.parameters(module) for module in lora.ranks))
        # A classifier's head begins from nothing, as the adapter does
        slower = full - {"head.weight"} if config.labels else full
        scales = dict.fromkeys(slower, full_lr_ratio) | {f"{module}.{B}": lora_plus_ratio for module in lora.ranks}
        scales = {name: scale for name, scale in scales.items() if scale != 1}
        return cls(config, _sizes(config, lora), trained, lora, scales, lora_plus_ratio)

    def lr_scale(self, name: str) -> float:
        """What the learning rate is multiplied by for the parameter `name`."""
        return self.lr_scales.get(name, 1.0)

    def apply(self, model: nn.Module) -> None:
        """Sets requires_grad on every parameter of `model`."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raises RunError unless the model and the optimizer hold exactly what the plan says."""
        model_trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        by_id = {id(parameter): name for name, parameter in model.named_parameters()}
        held = [by_id.get(id(p), "a stranger") for group in optimizer.param_groups for p in group["params"]]
        for what, names in (("the model", model_trains), ("the optimizer", set(held))):
            if wrong := names ^ self.trained:
                raise RunError(f"{what} and the plan disagree on {len(wrong)} tensors, such as {min(wrong)}.")
        if len(held) != len(set(held)):
            raise RunError("The optimizer holds a tensor twice.")
        if strided := [n for n, p in model.named_parameters() if n in self.trained and not p.is_contiguous()]:
            raise RunError(f"{strided[0]} is not contiguous; fused optimizers would update the wrong elements.")

    def trained_in_block(self, i: int) -> list[str]:
        """The trained parameters of block `i`."""
        return [name for name in self.sizes if name in self.trained and block_of(name) == i]

    @property
    def layers(self) -> list[int]:
        """Blocks in which something trains."""
        return [i for i in range(self.config.n_layer) if self.trained_in_block(i)]

    @property
    def lowest(self) -> int:
        """Backward has to reach down to this block; n_layer if only what stands above the blocks trains, -1 if the
        embedding does."""
        if {"embed.weight", "pos_embed.weight"} & self.trained:
            return -1
        return min(self.layers, default=self.config.n_layer)

    @property
    def n_layer(self) -> int:
        return self.config.n_layer

    @property
    def n_trained(self) -> int:
        return sum(self.sizes[name] for name in self.trained)

    @property
    def n_parameters(self) -> int:
        return sum(self.sizes.values())


def block_of(name: str) -> Optional[int]:
    """The block that a parameter belongs to, None outside of the blocks."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def part_of(name: str) -> Part:
    """The block that a parameter belongs to, or which of `EXTRAS`."""
    block = block_of(name)
    return name.partition(".")[0].removeprefix("pos_") if block is None else block


def _sizes(config: Config, lora: Optional[LoRA] = None) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model_parameters(config, lora).items()}


def _outside(config: Config, sizes: Mapping[str, int], words: list[str]) -> frozenset[str]:
    for word in words:
        if word not in EXTRAS:
            raise UsageError(
                f"--trainable_extra {word!r} is unknown.{did_you_mean(word, EXTRAS)} Choose from {', '.join(EXTRAS)}."
            )
    if "head" in words and "embed" not in words and config.tie_embeddings:
        raise UsageError(
            "The head is tied to the embedding: they are one tensor, so the head cannot train alone. "
            "Say --trainable_extra embed,head to train it as both, or --untie_embeddings to give the head its own."
        )
    begins = tuple(f"{word}." for word in words) + (("pos_embed.",) if "embed" in words else ())
    return frozenset(name for name in sizes if name.startswith(begins)) if begins else frozenset()
