"""Merging: merged logits are those of base and adapter; nothing else moves; what rounding did is told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, random_tokens, saved_model
from hypothesis import given, settings
from hypothesis import strategies as st

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.merge import FoldedTensors, fold
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_over_base
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.freeze.words import adapter_targets, weights_in_full
from litfreeze.lora import LoRA, fresh_tensors, is_lora, linear_layers
from litfreeze.scripts.merge import merge_lora


def adapted(
    base: Checkpoint, seed: int = 0, r: int = 3, targets: str = "all", layers="all", full=None, **more
) -> Checkpoint:
    """`base` with an adapter that does something, and blocks `full` moved."""
    named = adapter_targets(base.config, layers, targets)
    lora = LoRA(dict.fromkeys(named, r), dict.fromkeys(named, 5.0), **more)
    tied = base.config.tie_embeddings
    read = lambda module: base.read("embed.weight" if tied and module == "head" else f"{module}.weight")  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in fresh_tensors(lora, linear_layers(base.config), read, seed).items()
    }
    for name in sorted(weights_in_full(base.config, full, None)):
        weight = base.read(name).float()
        tensors[name] = (weight + 0.02 * torch.randn(weight.shape, generator=generator)).to(base.dtype(name))
    return base.with_lora(lora, tensors)


def saved(checkpoint: Checkpoint, path: Path) -> Path:
    write_over_base(path, checkpoint, checkpoint.tensors, checkpoint.dtype, checkpoint.read, {"kind": "lora"})
    return path


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = load_model(checkpoint, lambda _: torch.float32)
    return model(random_tokens(checkpoint.config.vocab_size, 2, 20))


@given(st.data())
@settings(max_examples=12)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_logits_are_those_of_base_and_adapter(family, data):
    more = {"dora": data.draw(st.booleans()), "rslora": data.draw(st.booleans())}
    targets = data.draw(st.sampled_from(["all", "q_proj,v_proj", "mlp,head", "head"]))
    with saved_model(data.draw(FAMILIES[family]), data.draw(st.integers(0, 99))) as (path, _):
        base = open_checkpoint(path)
        checkpoint = adapted(base, targets=targets, r=data.draw(st.integers(1, 5)), **more)
        expected, merged = logits(checkpoint), fold([checkpoint])
        scale = max(1.0, expected.abs().max().item())
        assert (logits(merged) - expected).abs().max().item() <= 3e-4 * scale  # Gemma's norms make more of a rounding
        assert not torch.allclose(expected, logits(base), atol=1e-3)
        assert merged.config.tie_embeddings == (base.config.tie_embeddings and "head" not in checkpoint.lora.ranks)
        assert merged.lora is None and merged.base is None


@pytest.mark.parametrize("more", [{}, {"dora": True}, {"rslora": True}, {"full": "2,3", "layers": "0-1"}])
def test_merge_lora_writes_a_checkpoint_of_its_own(tmp_path, capsys, more):
    base = open_checkpoint(MODEL_DIR)
    adapter = saved(adapted(base, **more), tmp_path / "adapter")
    merge_lora(str(adapter), dtype="float32")
    exact = open_checkpoint(tmp_path / "adapter-merged")
    opened = open_checkpoint(adapter)
    torch.testing.assert_close(logits(exact), logits(opened), rtol=1e-5, atol=1e-5)
    merge_lora(str(adapter), tmp_path / "rounded")
    told = capsys.readouterr().out
    assert "Rounding  to bfloat16 left a relative error of" in told and "--dtype float32 keeps all of it" in told
    rounded = open_checkpoint(tmp_path / "rounded")
    touched = {f"{module}.weight" for module in opened.lora.ranks} | set(opened.replaced)
    for name in rounded.layout():
        if name in touched:  # one rounding of the exact sum
            assert torch.equal(rounded.read(name), exact.read(name).bfloat16())
        else:
            assert torch.equal(rounded.read(name), base.read(name))
    assert rounded.hf_config["torch_dtype"] == "bfloat16" and exact.hf_config["torch_dtype"] == "float32"


def test_the_rounding_that_is_told_is_the_rounding_that_happened(tmp_path):
    base = open_checkpoint(MODEL_DIR)
    checkpoint = adapted(base, targets="q_proj,down_proj")
    merged, exact = fold([checkpoint]), fold([checkpoint], dtype=torch.float32)
    touched = [f"{module}.weight" for module in checkpoint.lora.ranks]
    before, after, full = (
        torch.cat([c.read(name).float().flatten() for name in touched]).double() for c in (base, merged, exact)
    )
    rounding = merged.tensors.rounding
    assert rounding.error == pytest.approx(((after - full).norm() / (full - before).norm()).item(), rel=1e-5)
    assert rounding.moving == (full != before).sum() and rounding.stuck == ((full != before) & (after == before)).sum()
    assert exact.tensors.rounding.error == 0 and 0 < rounding.stuck_share < 0.5


def test_half_an_adapter_and_sums_of_adapters(tmp_path):
    base = open_checkpoint(MODEL_DIR)
    one = saved(adapted(base, 1, dora=True), tmp_path / "one")
    two = saved(adapted(base, 2, r=2, targets="attn", layers="0-5", full="11"), tmp_path / "two")
    merge_lora(str(one), tmp_path / "half", scale=0.5, dtype="float32")
    merge_lora(f"{one},{two}", tmp_path / "both", weights="0.7,0.3", dtype="float32")
    alone = {path: fold([open_checkpoint(path)], dtype=torch.float32) for path in (one, two)}
    half, both = open_checkpoint(tmp_path / "half"), open_checkpoint(tmp_path / "both")
    for name in base.layout():
        w = base.read(name).float()
        d1, d2 = (alone[path].read(name) - w for path in (one, two))
        torch.testing.assert_close(half.read(name), w + 0.5 * d1, rtol=0, atol=1e-6)
        torch.testing.assert_close(both.read(name), w + 0.7 * d1 + 0.3 * d2, rtol=0, atol=1e-6)


def test_an_adapted_tied_head_is_untied_by_merging(tmp_path, capsys):
    base = open_checkpoint(MODEL_DIR)
    adapter = saved(adapted(base, targets="head,q_proj"), tmp_path / "adapter")
    merge_lora(str(adapter), dtype="float32")
    merged = open_checkpoint(tmp_path / "adapter-merged")
    assert "no longer tied" in capsys.readouterr().out and merged.hf_config["tie_word_embeddings"] is False
    assert torch.equal(merged.read("embed.weight"), base.read("embed.weight").float())
    torch.testing.assert_close(logits(merged), logits(open_checkpoint(adapter)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"checkpoint_dir": "{one},{one}"}, "say how much of each"),
        ({"checkpoint_dir": "{one}", "weights": "1,2"}, "--weights gives 2 for 1"),
        ({"checkpoint_dir": "{one}", "weights": "much"}, "are no numbers"),
        ({"checkpoint_dir": "{one}", "scale": float("nan")}, "plain numbers"),
        ({"checkpoint_dir": "{one},"}, "empty part"),
        ({"checkpoint_dir": "{base}"}, "is a whole model"),
        ({"checkpoint_dir": "nowhere"}, "is no directory"),
        ({"checkpoint_dir": "{one}", "out_dir": "{base}"}, "is not empty"),
        ({}, "holds no run of finetune lora"),
    ],
)
def test_what_cannot_be_merged_is_told(tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    one = saved(adapted(open_checkpoint(MODEL_DIR)), tmp_path / "one")
    names = {"one": one, "base": MODEL_DIR}
    options = {k: v.format(**names) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UsageError, match=told):
        merge_lora(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]  # nothing half written


def test_an_interrupted_merge_leaves_nothing(tmp_path, monkeypatch):
    one = saved(adapted(open_checkpoint(MODEL_DIR)), tmp_path / "one")
    plain, read = FoldedTensors.__getitem__, []

    def interrupted(self, name):
        read.append(name)
        if len(read) == 40:
            raise KeyboardInterrupt
        return plain(self, name)

    monkeypatch.setattr(FoldedTensors, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(str(one))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_adapters_of_different_bases_do_not_mix(tmp_path):
    base = open_checkpoint(MODEL_DIR)
    one = saved(adapted(base), tmp_path / "one")
    merge_lora(str(one), tmp_path / "merged")
    two = saved(adapted(open_checkpoint(tmp_path / "merged")), tmp_path / "two")
    with pytest.raises(UsageError, match="another base"):
        merge_lora([str(one), str(two)], weights=[1.0, 1.0])


def test_the_adapters_own_tensors_are_stored_as_they_trained(tmp_path):
    checkpoint = adapted(open_checkpoint(MODEL_DIR))
    opened = open_checkpoint(saved(checkpoint, tmp_path / "adapter"))
    assert opened.lora == checkpoint.lora
    assert all(torch.equal(opened.read(name), checkpoint.read(name)) for name in checkpoint.tensors if is_lora(name))
    assert {opened.dtype(name) for name in opened.tensors} == {torch.float32}
    assert opened.weights_hash == open_checkpoint(tmp_path / "adapter").weights_hash
    assert replace(opened.lora, dropout=0.5) != opened.lora


def test_what_is_made_in_memory_has_the_hash_of_what_it_is(tmp_path):
    checkpoint = adapted(open_checkpoint(MODEL_DIR))
    opened = open_checkpoint(saved(checkpoint, tmp_path / "adapter"))
    assert checkpoint.weights_hash == opened.weights_hash != open_checkpoint(MODEL_DIR).weights_hash
    merge_lora(str(opened.path))
    assert fold([opened]).weights_hash == open_checkpoint(tmp_path / "adapter-merged").weights_hash
