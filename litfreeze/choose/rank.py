"""Which blocks to train first: a score for each of them, in one of four ways.

    spectrum   weights alone: how far singular values stand out of noise (Spectrum)
    gradient   data: the loss's gradient, relative to the weights
    angular    data: how far a block turns the residual stream (ShortGPT's block influence)
    random     neither: what the others have to beat

None of them trains anything. They say where something is, not that training there helps."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import torch
import torch.nn.functional as F
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from tqdm import tqdm

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.load import load_model
from litfreeze.choose.words import METHODS, NEED_DATA, check_method
from litfreeze.data.batches import Batch
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.plan import block_of
from litfreeze.lora import linear_layers
from litfreeze.model import GPT
from litfreeze.precision import default_precision
from litfreeze.train.loss import NextToken

MEANINGS = {
    "spectrum": "Which share of the other blocks a block's modules beat in the signal-to-noise ratio of their weights, "
    "each among its kind (0.5 is average). It comes from the weights alone: it has not seen your data, and does not "
    "say that training helps.",
    "gradient": "The norm of the loss's gradient on your data, relative to the norm of the block's weights, before any "
    "training. It says where a first step would pull hardest, not where many steps lead.",
    "angular": "1 - the mean cosine between what enters and what leaves a block, on your data. It says how much a "
    "block does to the residual stream, not how much it has to learn.",
    "random": "Drawn by chance, from the seed alone. It is what a method has to beat.",
}
SLICE = 1024  # rows of a weight that are in double precision at a time
ROUNDING = 1e-6  # of fp32 weights, relative to the largest singular value
IQR_OF_NORMAL = 1.349  # interquartile range of a normal distribution, in its standard deviations


@dataclass(frozen=True)
class Ranking:
    """Scores of the blocks; the higher, the sooner to train.

    Attributes:
        settings: What they were made with.
        scores: One for each block.
        modules: What they were made of, if of modules: 'attn.q_proj' -> one value for each block. Of spectrum the
            module's signal-to-noise ratio, of gradient ‖g‖ / ‖W‖ of the module (None where W is zero).
    """

    method: str
    settings: Mapping[str, Any]
    scores: list[float]
    modules: Mapping[str, list[Optional[float]]] = field(default_factory=dict)

    @property
    def order(self) -> list[int]:
        """All blocks, best first; of equals the lower one."""
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))

    def best(self, count: int) -> list[int]:
        """The `count` best blocks, best first."""
        return self.order[:count]

    def told(self, count: int) -> str:
        """One line: the `count` best, with their scores."""
        best = self.best(count)
        scores = ", ".join(f"{self.scores[i]:.4g}" for i in best)
        return f"Ranked by {self.how()}: {', '.join(map(str, best))} (scores {scores})."

    def how(self) -> str:
        """'gradient on 64 records': the method, and what it looked at."""
        records = self.settings.get("records")
        return self.method + (f" on {records:,} record{'s' * (records != 1)}" if records is not None else "")

    def table(self) -> str:
        """Block by block, best first."""
        most = max(self.scores) or 1.0
        rows = [f"{'rank':>4}  {'block':>5}  {'score':>10}"]
        for place, i in enumerate(self.order, 1):
            bar = "█" * round(24 * self.scores[i] / most)
            rows.append(f"{place:>4}  {i:>5}  {self.scores[i]:>10.4g}  {bar}".rstrip())
        return "\n".join(rows)

    def to_json(self, **more: Any) -> str:
        """Everything, and `more`, as JSON text."""
        return json.dumps({**more, **asdict(self), "order": self.order}, indent=2, ensure_ascii=False) + "\n"


def rank(
    checkpoint: Checkpoint, method: str, seed: int, device: torch.device, batches: Optional[Sequence[Batch]] = None
) -> Ranking:
    """The blocks of `checkpoint` by `method`; those of `NEED_DATA` look at `batches`. The same input gives the same
    ranking, on a GPU as far as its kernels do.

    Raises UsageError for an unknown method, an adapter, data that is missing, and weights that are not finite."""
    check_method(method, "--method")
    if checkpoint.lora is not None:
        raise UsageError(
            f"{checkpoint.path} is an adapter: {checkpoint.lora.describe()}. A ranking is of whole blocks. Merge it "
            f"first (litfreeze merge_lora), or rank its base, {checkpoint.base.path}."
        )
    if method in NEED_DATA and not batches:
        without = " and ".join(one for one in METHODS if one not in NEED_DATA)
        raise UsageError(
            f"{method} ranks blocks by what they do on data, and there is none: litfreeze rank and litfreeze finetune "
            f"take --data. {without} need none."
        )
    if method == "spectrum":
        return spectrum(checkpoint, device)
    if method == "random":
        draw = random.Random(seed)
        return Ranking(method, {"seed": seed}, [draw.random() for _ in range(checkpoint.config.n_layer)])
    scores, modules = (gradient if method == "gradient" else angular)(checkpoint, batches, device)
    if not all(map(math.isfinite, scores)):
        raise RunError(f"{checkpoint.path}: {method} is not finite in some block. The weights or the data are broken.")
    seen = {
        "records": sum(len(batch.indices) for batch in batches),
        "tokens": sum(len(_read_rows(batch)) for batch in batches),
        "micro_batches": len(batches),
        "seed": seed,
    }
    return Ranking(method, seen, scores, modules)


# --- spectrum -------------------------------------------------------------------------------------------------------


def spectrum(checkpoint: Checkpoint, device: torch.device) -> Ranking:
    """Spectrum (Hartford et al., arXiv 2406.06623) on the linear layers of the blocks, a weight in memory at a time.

    Spectrum ranks modules of one kind against each other by `signal_to_noise`, and nothing but their order counts: one
    ratio may be twenty times the others. A block's score is the mean over its modules of the share of the other blocks
    whose module of that kind has a lower ratio, an equal one counting half."""
    n_layer = checkpoint.config.n_layer
    modules: dict[str, list[Optional[float]]] = {}  # None for a block that has no such module: experts, or one MLP
    names = [name for name in linear_layers(checkpoint.config) if block_of(name) is not None]
    for name in _progress(names, "weight"):
        weight = checkpoint.read(f"{name}.weight")
        values = singular_values(weight, device)
        if not values.isfinite().all():
            raise UsageError(f"{checkpoint.path}: {name}.weight holds values that are NaN or infinite.")
        modules.setdefault(name.split(".", 2)[2], [None] * n_layer)[block_of(name)] = signal_to_noise(
            values, weight.shape
        )
    beaten = [[_beaten(ratios, i) for ratios in modules.values() if ratios[i] is not None] for i in range(n_layer)]
    return Ranking("spectrum", {}, [sum(shares) / len(shares) for shares in beaten], modules)


def _beaten(ratios: Sequence[Optional[float]], i: int) -> float:
    """The share of the other `ratios` that are lower than the one at `i`, equal ones counting half."""
    there = [ratio for ratio in ratios if ratio is not None]
    lower = sum((ratio < ratios[i]) + 0.5 * (ratio == ratios[i]) for ratio in there) - 0.5  # itself
    return lower / max(1, len(there) - 1)


def singular_values(weight: Tensor, device: torch.device) -> Tensor:
    """Of `weight` (out, in), falling, fp64 on the CPU; NaN if the weight is not finite.

    They are the roots of the eigenvalues of the smaller of W Wᵀ and Wᵀ W, summed in double precision a slice at a time:
    faster than a decomposition of W in single precision and, with an error of 1e-8 of the largest, more exact."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    # Apple's GPUs have no double precision
    place = device if device.type == "cuda" else torch.device("cpu")
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=place)
    for part in tall.split(SLICE):
        part = part.to(place, torch.float64)
        gram.addmm_(part.T, part)
    if not gram.isfinite().all():
        return torch.full((len(gram),), math.nan, dtype=torch.float64)
    return torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_().flip(0).cpu()


