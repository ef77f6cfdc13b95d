"""What comes out of the frozen blocks: the same rows whoever makes them and when, under a key that names all they
depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from litfreeze.attention import Dense
from litfreeze.checkpoint.tensors import sha256
from litfreeze.config import Config
from litfreeze.data.batches import build_batch
from litfreeze.data.shelf import Sample
from litfreeze.model import GPT
from litfreeze.precision import PRECISIONS
from litfreeze.prefix import prefix as prefix_module
from litfreeze.prefix.prefix import Prefix, prefix_key, prefix_names
from litfreeze.prefix.store import ActivationStore
from litfreeze.presets import PRESETS

CONFIG = Config.from_hf({**PRESETS["demo"], "num_hidden_layers": 4, "vocab_size": 97, "tie_word_embeddings": False})
STOP = 2
CPU = torch.device("cpu")


def sample(tokens) -> Sample:
    tokens = np.array(tokens, np.int32)
    return Sample(tokens, tokens, "x:1", (len(tokens) - 1, len(tokens)))


def some_samples() -> list[Sample]:
    """Nine of 12 to 20 tokens; each three begin alike, and learn only at their end."""
    words = np.random.default_rng(0)
    samples = []
    for i in range(9):
        begin = np.random.default_rng(i // 3).integers(0, 97, 10)
        tokens = np.concatenate([begin, words.integers(0, 97, 2 + i)]).astype(np.int32)
        labels = np.where(np.arange(len(tokens)) >= 11, tokens, -100)
        samples.append(Sample(tokens, labels, f"x:{i}", (11, len(tokens))))
    return samples


SAMPLES = some_samples()


@pytest.fixture
def gpt() -> GPT:
    model = GPT(CONFIG, stream=torch.float32)
    model.init_weights(seed=3)
    return model.requires_grad_(False)


def a_prefix(gpt: GPT, root=None, stop: int = STOP, **more) -> Prefix:
    weights = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
    store = ActivationStore(root, "key", CONFIG.n_embd, torch.float32)
    return Prefix(gpt, stop, store, SAMPLES, weights.__getitem__, torch.no_grad, **more)


def rows_of(prefix: Prefix) -> list[torch.Tensor]:
    """What the prefix gives for each record."""
    return [prefix.stream(build_batch(SAMPLES, [i]), SAMPLES) for i in range(len(SAMPLES))]


def plain_rows(gpt: GPT, stop: int = STOP) -> list[torch.Tensor]:
    found = []
    for s in SAMPLES:
        tokens = torch.tensor(s.tokens[:-1]).long()[None]
        x = gpt.embed_tokens(tokens, gpt.positions(tokens))
        found.append(gpt.run_blocks(x, gpt.positions(tokens), Dense(), 0, stop)[0])
    return found


def close(found, expected) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


def same_bits(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, STOP, CONFIG.n_layer])
def test_the_rows_are_the_models_and_its_weights_go(gpt, stop):
    expected = plain_rows(gpt, stop)
    prefix = a_prefix(gpt, stop=stop)
    prefix.fill(SAMPLES)
    empty = {name for name, parameter in gpt.named_parameters() if parameter.numel() == 0}
    assert empty == set(prefix_names(dict(gpt.named_parameters()), stop))
    assert close(rows_of(prefix), expected)
    prefix.restore()
    assert same_bits(plain_rows(gpt, stop), expected)


def test_a_batch_gets_the_rows_of_its_samples_wherever_they_stand(gpt):
    prefix = a_prefix(gpt)
    prefix.fill(SAMPLES)
    rows = rows_of(prefix)
    stream = build_batch(SAMPLES, [8, 2, 1, 0])
    assert len(stream.tokens) < sum(len(SAMPLES[i].tokens) - 1 for i in (8, 2, 1, 0))  # something is shared
    found = prefix.stream(stream, SAMPLES)
    for row, i, start, stop in stream.places:
        assert torch.equal(found[row : row + stop - start], rows[i][start:stop])
    padded = prefix.stream(build_batch(SAMPLES, [0, 8], packed=False), SAMPLES)  # (2, T, C)
    assert torch.equal(padded[0, : len(rows[0])], rows[0]) and torch.equal(padded[1], rows[8])


@pytest.mark.parametrize("streamed", [False, True])
def test_they_have_the_same_bits_whoever_is_needed_first(gpt, tmp_path, monkeypatch, streamed):
    """So that an interrupted run, which needs them in another order when it goes on, ends as its twin."""
    monkeypatch.setattr(prefix_module, "AT_ONCE", 40)  # two to four in a group
    whole = a_prefix(gpt)
    whole.fill(SAMPLES)
    expected = rows_of(whole)
    whole.restore()
    for order in (range(9), range(8, -1, -1), [4]):
        prefix = a_prefix(gpt, streamed=streamed)
        for i in order:
            prefix.fill([SAMPLES[i]])
        assert len(prefix.unknown) == 0 if len(order) > 1 else 0 < len(prefix.unknown) < 8
        assert all(torch.equal(prefix.stream(build_batch(SAMPLES, [i]), SAMPLES), expected[i]) for i in order)
        prefix.restore()


def test_a_group_is_written_as_a_whole(gpt, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_module, "AT_ONCE", 40)
    monkeypatch.setattr("litfreeze.prefix.store.SHARD", 1)  # bytes: everything is enough for a file
    prefix = a_prefix(gpt, tmp_path)
    for s in SAMPLES:
        prefix.fill([s])
    files = list((tmp_path / "key").glob("*.safetensors"))
    assert len(files) == len(prefix.groups) > 1


def test_it_goes_block_by_block_to_the_same_bits(gpt):
    """One block in memory at a time, and in the end none."""
    whole = a_prefix(gpt)
    whole.fill(SAMPLES)
    expected = rows_of(whole)
    whole.restore()
    prefix = a_prefix(gpt, streamed=True)
    prefix._let_go(prefix.names)
    prefix.fill_all(0, 1, lambda: None)
    assert same_bits(rows_of(prefix), expected)
    assert all(parameter.numel() == 0 for name, parameter in gpt.named_parameters() if name in prefix.names)


def test_processes_share_the_work(gpt, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_module, "AT_ONCE", 40)
    ranks = [a_prefix(gpt, tmp_path, together=True) for _ in range(2)]
    expected = plain_rows(gpt)
    ranks[0].fill_all(0, 2, lambda: None)
    assert 0 < len(ranks[0].unknown) < 9
    ranks[1].fill_all(1, 2, lambda: None)
    for prefix in ranks:
        monkeypatch.setattr(prefix, "_make", None)  # there is nothing left to do
        prefix.fill(SAMPLES)
        assert not prefix.unknown and close(rows_of(prefix), expected)


def test_without_room_they_are_made_every_time(gpt, tmp_path):
    prefix = a_prefix(gpt, tmp_path)
    expected = plain_rows(gpt)
    prefix.fill(SAMPLES[:1])
    prefix.store.full = "no room"
    prefix.store._pending.clear()
    assert close(rows_of(prefix), expected)


def test_what_was_damaged_is_made_again(gpt, tmp_path):
    first = a_prefix(gpt, tmp_path)
    expected = plain_rows(gpt)
    first.fill(SAMPLES)
    first.store.close()
    first.restore()
    second = a_prefix(gpt, tmp_path)
    assert not second.unknown
    file = next((tmp_path / "key").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    for at in range(1, len(data) // 2, 1000):  # from the end, where the rows are
        data[-at] ^= 1
    file.write_bytes(data)
    second.fill(SAMPLES)
    assert close(rows_of(second), expected)


# --- the key ----------------------------------------------------------------------------------------------------------


def key(
    config=CONFIG, stop=STOP, weights=None, precision="32-true", device=CPU, dtype=torch.float32, scales=None
) -> str:
    hashes = {name: sha256(weight, weight.dtype) for name, weight in (weights or some_weights()).items()}
    return prefix_key(config, stop, hashes, PRECISIONS[precision], device, dtype, scales or {})


def some_weights() -> dict[str, torch.Tensor]:
    gpt = GPT(CONFIG)
    gpt.init_weights(seed=3)
    weights = {name: parameter.detach() for name, parameter in gpt.named_parameters()}
    return {name: weights[name] for name in prefix_names(weights, STOP)}


def one_bit() -> dict[str, torch.Tensor]:
    weights = some_weights()
    weights["blocks.1.mlp.down_proj.weight"].view(torch.int32)[0, 0] ^= 1
    return weights


def exchanged() -> dict[str, torch.Tensor]:
    weights = some_weights()
    a, b = "blocks.0.mlp.up_proj.weight", "blocks.0.mlp.gate_proj.weight"
    return weights | {a: weights[b], b: weights[a]}


CHANGES = {
    "one bit of a weight": {"weights": one_bit()},
    "two weights exchanged": {"weights": exchanged()},
    "a block more": {"stop": STOP + 1},
    "precision": {"precision": "bf16-mixed"},
    "true bf16": {"precision": "bf16-true"},
    "dtype of the rows": {"dtype": torch.bfloat16},
    "device": {"device": torch.device("cuda")},
    "epsilon": {"config": replace(CONFIG, norm_eps=1e-6)},
    "rotation": {"config": replace(CONFIG, rope=replace(CONFIG.rope, theta=500.0))},
    "window": {"config": replace(CONFIG, windows=(3, None, None, None))},
    "an adapter": {"scales": {"blocks.0.attn.q_proj": 2.0}},
    "its scale": {"scales": {"blocks.0.attn.q_proj": 1.0}},
    "activation": {"config": replace(CONFIG, activation="gelu")},
    "order of the heads": {"config": replace(CONFIG, n_head=8, head_size=16)},
}


def test_whatever_decides_the_rows_is_in_the_key():
    keys = {name: key(**change) for name, change in CHANGES.items()}
    assert len({key(), *keys.values()}) == len(keys) + 1


def test_another_torch_or_format_has_another_key(monkeypatch):
    before = key()
    monkeypatch.setattr(torch, "__version__", "2.99")
    other = key()
    monkeypatch.setattr(prefix_module, "FORMAT", 99)
    assert len({before, other, key()}) == 3


def test_the_same_has_the_same_key_and_what_stands_above_is_not_in_it():
    weights = some_weights()
    assert key(weights=dict(reversed(weights.items()))) == key()
    assert not [name for name in weights if name.startswith(("blocks.2.", "blocks.3.", "final_norm.", "head."))]
    assert {"embed.weight", "blocks.0.norm_1.weight", "blocks.1.mlp.up_proj.weight"} <= set(weights)


def test_a_record_is_known_by_the_tokens_that_are_read():
    record = sample([5, 6, 7, 8])
    assert record.digest == sample([5, 6, 7, 9]).digest  # the last token is only a target
    others = [[5, 6, 8, 8], [6, 5, 7, 8], [5, 6, 7], [5, 6, 7, 8, 8], [5, 6, 7 + 256, 8]]
    assert len({record.digest, *(sample(tokens).digest for tokens in others)}) == 6
