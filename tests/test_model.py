"""The model against transformers': the same config.json and weights give the same logits, in every family."""

from copy import deepcopy

import pytest
import torch
from families import BLOCK_SIZE, FAMILIES, llama_like, random_tokens, rope, saved_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from litfreeze.attention import Dense, KVCache
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.config import Config
from litfreeze.fields import RoPE
from litfreeze.generate.sample import generate_tokens
from litfreeze.model import GPT, rotary_angles, rotary_frequencies

TOLERANCE = 1e-4  # largest difference between two logits, in fp32

TINY = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TOKENS = torch.arange(10)[None]

every_family = pytest.mark.parametrize("family", FAMILIES)
seeds = st.integers(0, 2**16)


def load(path, dtype=None):
    checkpoint = open_checkpoint(path)
    return load_model(checkpoint, checkpoint.dtype if dtype is None else lambda _: dtype)


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@every_family
@settings(max_examples=12)
@given(data=st.data(), seed=seeds, spelled_anew=st.booleans())
@torch.no_grad()
def test_logits_are_those_of_transformers(family, data, seed, spelled_anew):
    fields = data.draw(FAMILIES[family])
    tokens = random_tokens(fields["vocab_size"], batch=2, length=data.draw(st.integers(1, BLOCK_SIZE)), seed=seed)
    with saved_model(fields, seed, spelled_anew) as (path, reference):
        assert largest_difference(load(path)(tokens), reference(tokens).logits) < TOLERANCE


@settings(max_examples=300)
@given(fields=llama_like("llama", rope()))
def test_positions_turn_by_the_angles_of_transformers(fields):
    """The rotary part alone, so cheap that every corner of the stretching is drawn."""
    config = AutoConfig.for_model(**deepcopy(fields))
    positions = torch.arange(BLOCK_SIZE)
    theirs = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    ours = rotary_angles(Config.from_hf(fields).rope, positions, torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        assert largest_difference(one[:, 0], other[0]) < 1e-5


@every_family
@settings(max_examples=3)
@given(data=st.data(), seed=seeds, cuts=st.sets(st.integers(1, 23), max_size=5))
@torch.no_grad()
def test_in_chunks_over_a_cache_and_in_ranges_of_blocks_it_computes_the_same(family, data, seed, cuts):
    fields = data.draw(FAMILIES[family])
    tokens = random_tokens(fields["vocab_size"], batch=2, length=24, seed=seed)
    with saved_model(fields, seed) as (path, _):
        model = load(path)
    n_layer = model.config.n_layer
    middle = data.draw(st.integers(0, n_layer))

    positions = model.positions(tokens)
    x = model.run_blocks(model.embed_tokens(tokens, positions), positions, Dense(), 0, middle)
    x = model.run_blocks(x, positions, Dense(), middle, n_layer)
    whole = model(tokens)
    assert torch.equal(model.logits(x), whole)

    cache = KVCache(model.config, batch=2, capacity=24, device="cpu", dtype=torch.float32)
    ends = [*sorted(cuts), 24]
    for start, end in zip([0, *ends], ends, strict=False):
        chunk = tokens[:, start:end]
        positions = model.positions(chunk, cache)
        x = model.run_blocks(model.embed_tokens(chunk, positions), positions, cache, 0, middle)
        x = model.run_blocks(x, positions, cache, middle, n_layer)
        assert largest_difference(model.logits(x), whole[:, start:end]) < TOLERANCE


@every_family
@settings(max_examples=2)
@given(data=st.data())
@torch.no_grad()
def test_weights_keep_or_take_the_dtype_asked_for_and_the_head_stays_tied(family, data):
    fields = data.draw(FAMILIES[family])
    with saved_model(fields) as (path, reference):
        reference.to(torch.bfloat16).save_pretrained(path)
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        kept, widened = load(path), load(path, torch.float32)
        tokens = random_tokens(fields["vocab_size"], batch=1, length=5)
        assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
        assert kept(tokens).dtype == torch.bfloat16
        assert largest_difference(widened(tokens), reference(tokens).logits) < TOLERANCE
    assert (kept.head.weight is kept.embed.weight) == fields["tie_word_embeddings"]
    assert not any(p.requires_grad for p in kept.parameters())


@torch.no_grad()
def test_norm_weights_in_fp32_scale_a_bf16_stream():
    """Checkpoints with bf16 matrices and fp32 norms run in bf16."""
    model = GPT(Config.from_hf({**TINY, "torch_dtype": "bfloat16"})).to(torch.bfloat16)
    model.init_weights(0)
    plain = model(TOKENS)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
            assert "norm" in name
    assert torch.equal(model(TOKENS), plain)


def test_changing_a_loaded_weight_leaves_its_file_alone(tmp_path):
    with saved_model(TINY) as (path, _):
        before = (path / "model.safetensors").read_bytes()
        model = load(path)
        with torch.no_grad():
            model.embed.weight.zero_()
        assert (path / "model.safetensors").read_bytes() == before
        assert load(path).embed.weight.abs().sum() > 0


@torch.no_grad()
def test_initial_weights_follow_the_seed_alone():
    def weights(seed):
        torch.rand(seed)  # other draws are no matter
        model = GPT(Config.from_hf(TINY))
        model.init_weights(seed)
        return dict(model.named_parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert first["embed.weight"].std() == pytest.approx(0.02, rel=0.1)
    # the two that write to the residual stream are smaller by sqrt(2 n_layer) = 2
    assert first["blocks.0.mlp.down_proj.weight"].std() == pytest.approx(0.01, rel=0.1)


# --- a real model ----------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "Tell me about the rivers of France, from north to south."}]
TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair."
)


@torch.no_grad()
def test_smollm2_has_the_logits_and_the_answer_of_transformers(smollm2):
    checkpoint = open_checkpoint(smollm2)
    tokenizer = checkpoint.tokenizer()
    model = load(smollm2, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()

    tokens = torch.tensor([tokenizer.encode(TEXT)])
    assert largest_difference(model(tokens), reference(tokens).logits) < TOLERANCE

    prompt = tokenizer.encode(tokenizer.render_chat(QUESTION, add_generation_prompt=True))
    theirs = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, len(prompt) :].tolist()
    assert len(theirs) == 64, "the answer should be longer than what is compared"
    assert list(generate_tokens(model, prompt, max_new_tokens=64)) == theirs
    assert "Loire" in tokenizer.decode(theirs)


def test_frequencies_do_not_depend_on_the_default_dtype():
    """Fabric makes bf16 the default while a bf16-true forward runs."""
    rope = RoPE(16, 10000.0, "yarn", 4.0, 16)
    expected = rotary_frequencies(rope, torch.device("cpu"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(rotary_frequencies(rope, torch.device("cpu")), expected)
    finally:
        torch.set_default_dtype(torch.float32)
