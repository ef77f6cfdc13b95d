"""FreezePlan: for every parameter of a model, does it train?

The only place that decides `requires_grad`. The optimizer, the writer, the report and the printed table all ask it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Optional, Union

import torch
from torch import nn

from litfreeze.config import Config
from litfreeze.errors import RunError, UsageError, did_you_mean
from litfreeze.freeze.layers import Spec, format_layers, parse_layers
from litfreeze.lora import B, LoRA, is_lora, linear_layers, model_parameters

Part = Union[int, str]  # a block's id, or one of
EXTRAS = ("embed", "head", "final_norm")
NORMS = ("norm_1", "post_norm_1", "norm_2", "post_norm_2", "q_norm", "k_norm")


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

    def table(self, lr: Optional[float] = None) -> str:
        """What trains and what is frozen, bottom to top; neighbours that are alike share a row. If not all learns at
        one rate, the rates stand there too, those of parameters at `lr` times their scale."""
        rows: list[tuple[str, str, int, int]] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                names = [n for n in self.sizes if block_of(n) in run]
                label = f"block {run[0]}" if len(run) == 1 else f"blocks {run[0]}-{run[-1]}"
                rows.append(self._row(label, names, lr))
                run.clear()

        embed = "embed (also the head)" if self.config.tie_embeddings else "embed"
        rows.append(self._row(embed, self._part("embed"), lr))
        for i in range(self.config.n_layer):
            if run and self._state(i) != self._state(run[-1]):
                flush()
            run.append(i)
        flush()
        rows.append(self._row("final_norm", self._part("final_norm"), lr))
        if self._part("head"):
            rows.append(self._row("head", self._part("head"), lr))
        rows.append(("total", "", self.n_trained, self.n_parameters))
        return _format_rows(rows)

    def summary(self) -> str:
        """One line: what trains, and its share."""
        full = [name for name in self.trained if not is_lora(name)]
        layers = sorted({block_of(name) for name in full} - {None})
        blocks = [_blocks(layers)] if layers else []
        outside = [e for e in EXTRAS if any(n in full for n in self._part(e))]
        partly = any(n not in self.trained for n in self.sizes if block_of(n) in layers and not is_lora(n))
        what = " + ".join(blocks + outside) + (" (in part)" if partly else "")
        if self.lora is not None:
            adapted = sorted({block_of(module) for module in self.lora.ranks} - {None})
            where = ([_blocks(adapted)] if adapted else []) + (["head"] if "head" in self.lora.ranks else [])
            what = f"{self.lora.describe()} on {' + '.join(where)}" + (f", and in full {what}" if full else "")
        share = 100 * self.n_trained / self.n_parameters
        return f"{what}: {self.n_trained:,} of {self.n_parameters:,} parameters train ({share:.2f} %)"

    def _part(self, part: str) -> list[str]:
        begins = ("embed.", "pos_embed.") if part == "embed" else (f"{part}.",)
        return [name for name in self.sizes if name.startswith(begins)]

    def _state(self, i: int) -> frozenset[tuple[str, float]]:
        return frozenset((_inner(name), self.lr_scale(name)) for name in self.trained_in_block(i))

    def _row(self, label: str, names: list[str], lr: Optional[float]) -> tuple[str, str, int, int]:
        trained = [name for name in names if name in self.trained]
        full = [name for name in trained if not is_lora(name)]
        states = []
        if full:
            partly = len(full) < sum(not is_lora(name) for name in names)
            part = sorted({_inner(name).removesuffix(".weight") for name in full}) if partly else []
            states.append(" ".join(["trains", *([_few(part)] if part else [])]))
        if len(trained) > len(full):
            adapted = dict.fromkeys(name.rpartition(".")[0] for name in trained if is_lora(name))
            linear = [module for module in linear_layers(self.config) if any(n.startswith(f"{module}.") for n in names)]
            each = list(dict.fromkeys(module.rpartition(".")[2] for module in adapted))
            states.append("LoRA on " + ("every linear layer" if len(adapted) == len(linear) > 1 else _few(each)))
        if trained and lr is not None and self.lr_scales:
            scales = sorted({self.lr_scale(name) for name in trained})
            states.append("lr " + _few([f"{lr * scale:.3g}" for scale in scales]))
        state = "; ".join(states) or "frozen"
        return label, state, sum(self.sizes[n] for n in trained), sum(self.sizes[n] for n in names)


def block_of(name: str) -> Optional[int]:
    """The block that a parameter belongs to, None outside of the blocks."""
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def part_of(name: str) -> Part:
    """The block that a parameter belongs to, or which of `EXTRAS`."""
    block = block_of(name)
    return name.partition(".")[0].removeprefix("pos_") if block is None else block


def _inner(name: str) -> str:
    """'blocks.10.attn.q_proj.weight' is 'attn.q_proj.weight' inside its block."""
    return name.split(".", 2)[2]


def _few(words: list[str]) -> str:
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _blocks(layers: list[int]) -> str:
    return f"block{'s' * (len(layers) > 1)} {format_layers(layers)}"


def _sizes(config: Config, lora: Optional[LoRA] = None) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model_parameters(config, lora).items()}


def narrow(inside: list[str], words: list[str], all_names: list[str], option: str = "trainable_modules") -> list[str]:
    """Those of the parameters `inside` that one of `words` names; every word must name something."""
    if not words or "" in words:
        raise UsageError(f"--{option} has an empty part. Modules: {_known(all_names)}.")
    kept: set[str] = set()
    for word in words:
        matched = {name for name in inside if _matches(word, name)}
        if not matched:
            where = (
                "in the chosen blocks" if any(_matches(word, name) for name in all_names) else "in this model's blocks"
            )
            known = _known(all_names)
            raise UsageError(
                f"--{option} {word!r} matches nothing {where}.{did_you_mean(word, known.split(', '))} "
                f"Modules: {known}; or a glob such as '*.q_proj.*', or re:… on full names."
            )
        kept |= matched
    return [name for name in inside if name in kept]


def _matches(word: str, name: str) -> bool:
    if word.startswith("re:"):
        try:
            return re.fullmatch(word[3:], name) is not None
        except re.error as error:
            raise UsageError(f"{word!r} is no regular expression: {error}.") from None
    if any(sign in word for sign in "*?["):
        return fnmatchcase(name, word) or fnmatchcase(name.rpartition(".")[0], word)
    components, parts = _inner(name).split("."), word.split(".")
    if parts[0].isdigit():
        return False  # an expert, and no word of its own: experts.3
    named = any(components[at : at + len(parts)] == parts for at in range(len(components)))
    return named or (word == "norm" and any(c in NORMS for c in components))


def _known(names: list[str]) -> str:
    """The words that name a module here."""
    every = [_inner(name).split(".") for name in names]
    components = dict.fromkeys(c for inner in every for c in inner if c not in ("weight", "bias") and not c.isdigit())
    experts = {int(inner[2]) for inner in every if inner[1:2] == ["experts"]}
    several = [f"experts.0 to experts.{max(experts)}"] if experts else []
    norm = ["norm"] if any(component in NORMS for component in components) else []
    bias = ["bias"] if norm and any(name.endswith(".bias") for name in names) else []
    return ", ".join([*norm, *components, *several, *bias])


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


def _format_rows(rows: list[tuple[str, str, int, int]]) -> str:
    total = rows[-1][3]
    cells = [("", "", "trained", "parameters", "share of the model")]
    for label, state, trained, size in rows:
        cells.append((label, state, f"{trained:,}" if trained else "-", f"{size:,}", f"{100 * trained / total:.2f} %"))
    widths = [max(len(row[c]) for row in cells) for c in range(5)]
    lines = [
        "  ".join(
            cell.ljust(w) if c < 2 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
