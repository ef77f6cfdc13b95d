"""The state of a run, taken while it goes on."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from litfreeze.checkpoint.resume import take_state, weights_of

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def trained(size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A step was made, so that the optimizer has a state."""
    model = nn.ModuleDict({"a": nn.Linear(size, 3), "b": nn.Linear(size, size, dtype=torch.bfloat16)})
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def test_a_snapshot_stays_what_it_was():
    model, optimizer = trained(5)
    names = [name for name, _ in model.named_parameters()]
    live = take_state(model, names, optimizer, snapshot=False)
    before = {name: tensor.clone() for name, tensor in live.items()}
    copied = take_state(model, names, optimizer, snapshot=True)
    assert set(copied) == set(before) >= {"weight.a.bias", "exp_avg.b.weight", "step.a.weight"}
    assert set(weights_of(copied)) == set(names)
    optimizer.step()
    for name, tensor in copied.items():
        assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape
        assert torch.equal(tensor, before[name]) and not torch.equal(live[name], tensor)
    assert take_state(model, names, optimizer, snapshot=True, keep=False) == {}


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="Linux without large pages")
def test_a_snapshot_is_taken_into_large_pages():
    model, _ = trained(6000)  # 72 MB of bf16
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    take_state(model, ["b.weight"], None, snapshot=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 72e6 / resource.getpagesize() / 4
