"""A deeper checkpoint that computes the same: block expansion (LLaMA-Pro, Wu et al., arXiv 2401.02415).

A new block is a copy of the block below it whose two projections into the residual stream are zero, so that it adds
nothing until it trains."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litfreeze.checkpoint.directory import Checkpoint
from litfreeze.checkpoint.write import write_checkpoint
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.model import meta_parameters

WRITES = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")  # into the residual stream


class ExpandedTensors(Mapping[str, Tensor]):
    """Every tensor of the deeper model, made when it is read. `sources[j]` is the block that block j was, or copies."""

    def __init__(self, shallow: Checkpoint, config: Config, sources: Sequence[int]) -> None:
        self.shallow, self.sources = shallow, sources
        self.new = frozenset(config.new_blocks)
        self.shapes = {name: tuple(p.shape) for name, p in meta_parameters(config).items()}

    def __getitem__(self, name: str) -> Tensor:
        if block_of(name) in self.new and name.endswith(WRITES):
            return torch.zeros(self.shapes[name], dtype=self.dtype(name))
        return self.shallow.read(self.source(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.shallow.dtype(self.source(name))

    def source(self, name: str) -> str:
        """The tensor of the shallower model that `name` is, or comes from."""
        i = block_of(name)
        return name if i is None else name.replace(f"blocks.{i}.", f"blocks.{self.sources[i]}.", 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def expand(checkpoint: Checkpoint, after: Sequence[int]) -> Checkpoint:
    """`checkpoint`, a whole one or one over its base, with a new block behind each of the blocks `after`."""
    sources, new = [], []
    for i in range(checkpoint.config.n_layer):
        sources.append(i)
        if i in after:
            new.append(len(sources))
            sources.append(i)
    hf_config = _deeper(checkpoint.hf_config, sources, new)
    config = Config.from_hf(hf_config, "the expanded config.json")
    assert config.windows == tuple(checkpoint.config.windows[i] for i in sources)
    tensors = ExpandedTensors(checkpoint, config, sources)
    dtypes = {name: tensors.dtype(name) for name in tensors}
    made = {"tensors": tensors, "dtypes": dtypes, "base": None, "aliases": {}}
    return replace(checkpoint, hf_config=hf_config, config=config, **made, manifest=checkpoint.without_hashes())


def _deeper(hf: Mapping[str, Any], sources: Sequence[int], new: list[int]) -> dict[str, Any]:
    """The config.json of the expanded model: every field that goes by the depth follows."""
    depth = "n_layer" if "n_layer" in hf else "num_hidden_layers"
    deeper = {**hf, depth: len(sources), "new_blocks": new}
    if hf.get("layer_types"):
        deeper["layer_types"] = [hf["layer_types"][i] for i in sources]
    if hf.get("use_sliding_window"):  # in the blocks from max_window_layers up
        first = hf.get("max_window_layers", 28)
        deeper["max_window_layers"] = first + sum(sources[j] < first for j in new)
    return deeper


def check_new_blocks(checkpoint: Checkpoint, plan: FreezePlan) -> None:
    """Raises UsageError if something trains in a new block that can never learn: nothing passes through its projections
    into the residual stream, which are zero, and neither of them trains so that it would not stay so."""
    for i in checkpoint.config.new_blocks:
        trains = {name.removeprefix(f"blocks.{i}.") for name in plan.trained_in_block(i)}
        writes = {name.rpartition(".")[0] for name in trains if "o_proj." in name or "down_proj." in name}
        if not trains:
            continue
        zero = [name for name in ("attn.o_proj", "mlp.down_proj") if not _any(checkpoint, f"blocks.{i}.{name}.weight")]
        dora = plan.lora.ranks if plan.lora is not None and plan.lora.dora else ()
        if stretched := [name for name in zero if f"blocks.{i}.{name}" in dora]:
            raise UsageError(
                f"--use_dora: blocks.{i}.{stretched[0]} is zero, as new blocks begin, and DoRA stretches what is "
                "there. Leave --use_dora out, or train the new blocks in full first."
            )
        if len(zero) == 2 and not writes:
            raise UsageError(
                f"The new block {i} would never learn: its o_proj and down_proj begin at zero and do not train. Train "
                "one of them too, or leave the block out of --trainable_layers."
            )


def _any(checkpoint: Checkpoint, name: str) -> bool:
    return bool(checkpoint.read(name).any())


def write_expanded(out_dir: Path, expanded: Checkpoint) -> None:
    """Writes what `expand` gave, a tensor at a time."""
    shallow = expanded.tensors.shallow
    manifest = {
        "kind": "expanded",
        "expanded": {"path": str(shallow.path.resolve()), "weights_hash": shallow.weights_hash},
        "prompt": expanded.prompt,
        "history": expanded.history,
    }
    write_checkpoint(out_dir, expanded.hf_config, expanded.layout(), expanded.read, manifest, expanded.tokenizer_dir)
