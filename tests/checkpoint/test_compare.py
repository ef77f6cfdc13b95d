"""litfreeze diff: every change is found, nothing else is, and its size is what torch says it is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import saved_model
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from litfreeze.__main__ import main
from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.compare import STRETCH, compare, measure
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_checkpoint, write_over_base, write_peft
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.lora import LoRA, model_parameters
from litfreeze.scripts.diff import draw

FIELDS = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = list(model_parameters(Config.from_hf(FIELDS)))


def checkpoint(dtype=torch.float32, **fields):
    """A random model in memory."""
    hf_config = FIELDS | fields
    config = Config.from_hf(hf_config)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in model_parameters(config).items()}
    nowhere = Path("model")
    found = Checkpoint(
        path=nowhere, tokenizer_dir=nowhere, hf_config=hf_config, config=config, tensors=tensors, dtypes={}
    )
    return with_weights(found, {})


def with_weights(base, weights):
    tensors = dict(base.tensors) | weights
    return replace(base, tensors=tensors, dtypes={name: tensor.dtype for name, tensor in tensors.items()})


BASE = checkpoint()


def nudged(*names, by=0.5):
    """Weights of BASE, each changed in its last element."""
    weights = {name: BASE.read(name).clone() for name in names}
    for weight in weights.values():
        weight.view(-1)[-1] += by
    return weights


def states(comparison):
    return {name: change.state for name, change in comparison.changes.items()}


# --- one tensor ------------------------------------------------------------------------------------------------------


@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.data())
def test_the_figures_are_torchs(dtype_a, dtype_b, data):
    shape = data.draw(st.sampled_from([(1,), (7,), (5, 3), (1, 4)]))
    numbers = st.integers(-64, 64).map(lambda n: n / 16)  # exact in each of the dtypes
    values = data.draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))
    a = torch.tensor(values).view(shape).to(dtype_a)
    b = a.to(dtype_b).clone()
    for i in data.draw(st.sets(st.integers(0, a.numel() - 1))):
        b.view(-1)[i] += data.draw(numbers.filter(bool))
    change = measure(a, b)
    delta = b.double() - a.double()
    assert change.elements_changed == (delta != 0).sum()
    assert (change.tensors, change.elements) == (1, a.numel())
    assert change.largest == delta.abs().max()
    expected = (delta.norm() / a.double().norm()).item() if delta.any() else 0.0
    assert change.relative == pytest.approx(expected, rel=1e-12)
    same = "identical" if dtype_a == dtype_b else "equal values"
    assert change.state == ("changed" if delta.any() else same)


def test_a_tensor_of_many_pieces_and_of_any_strides():
    a = torch.randn(5, STRETCH + 3).T  # some 20 MB, as a transposed weight is read
    b = a.clone()
    b[-1, -1] += 1
    b[7, 2] -= 3
    change = measure(a, b)
    assert (change.elements, change.elements_changed) == (a.numel(), 2)
    assert change.largest == pytest.approx(3, rel=1e-6)
    assert change.relative == pytest.approx((b - a).norm().item() / a.double().norm().item(), rel=1e-6)


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=4), st.lists(st.integers(-8, 8), min_size=1, max_size=4))
def test_changes_add_up_to_the_change_of_both(first, second):
    a, b = torch.tensor([*first, *second]).float(), torch.zeros(len(first) + len(second))
    both, parts = measure(a, b), measure(a[: len(first)], b[: len(first)]) + measure(a[len(first) :], b[len(first) :])
    assert parts.relative == pytest.approx(both.relative)
    assert (parts.largest, parts.elements_changed, parts.state) == (both.largest, both.elements_changed, both.state)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "changed", "relative", "largest", "not_finite"),
    [
        ([0.0, 1], [-0.0, 1], 1, 0.0, 0.0, (0, 0)),  # other bits
        ([0.0, 0], [3.0, 4], 2, INF, 4.0, (0, 0)),
        ([NAN, INF, 1], [NAN, INF, 1], 0, 0.0, 0.0, (2, 2)),
        ([NAN, INF, 1], [NAN, INF, 3], 1, NAN, 2.0, (2, 2)),
        ([1.0, 2], [1, NAN], 1, NAN, NAN, (0, 1)),
        ([1.0, 2], [1, INF], 1, INF, INF, (0, 1)),
        ([1.0, INF], [1, 2], 1, NAN, INF, (1, 0)),
        ([3e38, 1], [-3e38, 1], 1, 2.0, 6e38, (0, 0)),  # further than fp32 reaches
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_nan_and_infinity(a, b, changed, relative, largest, not_finite, dtype):
    change = measure(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    assert (change.elements_changed, change.not_finite) == (changed, not_finite)
    assert change.relative == pytest.approx(relative, rel=1e-2, nan_ok=True)
    assert change.largest == pytest.approx(largest, rel=1e-2, nan_ok=True)
    json.dumps(change.to_dict(), allow_nan=False)


# --- two checkpoints -------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(NAMES)), st.sampled_from([0.5, -1e-3]))
def test_what_changed_is_found_and_nothing_else(names, by):
    comparison = compare(BASE, with_weights(BASE, nudged(*names, by=by)))
    assert {name for name, state in states(comparison).items() if state == "changed"} == names
    assert set(states(comparison)) == set(NAMES)
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
    assert set(comparison.changed) == blocks | {name.split(".")[0] for name in names} - {"blocks"}
    assert comparison.whole.elements_changed == comparison.whole.tensors_changed == len(names)
    delta = sum(comparison.changes[name].delta_squares for name in names)
    norm = sum(BASE.read(name).double().square().sum().item() for name in NAMES)
    assert comparison.whole.relative == pytest.approx(math.sqrt(delta / norm))
    rows = {line.split("  ")[0].strip() for line in comparison.table().splitlines()}
    assert {f"block {i}" for i in blocks} <= rows


def test_the_table_and_the_closing_line():
    weights = nudged(*[name for name in NAMES if name.startswith(("blocks.2.", "head"))])
    comparison = compare(BASE, with_weights(BASE, weights))
    rows = [line.split() for line in comparison.table().splitlines()]
    assert [row[:2] for row in rows[2:]] == [
        ["embed", "identical"],
        ["blocks", "0-1"],
        ["block", "2"],
        ["block", "3"],
        ["final_norm", "identical"],
        ["head", "1"],
    ]
    assert rows[4][2:5] == ["9", "of", "9"]
    assert comparison.summary() == "block 2 + head changed (10 tensors); 29 tensors are bit-identical."
    alike = compare(BASE, BASE)
    assert alike.summary() == "nothing changed; 39 tensors are bit-identical."
    assert "blocks 0-3  identical" in alike.table()


def test_another_dtype_is_told_apart_from_another_value():
    half = checkpoint(dtype=torch.bfloat16)
    wider = with_weights(half, {name: tensor.float() for name, tensor in half.tensors.items()})
    comparison = compare(half, wider, expect_only="none")
    assert set(states(comparison).values()) == {"equal values"}
    assert comparison.summary() == "nothing changed; 39 tensors have equal values (bfloat16 in A, float32 in B)."
    assert comparison.unexpected == ""
    assert "blocks 0-3  equal values" in comparison.table()
    rounded = with_weights(BASE, {name: tensor.bfloat16() for name, tensor in BASE.tensors.items()})
    for rounding in (compare(BASE, rounded), compare(rounded, BASE)):
        assert set(states(rounding).values()) == {"changed"}
        assert 0 < rounding.whole.relative < 2**-8


def test_nan_is_told_even_where_nothing_changed():
    broken = with_weights(BASE, {"blocks.1.norm_1.weight": torch.full((16,), NAN)})
    assert "NaN or infinite: 16 elements of A, 16 of B, first in blocks.1.norm_1.weight." in (
        compare(broken, broken).summary()
    )
    comparison = compare(BASE, broken)
    assert "norm_1 nan" in comparison.table()
    assert json.loads(comparison.to_json())["parts"]["blocks.1"]["largest_change"] is None


def test_a_tied_head_is_the_embedding():
    tied = checkpoint(tie_word_embeddings=True)
    head = tied.read("embed.weight").clone()
    copied = replace(with_weights(tied.untied(), {"head.weight": head}), aliases={})
    trained = replace(with_weights(tied.untied(), {"head.weight": head + 1}), aliases={})
    for pair, side, changed in (((tied, copied), "A", []), ((tied, trained), "A", ["head"]), ((copied, tied), "B", [])):
        comparison = compare(*pair)
        assert comparison.changed == changed
        assert comparison.changes["head.weight"].state == ("changed" if changed else "identical")
        assert f"head (embed in {side})" in comparison.table()
    both = compare(tied, tied)
    assert "head" not in both.parts
    assert "embed (also the head)" in both.table()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_hidden_layers": 3}, "n_layer is 4 in A and 3 in B."),
        ({"intermediate_size": 20, "vocab_size": 60}, "vocab_size is 61 in A and 60 in B; intermediate_size is 24"),
        ({"attention_bias": True}, "qkv_bias is False in A and True in B"),
        ({"model_type": "qwen3", "head_dim": 4}, "qk_norm is None in A and head in B"),
    ],
)
def test_unlike_checkpoints_are_refused_by_what_differs(fields, told):
    with pytest.raises(UsageError) as refusal:
        compare(BASE, checkpoint(**fields))
    assert "model and model have different shapes: " in str(refusal.value)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_config_that_computes_otherwise_is_a_change():
    other = checkpoint(rope_theta=20.0, initializer_range=0.3)
    comparison = compare(BASE, other, expect_only="all")
    assert comparison.changed == []
    assert comparison.summary().endswith("the config changed too: rope.theta is 10000.0 in A and 20.0 in B.")
    assert comparison.unexpected == (
        "changed, and not expected to: the config (rope.theta is 10000.0 in A and 20.0 in B)."
    )
    mistral = {"model_type": "mistral"}
    windows = compare(checkpoint(**mistral, sliding_window=3), checkpoint(**mistral, sliding_window=5))
    assert list(windows.config_changes) == ["windows[0] is 3 in A and 5 in B"]


# --- what was to change ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("2", [2]),
        (2, [2]),
        ("0-1,3", [0, 1, 3]),
        ("-2:", [2, 3]),
        ("last:1 , head", [3, "head"]),
        ([0, "2-3", "embed"], [0, 2, 3, "embed"]),
        ("head", ["head"]),
        ("final_norm,embed,head", ["embed", "head", "final_norm"]),
        ("all", [0, 1, 2, 3]),
        ("none", []),
    ],
)
def test_the_words_for_what_may_change(spec, parts):
    comparison = compare(BASE, BASE, spec)
    assert comparison.expected == parts
    assert comparison.unexpected == ""
    assert ("expected to change, and did not: " in comparison.summary()) == bool(parts)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("4", "this model has 4 blocks, ids 0 to 3"),
        ("2-1", "fall"),
        ("", "has an empty part"),
        ("1,,2", "has an empty part"),
        ([], "--expect_only is an empty list"),
        (
            "haed",
            "'haed' is unknown. Did you mean 'head'? Choose from embed, head, final_norm and blocks",
        ),
        ("1,lm_head", "Did you mean 'head'?"),
        ("none,head", "'none' stands alone"),
        ("none,1", "'none' stands alone"),
        ("heads:1", "not understood"),
        (1.5, "takes "),
    ],
)
def test_other_words_are_refused(spec, told):
    with pytest.raises(UsageError) as refusal:
        compare(BASE, BASE, spec)
    assert told in str(refusal.value)


def test_a_head_that_is_the_embedding_cannot_change_alone():
    tied = checkpoint(tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"the head is the embedding, one tensor\. Say embed\."):
        compare(tied, tied, "1,head")
    assert compare(tied, tied, "embed,head").expected == ["embed"]
    assert compare(tied, tied.untied(), "head").expected == ["head"]


parts_of_names = st.sets(st.sampled_from(["embed", 0, 1, 2, 3, "final_norm", "head"]))


@given(parts_of_names, parts_of_names)
def test_only_what_was_not_expected_is_unexpected(moved, expected):
    first = {part: next(n for n in NAMES if n.startswith((f"blocks.{part}.", f"{part}."))) for part in moved}
    comparison = compare(BASE, with_weights(BASE, nudged(*first.values())), sorted(expected, key=str) or "none")
    others = moved - expected
    assert bool(comparison.unexpected) == bool(others)
    if others:
        assert f"({len(others)} tensor" in comparison.unexpected
        assert comparison.unexpected.rpartition("such as ")[2].removesuffix(").") in [first[part] for part in others]
    assert ("did not: " in comparison.summary()) == bool(expected - moved)


# --- every kind of directory -----------------------------------------------------------------------------------------


@pytest.fixture
def base_dir(tmp_path, tokenizer_dir):
    write_checkpoint(tmp_path / "base", BASE.hf_config, BASE.layout(), BASE.read, {"kind": "test"}, tokenizer_dir)
    return tmp_path / "base"


def adapter(base, modules, dora=False, zero=False):
    """`base` with a random adapter on `modules`."""
    lora = LoRA(dict.fromkeys(modules, 2), dict.fromkeys(modules, 3.0), dora=dora)
    shapes = {n: p.shape for n, p in model_parameters(base.config, lora).items()}
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(shapes[n], generator=generator) for m in modules for n in lora.parameters(m)}
    return base.with_lora(lora, {n: torch.zeros_like(t) if zero and "lora_B" in n else t for n, t in tensors.items()})


def written_over_base(path, model, names):
    write_over_base(path, model, set(names), model.dtype, model.read, {"kind": "test"})
    return path


MODULES = ["blocks.1.attn.q_proj", "blocks.1.mlp.up_proj", "blocks.3.attn.o_proj", "head"]


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_compared_as_what_it_computes(dora, base_dir, tmp_path):
    base = open_checkpoint(base_dir)
    model = adapter(base, MODULES, dora)
    adapter_dir = written_over_base(tmp_path / "lora", model, model.tensors)
    comparison = compare(base, open_checkpoint(adapter_dir))
    adapted = {f"{module}.weight" for module in MODULES}
    assert {n for n, state in states(comparison).items() if state == "changed"} == adapted
    assert {state for n, state in states(comparison).items() if n not in adapted} == {"identical"}
    for name in adapted:
        module, weight = name.removesuffix(".weight"), base.read(name).double()
        delta = 1.5 * model.read(f"{module}.lora_B").double() @ model.read(f"{module}.lora_A").double()
        if dora:
            whole = weight + delta
            magnitude = model.read(f"{module}.lora_magnitude").double()
            delta = whole * (magnitude / whole.norm(dim=1))[:, None] - weight
        assert comparison.changes[name].relative == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-5)
    assert "LoRA r 2, alpha 3, folded in" in comparison.b.describe() or dora


def test_an_adapter_in_pefts_format(base_dir, tmp_path):
    model = adapter(open_checkpoint(base_dir), MODULES)
    write_peft(tmp_path / "peft", model)
    comparison = compare(model, open_checkpoint(tmp_path / "peft", base_dir))
    assert set(states(comparison).values()) == {"identical"}
    assert compare(open_checkpoint(base_dir), open_checkpoint(tmp_path / "peft", base_dir)).changed == [1, 3, "head"]


def test_an_adapter_that_does_nothing_yet_changes_nothing(base_dir):
    base = open_checkpoint(base_dir)
    comparison = compare(base, adapter(base, MODULES, zero=True))
    assert set(states(comparison).values()) == {"identical"}  # the base is in fp32, as what is folded


def test_an_adapter_on_a_tied_head(tokenizer_dir, tmp_path):
    tied = checkpoint(tie_word_embeddings=True, dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "tied", tied.hf_config, tied.layout(), tied.read, {}, tokenizer_dir)
    base = open_checkpoint(tmp_path / "tied")
    comparison = compare(base, adapter(base, ["head"]), expect_only="head")
    assert comparison.changed == comparison.expected == ["head"]
    assert "head (embed in A)" in comparison.table()
    assert states(comparison)["embed.weight"] == "identical"


def test_a_directory_of_only_what_trained(base_dir, tmp_path):
    base = open_checkpoint(base_dir)
    names = [name for name in NAMES if name.startswith("blocks.3.")]
    trained = written_over_base(tmp_path / "delta", with_weights(base, nudged(*names)), names)
    assert compare(base, open_checkpoint(trained), "3").unexpected == ""
    assert compare(base, open_checkpoint(trained)).changed == [3]
    model = adapter(open_checkpoint(trained), ["blocks.0.attn.v_proj"])  # both in one run
    mixed = written_over_base(tmp_path / "mixed", model, model.tensors)
    assert compare(base, open_checkpoint(mixed)).changed == [0, 3]
    assert compare(open_checkpoint(trained), open_checkpoint(mixed)).changed == [0]


GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32}
NEOX = {name: value for name, value in FIELDS.items() if name != "num_key_value_heads"}
NEOX |= {"model_type": "gpt_neox", "rotary_pct": 1.0}


@pytest.mark.parametrize("fields", [FIELDS, GPT2, NEOX], ids=lambda fields: fields["model_type"])
def test_a_hugging_face_directory_is_its_converted_copy(fields, tmp_path, tokenizer_dir):
    with saved_model(fields) as (path, _):
        theirs = open_checkpoint(path)
        write_checkpoint(tmp_path / "ours", theirs.hf_config, theirs.layout(), theirs.read, {}, tokenizer_dir)
        comparison = compare(theirs, open_checkpoint(tmp_path / "ours"))
    assert set(states(comparison).values()) == {"identical"}
    if fields is GPT2:
        assert list(comparison.modules["embed"]) == ["embed", "pos_embed"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def changed_dir(base_dir, tmp_path, tokenizer_dir):
    """The base with blocks 2 and 3 changed."""
    model = with_weights(BASE, nudged(*[name for name in NAMES if name.startswith(("blocks.2.", "blocks.3."))]))
    write_checkpoint(tmp_path / "changed", BASE.hf_config, BASE.layout(), model.read, {}, tokenizer_dir)
    return tmp_path / "changed"


def diff(capsys, *words):
    code = main(["diff", *map(str, words)])
    return code, *capsys.readouterr()


def test_exit_codes(capsys, base_dir, changed_dir):
    code, out, err = diff(capsys, base_dir, changed_dir)
    assert (code, err) == (0, "")
    assert out.startswith(f"A  {base_dir}\nB  {changed_dir}\n\n")
    assert out.endswith("\nblocks 2,3 changed (18 tensors); 21 tensors are bit-identical.\n")
    assert diff(capsys, base_dir, changed_dir, "--expect_only", "-2:")[0] == 0
    code, out, err = diff(capsys, base_dir, changed_dir, "--expect_only", "1,2,head")
    assert (code, err) == (
        1,
        "error: changed, and not expected to: block 3 (9 tensors, such as blocks.3.norm_1.weight).\n",
    )
    assert "expected to change, and did not: block 1 + head.\n" in out
    code, out, err = diff(capsys, base_dir, changed_dir, "--expect_only", "2,5")
    assert (code, out) == (2, "")
    assert "this model has 4 blocks" in err


@pytest.mark.parametrize("keep", [0, 100, 5000, -9])
def test_a_truncated_checkpoint_is_refused(keep, capsys, base_dir, changed_dir):
    file = changed_dir / "litfreeze.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    code, out, err = diff(capsys, base_dir, changed_dir)
    assert (code, out) == (2, "")
    assert "litfreeze.safetensors is truncated" in err
    assert err.count("\n") == 1


def test_a_base_that_moved_is_named(capsys, base_dir, tmp_path):
    names = ["blocks.3.norm_1.weight"]
    trained = written_over_base(tmp_path / "delta", with_weights(open_checkpoint(base_dir), nudged(*names)), names)
    moved = base_dir.rename(tmp_path / "moved")
    code, _, err = diff(capsys, moved, trained)
    assert (code, "no longer there" in err) == (2, True)
    assert diff(capsys, moved, trained, "--b_base_dir", moved, "--expect_only", "3")[0] == 0
    assert diff(capsys, trained, moved, "--a_base_dir", moved, "--expect_only", "none")[0] == 1


@pytest.mark.painted
def test_figures_and_picture_are_written_even_if_too_much_changed(capsys, base_dir, changed_dir, tmp_path):
    files = tmp_path / "figures.json", tmp_path / "picture.png"
    before = set(tmp_path.iterdir())
    words = [base_dir, changed_dir, "--json", files[0], "--png", files[1], "--expect_only", "2"]
    assert diff(capsys, *words)[0] == 1
    assert set(tmp_path.iterdir()) - before == set(files)  # nothing was left aside
    told = json.loads(files[0].read_text("utf-8"))
    assert told["changed"] == ["blocks.2", "blocks.3"]
    assert told["expected"] == ["blocks.2"]
    assert "block 3" in told["unexpected"]
    assert list(told["tensors"]) == NAMES
    name = "blocks.3.mlp.up_proj.weight"
    assert told["tensors"][name]["elements_changed"] == 1
    assert told["tensors"][name]["largest_change"] == pytest.approx(0.5)
    assert told["parts"]["blocks.3"]["modules"]["up_proj"]["relative_change"] == pytest.approx(
        0.5 / BASE.read(name).norm().item(), rel=1e-5
    )
    assert files[1].read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.painted
def test_a_picture_shows_what_changed_in_colour_and_nothing_else(tmp_path):
    norm, ones = "blocks.0.norm_1.weight", torch.ones(16)
    zeros = with_weights(BASE, {norm: 0 * ones})
    pairs = [(BASE, BASE), (BASE, with_weights(BASE, nudged("head.weight")))]
    pairs += [(BASE, with_weights(BASE, {norm: NAN * ones}))]
    pairs += [(zeros, with_weights(BASE, {norm: value})) for value in (ones, -zeros.read(norm))]
    coloured = []
    for pair in pairs:
        draw(tmp_path / "picture.png", compare(*pair))
        left = imread(tmp_path / "picture.png")[..., :3]  # (height, width, 3) in 0 … 1
        left = left[:, : left.shape[1] // 2]  # the embedding and the lower blocks; the scale stands at the right
        coloured.append(bool((left.max(-1) - left.min(-1) > 0.2).any()))
    assert coloured == [False, False, True, True, True]


@pytest.mark.parametrize("option", ["--json", "--png"])
def test_a_place_that_cannot_be_written_is_told_first(option, capsys, base_dir, tmp_path):
    for place in (tmp_path, tmp_path / "gone" / "file"):
        code, out, err = diff(capsys, base_dir, base_dir, option, place)
        assert (code, out) == (2, "")
        assert f"{option} {place} must name a file" in err