def signal_to_noise(values: Tensor, shape: Sequence[int]) -> float:
    """Spectrum's ratio of a matrix of this `shape` with these singular `values`:

        s = IQR(S) / 1.349    β = smaller side / larger side    ε = s (1 + √β)    Σ S[S > ε] / Σ S[S ≤ ε] / max S

    ε stands for where the Marchenko-Pastur law ends; its authors' code has s √((1 + √β)²). Where nothing is at most ε
    the noise counts as 1, as there. 0 for a matrix of zeros; noise is no less than what rounding leaves.

    It orders weights of one kind, and is no test for signal: s comes from the spread of the singular values and not
    from their size, so that a part of pure noise lies above ε, and one strong direction makes max S larger and the
    ratio smaller."""
    largest = values[0].item()
    if largest == 0:
        return 0.0
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype)).tolist()
    edge = (high - low) / IQR_OF_NORMAL * (1 + math.sqrt(min(shape) / max(shape)))
    below = values[values <= edge]
    noise = max(below.sum().item(), largest * ROUNDING) if len(below) else 1.0
    return values[values > edge].sum().item() / noise / largest


# --- gradient and angular -------------------------------------------------------------------------------------------


def gradient(
    checkpoint: Checkpoint, batches: Sequence[Batch], device: torch.device
) -> tuple[list[float], dict[str, list[Optional[float]]]]:
    """Mean over micro-batches of ‖g‖ / ‖W‖, g being the gradient of the micro-batch's loss per target with respect to
    all weights W of a block: the relative gradient norm of Lee et al. (arXiv 2210.11466), who tune by it.

    A gradient goes as soon as its norm is taken, and activations are made again in backward: beside the weights, which
    stay as they are stored (fp16's in fp32, in which small gradients have a place), it takes what one block does."""
    gpt = _load(checkpoint, device)
    squares: dict[str, Tensor] = {}
    parts: dict[tuple[int, str], list[str]] = defaultdict(list)  # (block, module) -> parameters
    for name, parameter in gpt.named_parameters():
        if (i := block_of(name)) is not None:
            parameter.requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(_taking(squares, name))
            parts[i, name.split(".", 2)[2].rpartition(".")[0]].append(name)
    model = NextToken(gpt, recompute=True)
    blocks, kinds = range(checkpoint.config.n_layer), list(dict.fromkeys(kind for _, kind in parts))
    weights = _norms({name: _square(p.detach()) for name, p in gpt.named_parameters() if p.requires_grad}, parts)
    sums: dict[tuple[int, str], float] = defaultdict(float)
    for batch in _progress(batches, "micro-batch"):
        batch = move_data_to_device(batch, device)
        with _autocast(device):
            scored = model(batch)
        (scored.loss / scored.targets).backward()
        for part, norm in _norms(squares, parts).items():
            sums[part] += norm
        squares.clear()

    def relative(i: int, kind: str) -> Optional[float]:
        length = weights.get((i, kind))  # of no module, where a block has one MLP and others have experts
        return sums[i, kind] / len(batches) / length if length else None

    return [relative(i, "") or 0.0 for i in blocks], {kind: [relative(i, kind) for i in blocks] for kind in kinds}


