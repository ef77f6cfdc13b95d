"""LoRA (Hu et al., arXiv 2106.09685) on chosen linear layers: what it adds, where it starts, what folding it in gives.

    y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ          W is frozen, A (r, in) and B (out, r) train

rsLoRA (arXiv 2312.03732) scales by alpha / √r in place of alpha / r. DoRA (arXiv 2402.09353) also learns the length of
every row of W + scale · B A. Names and formulas are PEFT's, so that an adapter means the same there."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litfreeze.config import Config
from litfreeze.model import CAST, GPT, linear, meta_parameters

TINY = torch.finfo(torch.float32).tiny
MOST_RANK = 2**20  # far above any adapter's, and what memory could be asked for
A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"


@dataclass(frozen=True)
class LoRA:
    """Which linear layers of a model carry an adapter, and how it is scaled. Modules are named as in `GPT`."""

    ranks: Mapping[str, int]  # "blocks.0.attn.q_proj" -> r
    alphas: Mapping[str, float]
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def scale(self, module: str) -> float:
        """What B A is multiplied by."""
        r = self.ranks[module]
        return self.alphas[module] / (math.sqrt(r) if self.rslora else r)

    def parameters(self, module: str) -> list[str]:
        """The names of what trains at `module`."""
        return [f"{module}.{kind}" for kind in ((A, B, MAGNITUDE) if self.dora else (A, B))]

    def describe(self) -> str:
        """'LoRA r 8, alpha 16', for one line to a person."""
        kind = ("DoRA" if self.dora else "LoRA") + (" (rank-stabilised)" if self.rslora else "")
        ranks, alphas = (sorted(set(values.values())) for values in (self.ranks, self.alphas))
        return f"{kind} r {', '.join(map(str, ranks))}, alpha {', '.join(f'{alpha:g}' for alpha in alphas)}"

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint's manifest."""
        targets = {name: {"r": r, "alpha": self.alphas[name]} for name, r in self.ranks.items()}
        return {"dropout": self.dropout, "rslora": self.rslora, "dora": self.dora, "targets": targets}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "LoRA":
        """The inverse of `to_dict`. Raises AttributeError, KeyError, TypeError or ValueError for anything else."""
        targets, dropout = saved["targets"], saved["dropout"]
        ranks, alphas = ({name: target[key] for name, target in targets.items()} for key in ("r", "alpha"))
        if not ranks or not all(type(r) is int and 1 <= r <= MOST_RANK for r in ranks.values()):
            raise ValueError("an adapter needs targets, each of rank 1 or more")
        if not all(0 < alpha <= sys.float_info.max for alpha in alphas.values()) or not 0 <= dropout <= 1:
            raise ValueError("an alpha is a number above 0, and dropout one from 0 to 1")
        if not all(isinstance(saved[flag], bool) for flag in ("rslora", "dora")):
            raise ValueError("rslora and dora are true or false")
        alphas = {name: float(alpha) for name, alpha in alphas.items()}
        return cls(ranks, alphas, float(dropout), saved["rslora"], saved["dora"])

    def resized(self, r: int) -> "LoRA":
        """The same adapter with rank `r` throughout; alpha grows along, so that the scale stays what it was."""
        alphas = {name: self.scale(name) * (math.sqrt(r) if self.rslora else r) for name in self.ranks}
        return replace(self, ranks=dict.fromkeys(self.ranks, r), alphas=alphas)


class LoRALinear(nn.Module):
    """A linear layer with its adapter beside it. `weight` and `bias` keep their names, so the base stays the base."""

    def __init__(self, linear: nn.Linear, r: int, scale: float, dropout: float, dora: bool) -> None:
        super().__init__()
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, r, device=device))
        self.lora_magnitude = nn.Parameter(torch.empty(linear.out_features, device=device)) if dora else None
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        drops = self.training and self.dropout > 0 and self.lora_A.requires_grad  # a frozen adapter is as in use
        dropped = F.dropout(x, self.dropout) if drops else x
        if self.lora_magnitude is None:
            return self.updated(linear(x, self.weight, self.bias), dropped)
        y = linear(x, self.weight)  # (..., out)
        stretch = (self.lora_magnitude / self.row_lengths()).to(y.dtype)  # (out,)
        if drops:  # as PEFT: what is stretched has seen the dropout, what passes through has not
            seen = linear(dropped, self.weight)
            y = y - seen + stretch * self.updated(seen.clone(), dropped)
        else:
            y = stretch * self.updated(y, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def updated(self, y: Tensor, x: Tensor) -> Tensor:
        """y + scale · x Aᵀ Bᵀ, in the memory of `y` (..., out)."""
        x, a, b = (t.to(y.dtype) for t in (x, self.lora_A, self.lora_B))
        return _Updated.apply(y, x, a, b, self.scale)

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """‖W + scale · B A‖ of every row, (out,) fp32, without building that matrix. DoRA takes it for a constant in
        the backward pass (section 4.3)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            a, b = self.lora_A.float(), self.lora_B.float()
            along = (linear(a, self.weight).T * b).sum(1)  # W · B A, row by row: (out,)
            own = (b @ (a @ a.T) * b).sum(1)
            rows = (part.to(torch.float32) for part in self.weight.split(CAST))
            length = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in rows])
            return (length.square() + 2 * self.scale * along + self.scale**2 * own).clamp(min=TINY).sqrt()


class _Updated(torch.autograd.Function):
    """y + scale · x Aᵀ Bᵀ in the memory of y. Autograd's own formulas cost as much as a tenth of a step: a CPU is three
    times as fast at Hᵀ G, few rows of many columns, as at Gᵀ H."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = scale * (x.reshape(-1, x.shape[-1]) @ a.T)  # (N, r)
        y.view(-1, y.shape[-1]).addmm_(low, b.T)
        ctx.save_for_backward(x, a, b, low)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], None]:
        x, a, b, low = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, _ = ctx.needs_input_grad
        grads = grad.reshape(-1, grad.shape[-1])  # (N, out)
        below = ctx.scale * F.linear(grads, b.T.contiguous()) if wants_x or wants_a else None  # (N, r)
        return (
            grad,
            (below @ a).view_as(x) if wants_x else None,
            below.T @ x.reshape(-1, x.shape[-1]) if wants_a else None,
            (low.T @ grads).T if wants_b else None,
            None,
        )


