"""Generation: greedy is the likeliest token, sampling keeps to its limits, and a stop text is never written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.generate.sample import Sampling, generate_tokens
from litfreeze.generate.text import until
from litfreeze.model import GPT
from litfreeze.presets import PRESETS

CONFIG = Config.from_hf({**PRESETS["demo"], "num_hidden_layers": 2, "vocab_size": 61, "max_position_embeddings": 24})


@pytest.fixture(scope="module")
def gpt():
    model = GPT(CONFIG)
    model.init_weights(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


@torch.no_grad()
def test_greedy_with_a_cache_is_greedy_without(gpt):
    tokens = [3, 1, 4]
    for token in generate_tokens(gpt, [3, 1, 4], max_new_tokens=12):
        assert token == int(gpt(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == 15


def test_it_ends_before_a_stop_id_and_where_the_context_is_full(gpt):
    free = list(generate_tokens(gpt, [3, 1, 4], max_new_tokens=100))
    assert len(free) == 24 - 3
    assert list(generate_tokens(gpt, [3, 1, 4], 100, stop_ids=[free[5]])) == free[: free.index(free[5])]


def test_a_seed_repeats_a_draw(gpt):
    def draw(seed):
        return list(generate_tokens(gpt, [5], 15, sampling=Sampling(temperature=1.5), seed=seed))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=20, unique=True),
    st.floats(0.1, 3),
    st.none() | st.integers(1, 30),
    st.floats(0.01, 1),
    st.integers(0, 99),
)
def test_a_draw_keeps_to_top_k_and_top_p(logits, temperature, top_k, top_p, seed):
    logits = torch.tensor(logits)
    generator = torch.Generator().manual_seed(seed)
    token = Sampling(temperature, top_k, top_p).draw(logits, generator)
    probabilities = (logits / temperature).softmax(-1)
    likelier = probabilities > probabilities[token]
    assert likelier.sum() < (top_k or len(logits))
    kept = probabilities.topk(min(top_k or len(logits), len(logits))).values.sum()
    assert probabilities[likelier].sum() < top_p * kept + 1e-5


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 2, 0.55), (1.0, 2, 0.65), (0.5, 4, 0.7), (2.0, 9, 0.5)]
)
def test_top_p_is_taken_of_what_top_k_left_as_in_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([0.3, 0.2, 0.12, 0.11, 0.1, 0.09, 0.08]).log()
    scores = logits[None]
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        scores = warper(None, scores)
    generator, sampling = torch.Generator().manual_seed(0), Sampling(temperature, top_k, top_p)
    drawn = {sampling.draw(logits, generator) for _ in range(300)}
    assert drawn == set(scores[0].isfinite().nonzero()[:, 0].tolist())


def test_top_k_one_is_greedy_and_so_is_a_temperature_next_to_none():
    logits = torch.tensor([0.1, 2.0, 1.9])
    assert all(Sampling(5.0, 1).draw(logits, torch.Generator().manual_seed(s)) == 1 for s in range(9))
    assert Sampling(1e-300).draw(logits, torch.Generator()) == 1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
        Sampling(**wrong)


def test_prompts_that_do_not_fit_are_refused(gpt):
    for prompt, told in (([], "empty"), ([1] * 24, "24 tokens")):
        with pytest.raises(UsageError, match=told):
            next(generate_tokens(gpt, prompt, 1))


class Letters:
    """A stream whose tokens are the texts themselves."""

    def push(self, token: str) -> str:
        return token

    def finish(self) -> str:
        return ""


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_the_text_ends_before_the_first_stop(pieces, stops):
    written = ""
    for piece in pieces:
        written += piece
        if found := [written.index(stop) for stop in stops if stop in written]:
            written = written[: min(found)]
            break
    assert "".join(until(Letters(), pieces, stops)) == written
