"""What a plan trains, by name; and that it is what the model and the optimizer then hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litfreeze.attention import Dense
from litfreeze.config import Config
from litfreeze.data.batches import build_batch
from litfreeze.data.shelf import Sample
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.args import FactoryArgs
from litfreeze.freeze.layers import format_layers
from litfreeze.freeze.memory import Thrift, estimate_memory
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.freeze.table import table
from litfreeze.freeze.words import adapter_targets, plan_from_words, weights_in_full
from litfreeze.lora import LoRA, add_lora
from litfreeze.model import GPT
from litfreeze.precision import PRECISIONS
from litfreeze.presets import PRESETS
from litfreeze.train.args import TrainArgs
from litfreeze.train.loss import NextToken
from litfreeze.train.optim import build_optimizer

TIED = Config.from_hf(PRESETS["demo"])
UNTIED = Config.from_hf({**PRESETS["demo"], "tie_word_embeddings": False})


def stored_in_fp32(_):
    return torch.float32


def in_blocks(plan, *layers):
    return {name for name in plan.sizes if block_of(name) in layers}


def test_no_word_trains_everything():
    plan = plan_from_words(TIED)
    assert plan.trained == set(plan.sizes)
    assert plan.lowest == -1


@pytest.mark.parametrize("layers", ["1", "10", "1,10", "-2:", "first:1"])
def test_an_id_is_matched_whole(layers):
    plan = plan_from_words(TIED, trainable_layers=layers)
    assert plan.trained == in_blocks(plan, *plan.layers)
    assert format_layers(plan.layers) == {"-2:": "10,11", "first:1": "0"}.get(layers, layers)


def test_modules_narrow_inside_the_chosen_blocks():
    def names(modules):
        return {n.removesuffix(".weight") for n in plan_from_words(TIED, 3, modules).trained}

    assert names("q_proj,v_proj") == {"blocks.3.attn.q_proj", "blocks.3.attn.v_proj"}
    assert names("norm") == {"blocks.3.norm_1", "blocks.3.norm_2"}
    assert names(["mlp"]) == {"blocks.3.mlp.gate_proj", "blocks.3.mlp.up_proj", "blocks.3.mlp.down_proj"}
    assert names("*.k_proj") == names("blocks.*.k_*") == names("re:.*k_proj.*") == {"blocks.3.attn.k_proj"}
    assert names("re:blocks\\.(3|4)\\.norm_[1,2]\\.weight") == {"blocks.3.norm_1", "blocks.3.norm_2"}


def test_extras_stand_outside_the_blocks():
    plan = plan_from_words(UNTIED, "none", trainable_extra="head,final_norm")
    assert plan.trained == {"head.weight", "final_norm.weight"}
    assert plan.lowest == 12
    assert plan_from_words(TIED, "none", trainable_extra="embed").trained == {"embed.weight"}
    assert plan_from_words(TIED, "none", trainable_extra=["embed", "head"]).trained == {"embed.weight"}


def test_learned_positions_go_with_the_embedding():
    gpt2 = Config.from_hf(
        {"model_type": "gpt2", "vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
    )
    assert plan_from_words(gpt2, "none", trainable_extra="embed").trained == {"embed.weight", "pos_embed.weight"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"freeze_trainable_layers": 8}, {"trainable_layers": "last:8"}),
        ({"freeze_trainable_layers": -8}, {"trainable_layers": "first:8"}),
        ({"freeze_trainable_layers_ids": "1,2,10"}, {"trainable_layers": [1, 2, 10]}),
        (
            {"freeze_trainable_layers": 2, "freeze_trainable_modules": "self_attn,mlp"},
            {"trainable_layers": "-2:", "trainable_modules": "attn,mlp"},
        ),
        (
            {"freeze_trainable_layers": 2, "freeze_trainable_modules": "all", "freeze_extra_modules": "norm"},
            {"trainable_layers": "-2:", "trainable_extra": "final_norm"},
        ),
    ],
)
def test_llama_factorys_words_mean_the_same(theirs, ours):
    found = plan_from_words(TIED, factory=FactoryArgs(**theirs))
    assert found.trained == plan_from_words(TIED, **ours).trained


def test_beside_ours_too():
    found = plan_from_words(TIED, "none", factory=FactoryArgs(freeze_extra_modules="lm_head,embed_tokens"))
    assert found.trained == plan_from_words(TIED, "none", trainable_extra="head,embed").trained


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"trainable_layers": "none"}, "Nothing would train"),
        ({"trainable_layers": "12"}, "ids 0 to 11"),
        ({"trainable_layers": "1", "trainable_modules": "mlpp"}, "Did you mean 'mlp'"),
        ({"trainable_layers": "1", "trainable_modules": "blocks.2.*"}, "matches nothing in the chosen blocks"),
        ({"trainable_layers": "1", "trainable_modules": "lin"}, "matches nothing"),
        ({"trainable_layers": "1", "trainable_modules": "re:["}, "no regular expression"),
        ({"trainable_layers": "1", "trainable_modules": "attn,,mlp"}, "empty name"),
        ({"trainable_layers": "1", "trainable_modules": []}, "empty name"),
        ({"trainable_layers": "1", "trainable_extra": "haed"}, "Did you mean 'head'"),
        ({"trainable_layers": "1", "trainable_extra": "head"}, "--untie_embeddings"),
        ({"trainable_extra": "embed"}, "needs --trainable_layers"),
        ({"trainable_layers": "1", "factory": FactoryArgs(2)}, "say the same thing"),
        ({"trainable_modules": "mlp", "factory": FactoryArgs(freeze_trainable_modules="mlp")}, "say the same thing"),
        ({"factory": FactoryArgs(0)}, "n > 0"),
        ({"factory": FactoryArgs(13)}, "this model has 12"),
    ],
)
def test_contradictions_and_nonsense_are_refused(words, told):
    with pytest.raises(UsageError) as error:
        plan_from_words(TIED, **words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@given(st.sets(st.integers(0, 11), min_size=1), st.sampled_from([None, "attn", "mlp", "norm", "q_proj"]))
@settings(max_examples=15)
def test_the_optimizer_holds_what_the_plan_says_and_nothing_else(layers, modules):
    plan = plan_from_words(UNTIED, sorted(layers), modules)
    model = GPT(UNTIED)
    plan.apply(model)
    optimizer = build_optimizer(model, plan, TrainArgs(lr=1e-3, weight_decay=0.1))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name in plan.trained}
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_a_model_or_an_optimizer_that_disagrees_is_found():
    plan = plan_from_words(TIED, "3")
    model = GPT(TIED)
    plan.apply(model)
    optimizer = build_optimizer(model, plan, TrainArgs(lr=1e-3))
    model.blocks[10].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(RunError, match=r"blocks\.10\.mlp\.up_proj"):
        plan.check(model, optimizer)
    plan.apply(model)
    optimizer.add_param_group({"params": [model.blocks[1].norm_1.weight]})
    with pytest.raises(RunError, match=r"the optimizer.*blocks\.1\.norm_1"):
        plan.check(model, optimizer)


def test_the_table_counts_every_parameter_once():
    plan = plan_from_words(TIED, "0-2,11", "attn", "final_norm")
    rows = [line.split() for line in table(plan).splitlines()]
    total = rows[-1]
    assert total[1:3] == [f"{plan.n_trained:,}", f"{plan.n_parameters:,}"]
    labels = [" ".join(row[:2]) for row in rows]
    assert "blocks 0-2" in labels and "blocks 3-10" in labels and "block 11" in labels
    assert plan.n_trained == sum(p.numel() for n, p in GPT(TIED).named_parameters() if n in plan.trained)


def test_memory_of_a_plan_follows_what_trains():
    mixed = PRECISIONS["bf16-mixed"]
    two, all_ = (plan_from_words(TIED, w) for w in ("10,11", None))
    small, large = (estimate_memory(plan, mixed, stored_in_fp32, 1024, 1024) for plan in (two, all_))
    assert small.gradients == 4 * two.n_trained and small.optimizer == 8 * two.n_trained
    assert small.weights == 4 * two.n_trained + 2 * (two.n_parameters - two.n_trained)
    assert small.activations < large.activations and small.total < large.total
    first = estimate_memory(plan_from_words(TIED, "0"), mixed, stored_in_fp32, 1024, 1024)
    assert first.activations > small.activations  # backward has to reach the bottom


def test_gradients_of_one_micro_batch_come_as_its_activations_go():
    two, one = plan_from_words(TIED, "10,11"), Thrift(accumulate=False)
    fp32 = PRECISIONS["32-true"]
    both, many = (estimate_memory(two, fp32, stored_in_fp32, 4096, 4096, thrift) for thrift in (Thrift(), one))
    few = estimate_memory(two, fp32, stored_in_fp32, 8, 8, one)
    assert (many.gradients, many.activations, many.logits) == (0, both.activations, both.logits)
    assert (few.gradients, few.activations, few.logits) == (4 * two.n_trained, 0, 0)
    head = plan_from_words(TIED, "all", trainable_extra="embed")  # its gradient is made before all others
    begins = estimate_memory(head, fp32, stored_in_fp32, 4096, 4096, one)
    assert begins.gradients == 4 * head.sizes["embed.weight"] and begins.activations > 0


def adapter_plan(layers, targets="all", full=None, **more) -> FreezePlan:
    named = adapter_targets(TIED, layers, targets)
    lora = LoRA(dict.fromkeys(named, 8), dict.fromkeys(named, 16.0), **more)
    return FreezePlan.adapter(TIED, lora, weights_in_full(TIED, full, None))


PLANS = {
    "10,11": plan_from_words(TIED, "10,11"),
    "0-5": plan_from_words(TIED, "0-5"),
    "all": plan_from_words(TIED, "all"),
    "LoRA": adapter_plan("all"),
    "LoRA with dropout": adapter_plan("4-11", dropout=0.1),
    "LoRA on some": adapter_plan("10,11", "q_proj,v_proj"),
    "DoRA": adapter_plan("6-11", dora=True),
    "mixed": adapter_plan("0-9", full="10,11"),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_activations_are_about_what_autograd_keeps(precision, plan):
    kept = PRECISIONS[precision]
    model = GPT(TIED)
    model.init_weights(0)
    if plan.lora is not None:
        add_lora(model, plan.lora)
    for name, p in model.named_parameters():
        p.data = p.data.to(kept.kept(name in plan.trained, torch.float32))
    model.stream = kept.stream
    plan.apply(model)
    tokens = (np.arange(4 * 257, dtype=np.int32) % 1000).reshape(4, 257)
    samples = [Sample(row, row, "", (0, 257)) for row in tokens]
    batch = build_batch(samples, [0, 1, 2, 3])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), mixed:
        loss = NextToken(model)(batch).loss
    estimate = estimate_memory(plan, kept, stored_in_fp32, 1024, 1024).activations
    assert estimate == pytest.approx(sum(seen.values()), rel=0.35), loss


def test_requires_grad_is_the_plans_alone():
    plan = plan_from_words(TIED, "none", trainable_extra="final_norm")
    model = GPT(TIED)
    plan.apply(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"final_norm.weight"}
    model.logits(
        model.run_blocks(
            model.embed_tokens(torch.zeros(1, 3, dtype=torch.long), torch.arange(3)), torch.arange(3), Dense()
        )
    )
