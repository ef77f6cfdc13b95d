"""The recipes: each is read as the command line reads it, and its plan built over its model, without weights."""

import sys
from pathlib import Path

import pytest

from litfreeze.freeze.table import table as plan_table

HUB = Path(__file__).parents[1] / "config_hub"
sys.path.insert(0, str(HUB))
import table  # noqa: E402

MODELS = {
    "smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-1b", "llama-3.2-1b", "gemma-2-2b", "llama-3.2-3b",
    "mistral-7b", "llama-3.1-8b",
}  # fmt: skip


def test_every_model_has_every_recipe_and_there_is_no_other_file():
    expected = {f"{model}/{kind}.yaml" for model in MODELS for kind in table.KINDS}
    assert {
        str(path.relative_to(HUB / "finetune")) for path in (HUB / "finetune").rglob("*") if path.is_file()
    } == expected
    assert len(table.recipes()) == len(expected)


@pytest.mark.parametrize("recipe", table.recipes(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_says_how_it_is_used_and_has_a_plan(recipe):
    kind, depth = recipe.stem, table.checkpoint(recipe.parent.name)[0].config.n_layer
    *_, command = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("# litfreeze")]
    method = "lora" if kind == "lora" else "full"
    assert command.startswith(f"# litfreeze finetune {method} --config config_hub/finetune/{recipe.parent.name}/{kind}")
    plan, memory, done = table.costs(recipe)
    print(plan_table(plan))
    last = list(range(depth - 4, depth))
    if kind in ("freeze", "unfreeze"):
        assert plan.layers == last and done.prefix > 0
    elif kind == "llama_pro":
        assert plan.layers == list(plan.config.new_blocks) and len(plan.layers) > 0
    else:
        assert plan.layers == list(range(depth)) and (plan.lora is not None) == (kind == "lora")
    assert 0 < memory.optimizer <= memory.total and f"{plan.n_trained:,}" in plan_table(plan)


def test_the_table_is_of_these_recipes():
    assert table.table() in (HUB / "README.md").read_text(encoding="utf-8"), "python config_hub/table.py makes it anew"