def _taking(squares: dict[str, Tensor], name: str) -> Callable[[nn.Parameter], None]:
    def take(parameter: nn.Parameter) -> None:
        squares[name] = _square(parameter.grad)
        parameter.grad = None

    return take


def _square(tensor: Tensor) -> Tensor:
    """‖tensor‖², fp32, where it is."""
    return tensor.float().norm().square()


def _norms(squares: Mapping[str, Tensor], parts: Mapping[tuple[int, str], list[str]]) -> dict[tuple[int, str], float]:
    """From squares of norms of parameters to norms of `parts`, and of whole blocks as their part ''."""
    known = dict(zip(squares, torch.stack(list(squares.values())).double().tolist(), strict=True))
    sums: dict[tuple[int, str], float] = defaultdict(float)
    for (i, kind), names in parts.items():
        for name in names:
            sums[i, kind] += known[name]
            sums[i, ""] += known[name]
    return {part: math.sqrt(total) for part, total in sums.items()}


@torch.no_grad()
def angular(
    checkpoint: Checkpoint, batches: Sequence[Batch], device: torch.device
) -> tuple[list[float], dict[str, list[Optional[float]]]]:
    """Block influence (ShortGPT, Men et al., arXiv 2403.03853): 1 - the cosine between the residual stream below and
    above a block, mean over all tokens that the model reads, prompts included."""
    gpt = _load(checkpoint, device)
    cosines = torch.zeros(checkpoint.config.n_layer, dtype=torch.float64)
    tokens = 0
    for batch in _progress(batches, "micro-batch"):
        rows = _read_rows(batch).to(device)
        batch = move_data_to_device(batch, device)
        with _autocast(device):
            x = gpt.embed_tokens(batch.tokens, batch.positions)  # (N, C) or (B, T, C)
            for i in range(len(cosines)):
                above = gpt.run_blocks(x, batch.positions, batch.attention, i, i + 1)
                cosine = F.cosine_similarity(x.float(), above.float(), dim=-1).flatten()  # (N,)
                cosines[i] += cosine[rows].sum().cpu()
                x = above
        tokens += len(rows)
    return (1 - cosines / tokens).tolist(), {}


def _read_rows(batch: Batch) -> Tensor:
    """The rows of `batch` that hold tokens of a record, and no pads."""
    return torch.cat([torch.arange(row, row + stop - start) for row, _, start, stop in batch.places])


def _load(checkpoint: Checkpoint, device: torch.device) -> GPT:
    def kept(name: str) -> torch.dtype:
        stored = checkpoint.dtype(name)
        return stored if stored == torch.bfloat16 else torch.float32

    return load_model(checkpoint, kept, torch.float32).to(device)


def _autocast(device: torch.device) -> AbstractContextManager:
    """bf16 on a GPU that has it, else fp32."""
    lower = device.type == "cuda" and default_precision("cuda") == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, enabled=lower)


def _progress(items: Sequence[Any], unit: str) -> Any:
    """A bar while they are gone through, where a person is looking."""
    return tqdm(items, desc="Ranking", unit=unit, leave=False, disable=None)
