"""The loss equals the plain one, and its counts are what greedy decoding would do."""

import pytest
import torch
import torch.nn.functional as F

from litfreeze.config import PRESETS, Config
from litfreeze.generate.sample import generate_tokens
from litfreeze.model import GPT
from litfreeze.train import loss as loss_module
from litfreeze.train.loss import NextToken

CONFIG = Config.from_hf({**PRESETS["demo"], "num_hidden_layers": 2, "vocab_size": 97})


@pytest.fixture
def gpt():
    model = GPT(CONFIG)
    model.init_weights(seed=3)
    return model


def batch(n_masked: int):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (3, 20), generator=generator)
    targets = torch.randint(0, 97, (3, 20), generator=generator)
    targets.view(-1)[torch.randperm(60, generator=generator)[:n_masked]] = -100
    return tokens, targets


@pytest.mark.parametrize("rows", [4, 1024])  # in chunks, and at once
@pytest.mark.parametrize("n_masked", [0, 31, 60])
def test_value_and_gradient_are_those_of_the_plain_loss(gpt, monkeypatch, rows, n_masked):
    monkeypatch.setattr(loss_module, "ROWS", rows)
    tokens, targets = batch(n_masked)
    plain = F.cross_entropy(gpt(tokens).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in gpt.named_parameters()}
    gpt.zero_grad()

    scored = NextToken(gpt)(tokens, targets)
    scored.loss.backward()
    assert scored.loss.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-6)
    assert scored.targets == 60 - n_masked
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_exact_match_is_what_greedy_decoding_writes(gpt):
    prompt = [5, 6, 7, 8]
    written = list(generate_tokens(gpt, prompt, max_new_tokens=6))
    sequence = torch.tensor([prompt + written])
    targets = sequence[:, 1:].clone()
    targets[:, : len(prompt) - 1] = -100
    scored = NextToken(gpt)(sequence[:, :-1], targets)
    assert (scored.right, scored.exact, scored.records) == (6, 1, 1)
    targets[0, -2] = (targets[0, -2] + 1) % 97
    scored = NextToken(gpt)(sequence[:, :-1], targets)
    assert (scored.right, scored.exact, scored.records) == (5, 0, 1)