def add_lora(model: GPT, lora: LoRA) -> None:
    """Puts the adapter's layers into `model`, which is on the meta device or gets their values afterwards."""
    for name, r in lora.ranks.items():
        parent, _, attribute = name.rpartition(".")
        linear = LoRALinear(model.get_submodule(name), r, lora.scale(name), lora.dropout, lora.dora)
        setattr(model.get_submodule(parent), attribute, linear)


def model_parameters(config: Config, lora: Optional[LoRA] = None) -> dict[str, Tensor]:
    """Every parameter of the model with its adapter, by name, in order and without storage."""
    if lora is None:
        return meta_parameters(config)
    with torch.device("meta"):
        model = GPT(config)
        add_lora(model, lora)
        return dict(model.named_parameters())


def linear_layers(config: Config) -> dict[str, tuple[int, int]]:
    """The modules that can carry an adapter, every linear layer of the blocks and the head, and their (out, in)."""
    with torch.device("meta"):
        modules = GPT(config).named_modules()
        return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, nn.Linear)}


def is_lora(name: str) -> bool:
    """Whether the parameter `name` belongs to an adapter and not to the model."""
    return name.rpartition(".")[2] in (A, B, MAGNITUDE)


def fresh_tensors(
    lora: LoRA, layers: Mapping[str, tuple[int, int]], weight: Callable[[str], Tensor], seed: int
) -> dict[str, Tensor]:
    """An adapter that changes nothing yet, fp32: A drawn as PEFT draws it (uniform within 1/√in), B zero, and DoRA's
    magnitudes the row lengths of the weight.

    `layers` gives the (out, in) of each module, `weight(module)` the weight under it, which only DoRA reads."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, r in lora.ranks.items():
        out, into = layers[name]
        bound = 1 / math.sqrt(into)
        tensors[f"{name}.{A}"] = torch.empty(r, into).uniform_(-bound, bound, generator=generator)
        tensors[f"{name}.{B}"] = torch.zeros(out, r)
        if lora.dora:
            tensors[f"{name}.{MAGNITUDE}"] = torch.linalg.vector_norm(weight(name), dim=1, dtype=torch.float32)
    return tensors


def grown_tensors(old: LoRA, new: LoRA, read: Callable[[str], Tensor], seed: int) -> dict[str, Tensor]:
    """The tensors of `old` in the larger ranks of `new`: the same function, since the new rows of A meet zeros in B."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, r in new.ranks.items():
        a, b = read(f"{name}.{A}").float(), read(f"{name}.{B}").float()
        bound, more = 1 / math.sqrt(a.shape[1]), r - old.ranks[name]
        drawn = torch.empty(more, a.shape[1]).uniform_(-bound, bound, generator=generator)
        tensors[f"{name}.{A}"] = torch.cat([a, drawn])
        tensors[f"{name}.{B}"] = torch.cat([b, torch.zeros(b.shape[0], more)], dim=1)
        if old.dora:
            tensors[f"{name}.{MAGNITUDE}"] = read(f"{name}.{MAGNITUDE}").float()
    return tensors


def folded(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Optional[Tensor] = None) -> Tensor:
    """The weight that does alone what `weight` (n, in), some rows of a layer, does with its adapter: fp32.

    `a` is (r, in), `b` (n, r) and `magnitude` (n,) of the same rows."""
    whole = weight.float() + scale * (b.float() @ a.float())  # (n, in)
    if magnitude is None:
        return whole
    lengths = torch.linalg.vector_norm(whole, dim=1).clamp(min=TINY)  # a row of zeros stays one
    return whole * (magnitude.float() / lengths)[:, None]
