"""The arithmetic floor of an epoch: the matmul FLOPs that nobody can do without, and this machine's matmul rate.

    python benchmarks/floor.py --model DIR --data FILE --blocks 28,29 [--lora_r 8 | --whole] [--epoch 2]

prints both as one JSON line. `peers.py` runs it in each of its rounds."""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from litfreeze.config import Config
    from litfreeze.data.shelf import Sample

IGNORE = -100


@dataclass(frozen=True)
class Rows:
    """Positions that something is computed for: how many, and how many (query, key) pairs their attention has."""

    tokens: int
    pairs: int


@dataclass(frozen=True)
class Choice:
    """What trains: `blocks` in full, or (`lora_r` > 0) an adapter on each of their linear layers; `head` too."""

    blocks: frozenset[int]
    lora_r: int = 0
    head: bool = False


def step_flops(config: "Config", every: Rows, targets: Rows, choice: Choice) -> int:
    """FLOPs of the matrix products that one step needs, a multiply and an add being two.

    `every` are the positions of the batch, without padding; `targets` those whose next token is learned. Assumed:

    - Below the lowest block that trains nothing runs: its activations are known from an earlier epoch.
    - From there up, every position goes through every block, except in the last one: keys and values for every
      position; queries, output projection and MLP for `targets` only. The head too runs on `targets` only.
    - Backward goes down to the lowest block that trains, with the gradient of each product's input (not in the lowest
      block under LoRA, where queries, keys and values are made of what is frozen) and, of what trains, of its weight.
      A block is attention and then MLP; where they stand side by side, LoRA needs a product or two less.
    - Attention costs two products forward and four backward per (query, key) pair that the causal mask lets through;
      no window is shorter than a record. Scores are kept, not computed again.
    - Nothing is computed twice, as activation checkpointing would, and all else is free: norms, rotation, softmax,
      activations, the loss, the optimizer, and reading the weights. No implementation can reach 100 %.
    """
    C, wide = config.n_embd, config.intermediate_size
    queries, groups = config.n_head * config.head_size, config.n_query_groups * config.head_size
    lowest, last = min(choice.blocks), config.n_layer - 1
    flops = 0
    for block in range(lowest, config.n_layer):
        out = targets if block == last else every
        onward = not (choice.lora_r and block == lowest)  # whether q, k and v pass a gradient on
        linears = [(out, C, queries, onward), (every, C, groups, onward), (every, C, groups, onward)]
        linears += [(out, queries, C, True), (out, wide, C, True)]
        linears += [(out, C, wide, True)] * (2 if config.mlp == "gated" else 1)
        trains = block in choice.blocks
        for rows, into, onto, input_grad in linears:
            flops += _linear(rows.tokens, into, onto, input_grad, weight_grad=trains and not choice.lora_r)
            if trains and choice.lora_r:
                flops += _linear(rows.tokens, into, choice.lora_r, input_grad, weight_grad=True)
                flops += _linear(rows.tokens, choice.lora_r, onto, input_grad=True, weight_grad=True)
        flops += (2 + 4) * 2 * queries * out.pairs
    return flops + _linear(targets.tokens, C, config.n_outputs, input_grad=True, weight_grad=choice.head)


def _linear(rows: int, into: int, onto: int, input_grad: bool, weight_grad: bool) -> int:
    return 2 * rows * into * onto * (1 + input_grad + weight_grad)


def batch_rows(samples: Sequence["Sample"], share: bool = True) -> tuple[Rows, Rows]:
    """All positions of a batch, and those whose next token is learned. The last token of a sample predicts nothing and
    is no position. With `share`, a beginning that all samples have in common counts once."""
    shared = _common_beginning(samples) if share else 0
    every, targets = [], []
    for i, sample in enumerate(samples):
        positions = range(len(sample.tokens) - 1)
        every += positions if i == 0 else positions[shared:]
        targets += [p for p in positions if sample.labels[p + 1] != IGNORE]
    return tuple(Rows(len(found), sum(p + 1 for p in found)) for found in (every, targets))


def _common_beginning(samples: Sequence["Sample"]) -> int:
    for length, column in enumerate(zip(*(sample.tokens[:-1].tolist() for sample in samples), strict=False)):
        if len(set(column)) > 1:
            return length
    return min(len(sample.tokens) - 1 for sample in samples)


def epoch_flops(
    config: "Config", samples: Sequence["Sample"], choice: Choice, batch_size: int, seed: int, epoch: int
) -> int:
    """`step_flops` over the batches of epoch `epoch` (from 0), in the order of `random.Random(seed + epoch)`."""
    order = list(range(len(samples)))
    random.Random(seed + epoch).shuffle(order)
    batches = [[samples[j] for j in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return sum(step_flops(config, *batch_rows(batch), choice) for batch in batches)


# (rows, inner, columns): squares, and tall ones such as training has
PRODUCTS = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (2048, 576, 1536), (1024, 576, 49152)]


def matmul_rate(seconds: float = 0.3) -> dict[str, float]:
    """FLOP/s of the fastest fp32 product of each shape within `seconds`, on as many threads as torch uses."""
    rates = {}
    for rows, inner, columns in PRODUCTS:
        a, b = torch.rand(rows, inner), torch.rand(inner, columns)
        out = a @ b
        fastest, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            fastest = min(fastest, time.perf_counter() - start)
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / fastest
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face or litfreeze directory")
    parser.add_argument("--data", type=Path, required=True, help="the records, as litfreeze reads them")
    parser.add_argument("--blocks", default="all", help="what trains, in litfreeze's words")
    parser.add_argument("--lora_r", type=int, default=0, help="train an adapter of this rank on them instead")
    parser.add_argument("--whole", action="store_true", help="the head trains too")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.data.args import DataArgs
    from litfreeze.data.prompt import Prompt
    from litfreeze.data.samples import load_samples
    from litfreeze.freeze.layers import parse_layers

    checkpoint = open_checkpoint(args.model)
    tokenizer = checkpoint.tokenizer()
    prompt = Prompt.choose(None, checkpoint.prompt, tokenizer, None)
    data = DataArgs(path=args.data, val_split_fraction=0)
    samples = load_samples(data, tokenizer, prompt, args.max_seq_length).train
    choice = Choice(frozenset(parse_layers(args.blocks, checkpoint.config.n_layer)), args.lora_r, args.whole)
    flops = epoch_flops(checkpoint.config, samples, choice, args.batch_size, args.seed, args.epoch)
    rates = matmul_rate()
    rate = max(rates.values())
    told = {"flops": flops, "rate": rate, "seconds": flops / rate, "threads": torch.get_num_threads(), "rates": rates}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
