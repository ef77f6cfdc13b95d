"""The floor's FLOPs against what torch counts in transformers and PEFT: pytest benchmarks"""

import numpy as np
import pytest
import torch
from floor import Choice, Rows, batch_rows, step_flops
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from litfreeze.config import Config
from litfreeze.data.shelf import Sample

T = 7
LLAMA = LlamaConfig(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
CONFIG = Config.from_hf({**LLAMA.to_dict(), "architectures": ["LlamaForCausalLM"]})


def counted(model) -> int:
    """Every product of a step over one record of T tokens, all of them targets. Eager attention forms T * T pairs."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(T)[None]).logits.sum().backward()
    return counter.get_total_flops()


def ours(choice: Choice) -> int:
    rows = Rows(T, T * T)
    return step_flops(CONFIG, rows, rows, choice)


def llama():
    return LlamaForCausalLM._from_config(LLAMA, attn_implementation="eager")


def test_all_weights():
    assert ours(Choice(frozenset(range(4)), head=True)) == counted(llama())


@pytest.mark.parametrize("blocks", [{0, 2}, {0, 1, 2, 3}, {0}])
def test_blocks_in_full(blocks):
    model = llama().requires_grad_(False)
    for i in blocks:
        model.model.layers[i].requires_grad_(True)
    assert ours(Choice(frozenset(blocks))) == counted(model)


def test_what_lies_below_runs_in_no_epoch_but_the_first():
    model = llama().requires_grad_(False)
    model.model.layers[3].requires_grad_(True)
    with FlopCounterMode(display=False) as below:
        model.model.layers[3].forward = lambda x, **_: x
        model.model(input_ids=torch.arange(T)[None])
    del model.model.layers[3].forward
    assert ours(Choice(frozenset({3}))) == counted(model) - below.get_total_flops()


def test_an_adapter_on_every_linear_layer():
    peft = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    assert ours(Choice(frozenset(range(4)), lora_r=2)) == counted(get_peft_model(llama(), peft))


def test_in_the_last_block_only_targets_count():
    every, few = Rows(10, 55), Rows(2, 19)
    choice = Choice(frozenset({3}))
    C, wide, queries, groups = 24, 40, 24, 8
    linear = 3 * 2 * (2 * (2 * C * queries + 3 * C * wide) + 10 * 2 * C * groups)
    assert step_flops(CONFIG, every, few, choice) == linear + 6 * 2 * queries * 19 + 2 * 2 * 2 * C * 50


def test_a_common_beginning_counts_once():
    def sample(prompt, response):
        tokens, labels = np.array(prompt + response), np.array([-100] * len(prompt) + response)
        return Sample(tokens, labels, "", (len(prompt), len(tokens)))

    batch = [sample([1, 2, 3], [7, 8]), sample([1, 2, 4, 5], [7])]  # positions 0-3 and 0-3, targets 2, 3 and 3
    assert batch_rows(batch) == (Rows(6, 10 + 3 + 4), Rows(3, 3 + 4 + 4))
    assert batch_rows(batch, share=False) == (Rows(8, 20), Rows(3, 11))
    assert batch_rows([batch[0], batch[0]])[0] == Rows(4, 10)
