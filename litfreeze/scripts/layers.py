"""`litfreeze layers`: what a choice of layers would train and cost, without training."""

from pathlib import Path
from typing import Literal, Optional

from litfreeze.freeze.args import FactoryArgs
from litfreeze.freeze.layers import Layers, Names
from litfreeze.place import PrecisionName
from litfreeze.train.args import SEED, TrainArgs

RECORDS = 1000


def setup(
    checkpoint_dir: Optional[Path] = None,
    trainable_layers: Layers = None,
    trainable_modules: Names = None,
    trainable_extra: Names = None,
    untie_embeddings: bool = False,
    factory: FactoryArgs = FactoryArgs(),
    precision: Optional[PrecisionName] = None,
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw",
    activation_checkpointing: bool = False,
    fused_backward: bool = False,
    freeze_quantize: Optional[Literal["int8", "nf4"]] = None,
    micro_batch_size: int = TrainArgs.micro_batch_size,
    max_seq_length: int = 512,
) -> None:
    """Print which parameters a choice of layers trains, the memory it needs and what it saves. Nothing is trained.

    Args:
        checkpoint_dir: A litfreeze or Hugging Face directory, or ORG/NAME on the Hub; else the embedded demo model.
        trainable_layers: Blocks to train: 10,11  0-3,8  -2:  last:8  first:4  every:4  20%-80%  new  all  none;
            rank:spectrum:4 for the best 4 of litfreeze rank. By default the whole model trains.
        trainable_modules: Inside those blocks only: attn, mlp, norm, q_proj, ...; a glob; or re:... on full names.
        trainable_extra: Also outside the blocks: embed, head, final_norm.
        untie_embeddings: Give a head that is tied to the embedding a copy of its own.
        factory: LLaMA-Factory's words for what trains.
        precision: What the weights would be kept in; by default what this machine trains in.
        optimizer: As --train.optimizer.
        activation_checkpointing: As --train.activation_checkpointing.
        fused_backward: As in finetune.
        freeze_quantize: As in finetune.
        micro_batch_size: Samples in one forward pass.
        max_seq_length: Tokens in each of them.
    """
    import torch

    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.choose.rank import rank
    from litfreeze.choose.words import has_ranks, put_ids
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.freeze.memory import Thrift, beside_everything, describe_memory
    from litfreeze.freeze.plan import FreezePlan
    from litfreeze.freeze.savings import Pass, Rows, describe_savings
    from litfreeze.freeze.table import summary, table
    from litfreeze.freeze.words import plan_from_words
    from litfreeze.precision import PRECISIONS, default_precision
    from litfreeze.train.speed import measure_speed

    if micro_batch_size < 1 or max_seq_length < 1:
        raise UsageError("--micro_batch_size and --max_seq_length must be at least 1.")
    base = open_checkpoint(checkpoint_dir or MODEL_DIR)
    base = base.untied() if untie_embeddings else base
    if base.lora is not None:
        raise UsageError(f"{base.path} is an adapter: {base.lora.describe()}. Name a model, or merge it first.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if has_ranks(trainable_layers):
        depth, new = base.config.n_layer, base.config.new_blocks
        trainable_layers, told = put_ids(trainable_layers, depth, new, lambda method: rank(base, method, SEED, device))
        print("\n".join(told))
    plan = plan_from_words(
        base.config,
        trainable_layers=trainable_layers,
        trainable_modules=trainable_modules,
        trainable_extra=trainable_extra,
        factory=factory,
    )
    kept = PRECISIONS[precision or default_precision("auto")]
    tokens = micro_batch_size * max_seq_length
    print(f"{base.path}\n{summary(plan)}\n\n{table(plan)}\n")
    several = micro_batch_size < TrainArgs.global_batch_size
    thrift = Thrift(optimizer, fused_backward, freeze_quantize, activation_checkpointing, several)
    print(
        f"Memory at its peak, estimated for {kept.name}, {optimizer}, micro-batches of {tokens:,} tokens, all learned:"
    )
    print(f"{describe_memory(*beside_everything([plan], kept, base.dtype, tokens, tokens, thrift))}\n")
    rows = Rows.full(RECORDS, max_seq_length)
    size = rows.tokens * plan.config.n_embd * kept.stream.itemsize if plan.lowest > 0 else None
    steps, batch = -(-RECORDS // TrainArgs.global_batch_size), (micro_batch_size, max_seq_length)
    passes = (
        Pass.of(each, rows, measure_speed(each, kept, base.dtype, device, *batch, activation_checkpointing), steps)
        for each in (plan, FreezePlan.everything(plan.config))
    )
    print(describe_savings(*passes, rows.tokens, size, f"{RECORDS:,} records of {max_seq_length}"))
