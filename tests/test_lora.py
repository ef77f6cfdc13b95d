"""What an adapter computes, where it begins, and that folding it in computes the same."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from litfreeze.config import Config
from litfreeze.demo import MODEL_DIR
from litfreeze.lora import (
    LoRA,
    LoRALinear,
    add_lora,
    folded,
    fresh_tensors,
    grown_tensors,
    is_lora,
    linear_layers,
    model_parameters,
)
from litfreeze.model import GPT

DEMO = Config.from_file(MODEL_DIR / "config.json")
MODULE = "blocks.0.mlp.up_proj"


@st.composite
def adapters(draw) -> LoRA:
    r = draw(st.integers(1, 9))
    alpha = draw(st.sampled_from([0.5, 1.0, 8.0, 33.0]))
    return LoRA({MODULE: r}, {MODULE: alpha}, rslora=draw(st.booleans()), dora=draw(st.booleans()))


def layer(lora: LoRA, seed: int = 0, dropout: float = 0.0, bias: bool = True) -> LoRALinear:
    """A layer of 7 to 11 whose weights and adapter are all far from zero."""
    linear = nn.Linear(7, 11, bias=bias)
    made = LoRALinear(linear, lora.ranks[MODULE], lora.scale(MODULE), dropout, lora.dora)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.5, 1.0, generator=generator)
    return made


@given(adapters(), st.integers(0, 1000), st.booleans())
def test_the_folded_weight_does_what_the_layer_does(lora, seed, bias):
    made = layer(lora, seed, bias=bias)
    weight = folded(made.weight, made.lora_A, made.lora_B, lora.scale(MODULE), made.lora_magnitude)
    x = torch.randn(3, 5, 7)
    expected = made(x)
    torch.testing.assert_close(nn.functional.linear(x, weight, made.bias), expected, rtol=1e-4, atol=1e-4)


@given(adapters(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.sets(st.sampled_from("xABm")))
def test_gradients_are_those_of_the_formula(lora, bias, kept, learning):
    made = layer(lora, bias=bias)
    made.weight = nn.Parameter(made.weight.detach().to(kept), requires_grad=False)
    leaves = {"x": torch.randn(3, 5, 7), "A": made.lora_A, "B": made.lora_B, "m": made.lora_magnitude}
    leaves = {name: leaf.requires_grad_(name in learning) for name, leaf in leaves.items() if leaf is not None}
    weight, push = made.weight.float(), torch.randn(3, 5, 11)

    y = leaves["x"] @ (weight + lora.scale(MODULE) * made.lora_B @ made.lora_A).T
    if lora.dora:
        y = y * made.lora_magnitude / made.row_lengths()
    y = y if made.bias is None else y + made.bias
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    told = made(leaves["x"])
    torch.testing.assert_close(told, y, rtol=1e-4, atol=1e-4)
    if wanted:
        theirs, ours = (torch.autograd.grad(out, [leaves[name] for name in wanted], push) for out in (y, told))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@given(adapters(), st.integers(0, 1000))
def test_row_lengths_are_those_of_the_sum(lora, seed):
    made = layer(lora, seed)
    whole = made.weight + lora.scale(MODULE) * made.lora_B @ made.lora_A
    torch.testing.assert_close(made.row_lengths(), whole.norm(dim=1), rtol=1e-4, atol=1e-4)


@given(adapters(), st.integers(0, 1000))
def test_a_new_adapter_changes_nothing_and_a_larger_rank_changes_nothing_more(lora, seed):
    weight = torch.randn(11, 7, generator=torch.Generator().manual_seed(seed))
    fresh = fresh_tensors(lora, {MODULE: (11, 7)}, lambda _: weight, seed)
    a, b = fresh[f"{MODULE}.lora_A"], fresh[f"{MODULE}.lora_B"]
    assert a.abs().max() <= 7**-0.5 and a.std() > 0.05 and not b.any()
    start = folded(weight, a, b, lora.scale(MODULE), fresh.get(f"{MODULE}.lora_magnitude"))
    torch.testing.assert_close(start, weight, rtol=1e-6, atol=1e-6)

    trained = {name: torch.randn_like(tensor) for name, tensor in fresh.items()}
    larger = lora.resized(lora.ranks[MODULE] + 4)
    grown = grown_tensors(lora, larger, trained.__getitem__, seed)
    assert larger.scale(MODULE) == pytest.approx(lora.scale(MODULE), rel=1e-12)
    before, after = (
        folded(
            weight, t[f"{MODULE}.lora_A"], t[f"{MODULE}.lora_B"], which.scale(MODULE), t.get(f"{MODULE}.lora_magnitude")
        )
        for which, t in ((lora, trained), (larger, grown))
    )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert grown[f"{MODULE}.lora_A"][lora.ranks[MODULE] :].abs().min() > 0  # the new rows can learn


@given(adapters())
def test_settings_survive_the_manifest(lora):
    assert LoRA.from_dict(lora.to_dict()) == lora


@pytest.mark.parametrize(
    "damage", [{"targets": {}}, {"targets": {MODULE: {"r": 0, "alpha": 1}}}, {"targets": {MODULE: {}}}, {"targets": []}]
)
def test_damaged_settings_are_not_taken(damage):
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        LoRA.from_dict({**LoRA({MODULE: 2}, {MODULE: 4.0}).to_dict(), **damage})


def test_dora_under_dropout_is_as_pefts():
    """What is stretched has seen the dropout, what passes through has not."""
    made = layer(LoRA({MODULE: 4}, {MODULE: 8.0}, dora=True), dropout=0.5).train()
    x = torch.randn(6, 7, requires_grad=True)
    torch.manual_seed(3)
    told = made(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    stretch = made.lora_magnitude / made.row_lengths()
    plain, seen = (nn.functional.linear(t, made.weight) for t in (x, dropped))
    update = made.scale * dropped @ made.lora_A.T @ made.lora_B.T
    y = plain + (stretch - 1) * seen + stretch * update + made.bias
    torch.testing.assert_close(told, y, rtol=1e-4, atol=1e-4)
    leaves, push = [x, made.lora_A, made.lora_B, made.lora_magnitude], torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, leaves, push, retain_graph=True) for out in (told, y))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_falls_on_the_adapter_alone_and_in_training_alone():
    made = layer(LoRA({MODULE: 4}, {MODULE: 4.0}), dropout=0.5)
    x = torch.randn(64, 7)
    made.eval()
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))
    nn.init.zeros_(made.lora_B)
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_the_model_keeps_its_names_and_a_tied_head_its_tie():
    targets = [*list(linear_layers(DEMO))[:2], "head"]
    lora = LoRA(dict.fromkeys(targets, 2), dict.fromkeys(targets, 4.0), dora=True)
    names = list(model_parameters(DEMO, lora))
    assert [name for name in names if not is_lora(name)] == list(model_parameters(DEMO))
    assert {name for name in names if is_lora(name)} == {p for module in targets for p in lora.parameters(module)}
    model = GPT(DEMO)
    add_lora(model, replace(lora, dora=False))
    assert model.head.weight is model.embed.weight


def test_every_linear_layer_can_be_adapted():
    layers = linear_layers(DEMO)
    assert len(layers) == 12 * 7 + 1 and layers["head"] == (DEMO.vocab_size, 128)
    assert layers["blocks.11.mlp.down_proj"] == (128, 352)
