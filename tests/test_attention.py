"""A packed stream answered in one call of a kernel: the same as span by span."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from litfreeze import attention
from litfreeze.attention import Look, Packed, Span, Stretches, at_once, kernel_name
from litfreeze.config import Config
from litfreeze.presets import PRESETS

HEADS, GROUPS, SIZE = 4, 2, 8
WINDOWS = st.sampled_from([None, 1, 2, 5, 100])


@st.composite
def streams(draw) -> tuple[list[Span], Tensor]:
    """Spans that follow others, as shared prompts do, and some of the rows, rising."""
    spans: list[Span] = []
    for length in draw(st.lists(st.integers(1, 7), min_size=1, max_size=6)):
        start = spans[-1].stop if spans else 0
        after = draw(st.sampled_from([None, *spans]))
        before = () if after is None else (*after.before, (after.start, after.stop))
        spans.append(Span(start, start + length, before))
    rows = draw(st.sets(st.integers(0, spans[-1].stop - 1), min_size=1))
    return spans, torch.tensor(sorted(rows))


def plain_kernel(q: Tensor, keys: Tensor, values: Tensor, stretches: Stretches, look: Look) -> Tensor:
    """What the documentation of a kernel for several lengths promises, one query at a time: each sees the keys of its
    stretch up to as far from the last of them as it is from the last query."""
    q_starts, k_starts = stretches.queries.tolist(), stretches.keys.tolist()
    lengths = [[b - a for a, b in pairwise(starts)] for starts in (q_starts, k_starts)]
    assert stretches.longest == tuple(map(max, lengths)) and stretches.queries.dtype == torch.int32
    assert (q_starts[-1], k_starts[-1]) == (len(q), len(keys))
    answers = []
    for stretch, n in enumerate(lengths[0]):
        for i in range(n):
            stop = k_starts[stretch + 1] - (n - 1 - i)
            start = k_starts[stretch] if look.window is None else max(k_starts[stretch], stop - look.window)
            of = (keys[start:stop], values[start:stop])
            k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in of)  # (S, H, D)
            scores = torch.einsum("hd,shd->hs", q[q_starts[stretch] + i], k) * (look.scale or SIZE**-0.5)
            if look.softcap:
                scores = look.softcap * torch.tanh(scores / look.softcap)
            answers.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v))
    return torch.stack(answers)


LOOKS = st.builds(Look, WINDOWS, st.sampled_from([None, 0.2]), st.sampled_from([None, 1.5]))


@given(streams(), LOOKS, st.booleans())
def test_one_call_answers_what_a_call_for_each_span_does(stream, look, every):
    spans, rows = stream
    n = spans[-1].stop
    every = every or len(rows) == n
    leaves = [torch.randn(n, heads, SIZE, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    q = leaves[0] if every else leaves[0][rows]
    by_span = Packed(spans, rows)(q, *leaves[1:], look, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "at_once", lambda *_: plain_kernel)
        in_one = Packed(spans, rows)(q, *leaves[1:], look, 0)
    torch.testing.assert_close(in_one, by_span, rtol=1e-4, atol=1e-5)
    push = torch.randn_like(by_span)
    ours, theirs = (torch.autograd.grad(y, leaves, push, retain_graph=True) for y in (in_one, by_span))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_long_dialogue_does_not_copy_its_keys_for_every_turn():
    rows = torch.arange(1, 60, 3)
    packed = Packed([Span(0, 60)], rows)
    assert packed.stretches(every=False).copies > 5 * 60
    seen = []

    def kernel(q, keys, values, stretches, look):
        seen.append(len(keys))
        return plain_kernel(q, keys, values, stretches, look)

    leaves = [torch.randn(60, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "at_once", lambda *_: kernel)
        in_one = packed(leaves[0][rows], *leaves[1:], Look(), 0)
    assert seen == [60]
    torch.testing.assert_close(in_one, packed(leaves[0][rows], *leaves[1:], Look(), 0), rtol=1e-4, atol=1e-5)


def test_whole_sequences_need_no_copy_of_their_keys():
    assert Packed([Span(0, 3), Span(3, 7)]).stretches(every=True).rows is None
    shared = Packed([Span(0, 3), Span(3, 7, ((0, 3),)), Span(7, 8, ((0, 3),))]).stretches(every=True)
    assert shared.rows.tolist() == [0, 1, 2, *range(7), 0, 1, 2, 7]


def test_neighbouring_queries_are_one_stretch():
    laid = Packed([Span(0, 4), Span(4, 9)], torch.tensor([1, 2, 6, 8])).stretches(every=False)
    assert laid.queries.tolist() == [0, 2, 3, 4]
    assert laid.rows.tolist() == [0, 1, 2, 4, 5, 6, 4, 5, 6, 7, 8]


def test_a_processor_and_fp32_have_no_such_kernel():
    assert at_once(torch.device("cpu"), torch.bfloat16, 64, None) is None
    assert at_once(torch.device("cuda"), torch.float32, 64, None) is None
    demo = Config.from_hf(PRESETS["demo"])
    told = [kernel_name(torch.device("cpu"), torch.float32, replace(demo, attention_softcap=cap)) for cap in (None, 5)]
    assert told == ["scaled_dot_product_attention of each span on cpu", "plain products of each span on cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_answers_as_the_plain_kernel_does(window):
    device = torch.device("cuda")
    kernel = at_once(device, torch.bfloat16, SIZE, None)
    if kernel is None:
        pytest.skip("this GPU or this torch has no such kernel")
    spans = [Span(0, 40), Span(40, 75, ((0, 40),)), Span(75, 90, ((0, 40),)), Span(90, 200)]
    packed = Packed(spans, torch.tensor([*range(60, 75), *range(80, 90), 120, 121, 199]))
    for every in (True, False):
        stretches = packed.stretches(every).to(device)
        q = torch.randn(200 if every else 28, HEADS, SIZE, device=device, requires_grad=True)
        k, v = (torch.randn(200, GROUPS, SIZE, device=device, requires_grad=True) for _ in range(2))
        half = [t.to(torch.bfloat16) for t in (q, k, v)]
        fast = packed(*half, Look(window, 0.2), 0).float()
        slow = plain_kernel(q, k[stretches.rows], v[stretches.rows], stretches, Look(window, 0.2))
        torch.testing.assert_close(fast, slow, rtol=0, atol=3e-2)
        push = torch.randn_like(slow)
        ours, theirs = (torch.autograd.grad(y, [q, k, v], push) for y in (fast, slow))
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine - other).norm() <= 2e-2 * other.norm()
