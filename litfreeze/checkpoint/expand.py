"""A deeper checkpoint that computes the same: block expansion (LLaMA-Pro, Wu et al., arXiv 2401.02415).

A new block is a copy of the block below it that adds nothing until it trains: its projections into the residual stream
are zero or, where norms follow them, these scale by zero."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.write import write_checkpoint
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.lora import is_lora
from litfreeze.model import meta_parameters

WRITES = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")  # into the residual stream
POST_NORMS = ("post_norm_1.weight", "post_norm_2.weight")  # where they stand between


class ExpandedTensors(Mapping[str, Tensor]):
    """Every tensor of the deeper model, made when it is read. `sources[j]` is the block that block j was, or copies."""

    def __init__(self, shallow: Checkpoint, config: Config, sources: Sequence[int]) -> None:
        self.shallow, self.sources = shallow, sources
        self.new = frozenset(config.new_blocks)
        self.shapes = {name: tuple(p.shape) for name, p in meta_parameters(config).items()}
        self.silent = POST_NORMS if config.post_norm else WRITES
        self.zero = -1.0 if config.post_norm and config.norm == "rmsnorm_plus_one" else 0.0

    def __getitem__(self, name: str) -> Tensor:
        if block_of(name) in self.new and name.endswith(self.silent):
            return torch.full(self.shapes[name], self.zero, dtype=self.dtype(name))
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
    shallow = checkpoint.config
    hf_config = _deeper(checkpoint.hf_config, shallow, sources, new)
    config = Config.from_hf(hf_config, "the expanded config.json")
    windows = tuple(shallow.windows[i] for i in sources)
    if config.windows != windows:  # every so many blocks have one, counted from 0
        hf_config["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
        config = Config.from_hf(hf_config, "the expanded config.json")
    assert config.windows == windows
    assert config.dense_blocks == tuple(j for j, i in enumerate(sources) if i in shallow.dense_blocks)
    tensors = ExpandedTensors(checkpoint, config, sources)
    dtypes = {name: tensors.dtype(name) for name in tensors}
    made = {"tensors": tensors, "dtypes": dtypes, "base": None, "aliases": {}}
    return replace(checkpoint, hf_config=hf_config, config=config, **made, manifest=checkpoint.without_hashes())


def _deeper(hf: Mapping[str, Any], config: Config, sources: Sequence[int], new: list[int]) -> dict[str, Any]:
    """The config.json of the expanded model: every field that goes by the depth follows. `config` is of the shallower
    one."""
    depth = "n_layer" if "n_layer" in hf else "num_hidden_layers"
    deeper = {**hf, depth: len(sources), "new_blocks": new}
    if hf.get("layer_types"):
        deeper["layer_types"] = [hf["layer_types"][i] for i in sources]
    if config.dense_blocks:  # some of them, perhaps, by such a count
        dense = [j for j, i in enumerate(sources) if i in config.dense_blocks]
        deeper |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if hf.get("use_sliding_window"):  # in the blocks from max_window_layers up
        first = hf.get("max_window_layers", 28)
        deeper["max_window_layers"] = first + sum(sources[j] < first for j in new)
    return deeper


def check_new_blocks(checkpoint: Checkpoint, plan: FreezePlan) -> None:
    """Raises UsageError if something trains in a new block that can never learn: nothing comes out of it, and what
    keeps it in does not train."""
    config = checkpoint.config
    for i in config.new_blocks:
        trains = set(plan.trained_in_block(i))
        if not trains:
            continue
        every = [name for name in plan.sizes if block_of(name) == i and not is_lora(name)]
        ways = _ways_out(every, config)
        shut = [way for way in ways if not any(_lets_through(checkpoint, name) for name in way)]
        dora = plan.lora.ranks if plan.lora is not None and plan.lora.dora else ()
        if stretched := [name for way in shut for name in way if name.removesuffix(".weight") in dora]:
            raise UsageError(
                f"--use_dora: {stretched[0].removesuffix('.weight')} is zero, as new blocks begin, and DoRA stretches "
                "what is there. Leave --use_dora out, or train the new blocks in full first."
            )
        opens = {name for way in shut for name in way if name in trains or _adapted(name, plan)}
        if len(shut) == len(ways) and not opens:
            what = " and ".join(way[0].removesuffix(".weight").rpartition(".")[2] for way in shut)
            raise UsageError(
                f"The new block {i} would never learn: its {what} begin at zero and do not train. Train one of them "
                "too, or leave the block out of --trainable_layers."
            )


def _ways_out(names: Sequence[str], config: Config) -> list[list[str]]:
    """The weights through which each half of a block adds to the stream: a norm, a projection, or one of each
    expert."""
    if config.post_norm:
        return [[name] for name in names if name.endswith(POST_NORMS)]
    ends = ("o_proj.weight", "down_proj.weight")
    return [[name for name in names if name.endswith(end)] for end in ends]


def _lets_through(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the weight `name` is another than what expansion makes it."""
    weight = checkpoint.read(name)
    plus_one = checkpoint.config.norm == "rmsnorm_plus_one" and name.endswith(POST_NORMS)
    return bool((weight != -1).any() if plus_one else weight.any())


def _adapted(name: str, plan: FreezePlan) -> bool:
    return plan.lora is not None and name.removesuffix(".weight") in plan.lora.ranks


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
