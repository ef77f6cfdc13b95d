"""The loss equals the plain one, and its counts are what greedy decoding would do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from litfreeze.config import Config
from litfreeze.data.batches import build_batch
from litfreeze.data.shelf import IGNORE, Sample
from litfreeze.generate.sample import generate_tokens
from litfreeze.lora import LoRA, add_lora
from litfreeze.model import GPT
from litfreeze.presets import PRESETS
from litfreeze.train import head as head_module
from litfreeze.train import loss as loss_module
from litfreeze.train.loss import NextToken

VOCABULARY = 97
SHAPE = {**PRESETS["demo"], "num_hidden_layers": 2, "vocab_size": VOCABULARY}
CONFIG = Config.from_hf(SHAPE)
WAYS = [{"packed": False}, {"packed": True}]


@pytest.fixture
def gpt() -> GPT:
    model = GPT(CONFIG)
    model.init_weights(seed=3)
    return model


def some_samples(share: float) -> list[Sample]:
    """Three of 21 tokens, about `share` of them learned, but at least the last one."""
    generator = np.random.default_rng(0)
    samples = []
    for i in range(3):
        tokens = generator.integers(0, VOCABULARY, 21).astype(np.int32)
        learned = generator.random(21) < share
        learned[-1] = True
        samples.append(Sample(tokens, np.where(learned, tokens, IGNORE), f"x:{i}", (1, 21)))
    return samples


def plain_loss(gpt: GPT, samples: list[Sample]) -> torch.Tensor:
    """Summed cross-entropy, as torch has it."""
    tokens = torch.tensor(np.stack([s.tokens for s in samples])).long()
    labels = torch.tensor(np.stack([s.labels for s in samples])).long()
    logits = gpt(tokens[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE)


def check_gradients(gpt: GPT, samples: list[Sample], way: dict) -> None:
    plain = plain_loss(gpt, samples)
    plain.backward()
    expected = {name: None if p.grad is None else p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()
    scored = NextToken(gpt)(build_batch(samples, [0, 1, 2], **way))
    (scored.loss / 7).backward()  # whatever it is scaled by on its way down
    assert scored.loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert scored.targets == sum((s.labels[1:] != IGNORE).sum() for s in samples)
    for name, p in gpt.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad * 7, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [16, 1024])  # in chunks, and at once
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_value_and_gradient_are_those_of_the_plain_loss(gpt, monkeypatch, way, rows, share):
    monkeypatch.setattr(head_module, "logit_rows", lambda vocabulary: rows)
    check_gradients(gpt, some_samples(share), way)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [["head"], ["final_norm"], ["final_norm", "head"], ["blocks.1"]])
def test_a_frozen_head_has_no_gradient_and_may_be_kept_in_less(monkeypatch, trained, kept):
    monkeypatch.setattr(head_module, "logit_rows", lambda vocabulary: 16)
    monkeypatch.setattr(head_module, "SLICE", 1)  # as few rows of the head at once as there can be
    gpt = GPT(Config.from_hf({**SHAPE, "tie_word_embeddings": False}))
    gpt.init_weights(seed=3)
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))
    gpt.stream = torch.float32
    if not gpt.head.weight.requires_grad:
        gpt.head.weight.data = gpt.head.weight.data.to(kept)
    check_gradients(gpt, some_samples(0.5), {})


def test_an_adapter_on_the_head_learns_too(gpt, monkeypatch):
    monkeypatch.setattr(loss_module, "logit_rows", lambda vocabulary: 4)
    gpt.requires_grad_(False)
    add_lora(gpt, LoRA({"head": 2}, {"head": 4.0}))
    for parameter in (gpt.head.lora_A, gpt.head.lora_B):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    check_gradients(gpt, some_samples(0.5), {})


@pytest.mark.parametrize("way", WAYS)
def test_a_stand_in_has_gradients_of_zero(gpt, way):
    """Processes without a record of their own take part in backward all the same."""
    scored = NextToken(gpt)(build_batch(some_samples(0.5), [], **way))
    scored.loss.backward()
    assert [value.item() for value in scored[:5]] == [0, 0, 0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in gpt.parameters())


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_an_exact_match_is_what_greedy_decoding_writes(gpt, way):
    prompt = [5, 6, 7, 8]
    tokens = np.array(prompt + list(generate_tokens(gpt, prompt, max_new_tokens=6)), np.int32)
    wrong = tokens.copy()
    wrong[-2] = (wrong[-2] + 1) % VOCABULARY
    labels = [np.where(np.arange(10) < 4, IGNORE, t) for t in (tokens, wrong)]
    samples = [Sample(tokens, label, "x:1", (4, 10)) for label in labels]  # the second is asked for another token
    scored = NextToken(gpt)(build_batch(samples, [0, 1], **way))
    assert (scored.targets, scored.right, scored.exact, scored.records) == (12, 11, 1, 2)


def test_the_loss_is_fp32_whatever_the_default_dtype_is(gpt):
    """Under bf16-true Fabric makes bf16 the default, in which a sum over many targets has no digits left."""
    samples = some_samples(1.0) * 40
    gpt.to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        scored = NextToken(gpt)(build_batch(samples, list(range(120))))
    finally:
        torch.set_default_dtype(torch.float32)
    assert scored.loss.dtype == torch.float32
    one = NextToken(gpt)(build_batch(samples, [0, 1, 2])).loss.item()
    assert scored.loss.item() == pytest.approx(40 * one, rel=1e-4)
