"""The four rankings against plain computations, and what they refuse."""

import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, saved_model, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litfreeze.checkpoint.checkpoint import InMemory
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.choose.rank import Ranking, _beaten, rank, signal_to_noise, singular_values
from litfreeze.choose.words import METHODS, NEED_DATA
from litfreeze.data.batches import build_batch
from litfreeze.data.shelf import IGNORE, Sample
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import RunError, UsageError
from litfreeze.freeze.plan import block_of
from litfreeze.lora import LoRA, fresh_tensors, linear_layers

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def samples(vocab_size: int, seed: int = 0) -> list[Sample]:
    """Nine, of different lengths, whose first tokens are a prompt."""
    draw = np.random.default_rng(seed)
    made = []
    for length in draw.integers(4, 20, 9):
        tokens = draw.integers(0, vocab_size, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORE, tokens).astype(np.int32)
        made.append(Sample(tokens, labels, "made", (length // 2, length)))
    return made


def batches(of: list[Sample], packed: bool = True) -> list:
    return [build_batch(of, list(range(start, min(start + 4, len(of)))), packed, share=False) for start in (0, 4, 8)]


def plain_ratio(weight: np.ndarray) -> float:
    """Spectrum's ratio, as its paper has it."""
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    sigma = (np.quantile(values, 0.75) - np.quantile(values, 0.25)) / 1.349
    edge = sigma * math.sqrt((1 + math.sqrt(min(weight.shape) / max(weight.shape))) ** 2)
    noise = values[values <= edge].sum() if (values <= edge).any() else 1.0
    return values[values > edge].sum() / noise / values.max()


def changed(checkpoint, weights):
    """The checkpoint with other `weights`, in memory."""
    tensors = InMemory({name: checkpoint.read(name) for name in checkpoint.layout()} | weights)
    return replace(checkpoint, tensors=tensors, dtypes={name: tensor.dtype for name, tensor in tensors.items()})


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3)
@given(data=st.data(), seed=st.integers(0, 99), method=st.sampled_from(METHODS), dtype=st.sampled_from(["f", "b"]))
def test_every_family_is_ranked_twice_alike(family, data, seed, method, dtype):
    with saved_model(data.draw(FAMILIES[family]), seed) as (path, model):
        if dtype == "b":
            model.to(torch.bfloat16).save_pretrained(path)
        checkpoint = open_checkpoint(path)
        given = batches(samples(checkpoint.config.vocab_size)) if method in NEED_DATA else None
        first, second = (rank(checkpoint, method, seed, CPU, given) for _ in range(2))
    assert first == second
    assert len(first.scores) == checkpoint.config.n_layer and all(map(math.isfinite, first.scores))
    assert sorted(first.order) == list(range(checkpoint.config.n_layer))
    assert all(len(values) == checkpoint.config.n_layer for values in first.modules.values())


# --- spectrum ---


def test_spectrum_is_the_plain_computation():
    with saved_model(LLAMA) as (path, model):
        ranking = rank(open_checkpoint(path), "spectrum", 0, CPU)
        layers = [dict(layer.named_parameters()) for layer in model.model.layers]
    ours = {"attn.q_proj": "self_attn.q_proj", "mlp.down_proj": "mlp.down_proj"}
    for kind, theirs in ours.items():
        expected = [plain_ratio(layer[f"{theirs}.weight"].detach().numpy()) for layer in layers]
        assert ranking.modules[kind] == pytest.approx(expected, rel=1e-5)
    assert len(ranking.modules) == 7
    places = [np.argsort(np.argsort(values)) / (len(values) - 1) for values in ranking.modules.values()]
    assert ranking.scores == pytest.approx(np.mean(places, axis=0).tolist())
    assert np.mean(ranking.scores) == pytest.approx(0.5)


def test_equal_blocks_score_alike_and_one_ratio_does_not_decide():
    assert [_beaten([2.0, 2.0, 2.0], i) for i in range(3)] == [0.5, 0.5, 0.5]
    assert [_beaten([1.0, 900.0, 2.0], i) for i in range(3)] == [0, 1, 0.5]
    assert _beaten([1.0], 0) == 0


@settings(max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 999))
def test_singular_values_are_those_of_numpy(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    found = singular_values(weight, CPU).numpy()
    assert np.abs(found - expected).max() <= 1e-7 * expected.max()


def test_more_rows_than_a_slice_are_summed_all():
    weight = torch.randn(2500, 8, generator=torch.Generator().manual_seed(0))
    for matrix in (weight, weight.T):
        assert torch.allclose(singular_values(matrix, CPU), torch.linalg.svdvals(weight.double()))


def test_of_equally_noisy_blocks_with_equally_strong_signals_the_one_with_most_of_them_ranks_first():
    wide = LLAMA | {"hidden_size": 96, "intermediate_size": 96, "num_key_value_heads": 3}
    with saved_model(wide) as (path, _):
        checkpoint = open_checkpoint(path)
        draw = torch.Generator().manual_seed(0)
        weights = {}
        for name, (rows, columns) in linear_layers(checkpoint.config).items():
            signals = 12 if block_of(name) == 2 else 2
            u, v = (torch.linalg.qr(torch.randn(n, signals, generator=draw))[0] for n in (rows, columns))
            weights[f"{name}.weight"] = 0.02 * torch.randn(rows, columns, generator=draw) + 4 * u @ v.T
        ranking = rank(changed(checkpoint, weights), "spectrum", 0, CPU)
    assert ranking.best(1) == [2]
    for ratios in ranking.modules.values():
        assert ratios[2] == max(ratios)


def test_where_all_stands_out_the_noise_is_one_as_its_authors_have_it():
    values = torch.tensor([5.0, 4.9, 4.8, 4.7], dtype=torch.float64)
    assert signal_to_noise(values, (4, 400)) == pytest.approx(values.sum().item() / 5)


def test_weights_without_noise_and_without_anything_have_a_ratio_too():
    assert signal_to_noise(torch.zeros(8, dtype=torch.float64), (8, 8)) == 0
    one = torch.tensor([3.0] + 7 * [0.0], dtype=torch.float64)
    assert math.isfinite(signal_to_noise(one, (8, 8))) and signal_to_noise(one, (8, 8)) > 1e3


def test_one_weight_at_a_time_is_in_memory():
    with saved_model(LLAMA) as (path, _):
        checkpoint = open_checkpoint(path)
        made, most = [], 0

        class Counted(dict):
            def __getitem__(self, name):
                nonlocal most
                tensor = super().__getitem__(name).clone()
                made.append(weakref.ref(tensor))
                most = max(most, sum(one() is not None for one in made))
                return tensor

        whole = Counted({name: checkpoint.read(name) for name in checkpoint.layout()})
        rank(replace(checkpoint, tensors=whole), "spectrum", 0, CPU)
    assert len(made) == 28 and most <= 2  # the last one goes as the next one comes


# --- gradient and angular ---


@pytest.mark.parametrize("packed", [True, False])
def test_gradient_is_autograd_of_a_plain_loop(packed):
    given = samples(61)
    with saved_model(LLAMA) as (path, model):
        ranking = rank(open_checkpoint(path), "gradient", 0, CPU, batches(given, packed))
    expected, q_proj = np.zeros(4), np.zeros(4)
    for start in (0, 4, 8):
        model.zero_grad()
        total, count = 0, 0
        for sample in given[start : start + 4]:
            logits = model(torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0, :-1]
            labels = torch.from_numpy(sample.labels[1:].astype(np.int64))
            total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
            count += int((labels != IGNORE).sum())
        (total / count).backward()
        for i, layer in enumerate(model.model.layers):
            squares = [(p.grad.square().sum().item(), p.square().sum().item()) for p in layer.parameters()]
            expected[i] += math.sqrt(sum(g for g, _ in squares) / sum(w for _, w in squares)) / 3
            q = layer.self_attn.q_proj.weight
            q_proj[i] += (q.grad.norm() / q.norm()).item() / 3
    assert ranking.scores == pytest.approx(expected.tolist(), rel=1e-4)
    assert ranking.modules["attn.q_proj"] == pytest.approx(q_proj.tolist(), rel=1e-4)
    assert ranking.settings == {
        "records": 9,
        "tokens": sum(len(s.tokens) - 1 for s in given),
        "micro_batches": 3,
        "seed": 0,
    }


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_angular_is_the_cosine_between_what_enters_and_what_leaves(packed):
    given = samples(61)
    with saved_model(LLAMA) as (path, model):
        ranking = rank(open_checkpoint(path), "angular", 0, CPU, batches(given, packed))
    cosines = [[] for _ in range(4)]
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, inputs, output, i=i: cosines[i].append(
                F.cosine_similarity(inputs[0], output[0] if isinstance(output, tuple) else output, dim=-1).flatten()
            )
        )
    for sample in given:
        model(torch.from_numpy(sample.tokens[:-1].astype(np.int64))[None])
    expected = [1 - torch.cat(found).mean().item() for found in cosines]
    assert ranking.scores == pytest.approx(expected, rel=1e-4)


def test_bf16_weights_rank_as_they_would_in_fp32():
    with saved_model(LLAMA) as (path, model):
        model.to(torch.bfloat16).save_pretrained(path)
        stored = open_checkpoint(path)
        same = changed(stored, {name: stored.read(name).float() for name in stored.layout()})
        for method in NEED_DATA:
            one, other = (rank(checkpoint, method, 0, CPU, batches(samples(61))) for checkpoint in (stored, same))
            assert stored.dtype("embed.weight") == torch.bfloat16
            assert one.scores == pytest.approx(other.scores, rel=1e-3)


# --- the rest ---


def test_random_is_drawn_from_the_seed():
    demo = open_checkpoint(MODEL_DIR)
    orders = [rank(demo, "random", seed, CPU).order for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_of_equals_the_lower_block_comes_first():
    assert Ranking("random", {}, [1.0, 2.0, 2.0, 0.0]).order == [1, 2, 0, 3]


def test_a_tied_and_an_untied_head_rank_alike():
    demo = open_checkpoint(MODEL_DIR)
    given = batches(samples(demo.config.vocab_size))
    for method in ("spectrum", *NEED_DATA):
        assert rank(demo, method, 0, CPU, given).scores == rank(demo.untied(), method, 0, CPU, given).scores


def test_what_was_trained_over_its_base_is_what_is_ranked():
    demo = open_checkpoint(MODEL_DIR)
    other = {name: torch.randn(demo.read(name).shape) for name in demo.layout() if block_of(name) == 5}
    dtypes = {name: tensor.dtype for name, tensor in other.items()}
    delta = replace(demo, tensors=InMemory(other), dtypes=dtypes, base=demo)
    for method in ("spectrum", "angular"):
        given = batches(samples(demo.config.vocab_size)) if method in NEED_DATA else None
        before, after = (rank(one, method, 0, CPU, given) for one in (demo, delta))
        assert before.scores[5] != after.scores[5]


@pytest.mark.parametrize("method", NEED_DATA)
def test_a_method_that_needs_data_says_so(method):
    with pytest.raises(UsageError, match=f"{method} .*spectrum and random need none"):
        rank(open_checkpoint(MODEL_DIR), method, 0, CPU)


def test_an_adapter_and_an_unknown_method_are_refused():
    demo = open_checkpoint(MODEL_DIR)
    lora = LoRA({"blocks.0.attn.q_proj": 2}, {"blocks.0.attn.q_proj": 4.0})
    weight = demo.read("blocks.0.attn.q_proj.weight")
    adapter = demo.with_lora(lora, fresh_tensors(lora, {"blocks.0.attn.q_proj": weight.shape}, demo.read, 0))
    with pytest.raises(UsageError, match=r"is an adapter.*litfreeze merge_lora"):
        rank(adapter, "spectrum", 0, CPU)
    with pytest.raises(UsageError, match="Did you mean 'spectrum'"):
        rank(demo, "spectrm", 0, CPU)


def test_weights_that_are_not_finite_are_named(tmp_path):
    with saved_model(LLAMA) as (path, _):
        weights = load_file(path / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        write_json(tmp_path / "config.json", LLAMA)
    broken = open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"blocks\.1\.mlp\.up_proj\.weight holds values that are NaN"):
        rank(broken, "spectrum", 0, CPU)
    for method in NEED_DATA:
        with pytest.raises(RunError, match="not finite"):
            rank(broken, method, 0, CPU, batches(samples(61)))


def test_the_json_has_every_figure():
    ranking = rank(open_checkpoint(MODEL_DIR), "spectrum", 0, CPU)
    read = json.loads(ranking.to_json(checkpoint="here"))
    assert (read["checkpoint"], read["method"]) == ("here", "spectrum")
    assert read["scores"] == ranking.scores and read["order"] == ranking.order and read["modules"] == ranking.modules
