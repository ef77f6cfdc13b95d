"""The form is the command's signature: what it holds reaches the command as words and as YAML, and comes back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litfreeze_board.options import Form, as_text, field_of

from litfreeze.__main__ import COMMANDS
from litfreeze.cli import arguments, options_of, parse
from litfreeze.errors import UsageError

FORMS = {method: Form(f"finetune {method}") for method in ("full", "lora")}
FULL = FORMS["full"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_option_is_a_field_with_its_help(form):
    assert list(form.fields) == list(options_of(form.function))
    assert all(field.help for field in form.fields.values())
    assert {field.group for field in form.fields.values()} == set(form.groups)


def test_defaults_and_choices_are_those_of_the_signature():
    fields = FULL.fields
    assert fields["train.global_batch_size"].default == "16"
    assert fields["train.lr"].default == ""
    assert fields["train.optimizer"].choices == ("adamw", "adamw8bit", "muon")
    assert fields["compile"].choices == ("true", "false")
    assert fields["data.path"].path and not fields["trainable_layers"].path
    assert fields["cache"].group == "frozen" and fields["seed"].group == ""


def test_a_form_that_was_left_as_it_is_says_nothing():
    assert FULL.words({name: field.default for name, field in FULL.fields.items()}) == ["finetune", "full"]


def test_the_line_is_quoted():
    line = FULL.line({"data.path": "my data/it's.jsonl", "trainable_layers": "-2:", "train.max_norm": "null"})
    quoted = """'my data/it'"'"'s.jsonl'"""
    assert line == f"litfreeze finetune full --trainable_layers -2: --data {quoted} --train.max_norm null"


words = st.sampled_from(
    ["-2:", "10,11", "last:2", "0-3, 8", "010", "1:30", "all", "rank:spectrum:4", "new", "--x", "- 1"]
)
texts = st.text("abcz-:#'\"[]{}, =\\é", min_size=1, max_size=10).filter(lambda text: text.strip() == text)
filled = st.fixed_dictionaries(
    {},
    optional={
        "trainable_layers": words,
        "trainable_modules": texts,
        "layer_lr": texts,
        "data.path": st.sampled_from(["a.jsonl", "b c.json", "-d.csv", "~/x"]),
        "data.prompt_args": st.sampled_from(['{"a": false}', '{"n": [1, "x"]}']),
        "data.val_split_fraction": st.floats(0, 0.9).map(str),
        "train.lr": st.floats(1e-7, 1).map(str),
        "train.max_steps": st.integers(1, 10**6).map(str),
        "train.max_norm": st.sampled_from(["null", "0.5"]),
        "train.max_time": st.sampled_from(["90", "1h30m"]),
        "eval.save_best": st.sampled_from(["true", "false"]),
        "cache": st.sampled_from(["off", "ram"]),
        "precision": st.sampled_from(["32-true", "bf16-mixed"]),
        "devices": st.sampled_from(["1", "0,2", "auto"]),
        "seed": st.integers(0, 2**31).map(str),
    },
)


@settings(max_examples=30)
@given(filled)
def test_words_and_yaml_say_the_same(values):
    line = FULL.words(values)
    try:
        function, meant = parse(line, COMMANDS)
    except UsageError:
        return  # such as a --data.prompt_style that is no text; the page shows it
    recipe = FULL.recipe(values)
    meant = {**meant, "out_dir": None}
    assert arguments("finetune full", function, recipe) == meant
    again = FULL.values(recipe)
    assert parse(FULL.words(again), COMMANDS)[1] == meant


def test_a_recipe_with_lists_short_names_and_mappings():
    recipe = "trainable_layers: [10, 11]\ndata: few.jsonl\ntrain: {lr: 1e-3, max_norm: null}\n"
    recipe += "trainable_modules: ['re:a{1,2}', attn]"
    values = FULL.values(recipe)
    assert values["trainable_layers"] == "10,11" and values["data.path"] == "few.jsonl"
    assert values["train.max_norm"] == "null"
    given = parse(FULL.words(values), COMMANDS)[1]
    assert given["trainable_modules"] == ["re:a{1,2}", "attn"] and given["train"].lr == 1e-3


@pytest.mark.parametrize("recipe", ["train: {lr: fast}", "trainable-layers: 3", "a: [", "- 1", "train: 3", "lora_r: 8"])
def test_a_recipe_is_refused_as_config_refuses_it(recipe):
    with pytest.raises(UsageError):
        FULL.values(recipe)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "true"), (1e-5, "1e-05"), ([10, "-2:"], "10,-2:"), ({"a": 1}, '{"a": 1}'), ([], "[]")],
)
def test_values_as_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"trainable_layers": "99"}, "trainable_layers"),
        ({"unfreeze": "0:99"}, "unfreeze"),
        ({"train.lr": "fast"}, "train.lr"),
        ({"train.keep_last": "2"}, "train.keep_last"),
        ({"data.path": "not there.jsonl"}, "data.path"),
        ({"checkpoint_dir": "nowhere"}, "checkpoint_dir"),
        ({"trainable_layers": "10", "layer_lr": "3:1e-4"}, "layer_lr"),
        ({"trainable_layers": "10", "trainable_modules": "atn"}, "trainable_modules"),
    ],
)
def test_a_refusal_finds_its_field(values, place):
    from litfreeze_board.plan import plan

    found = plan(FULL.words(values), values.get("checkpoint_dir"), None, {})
    assert field_of(found["refused"], values, FULL.fields) == place


def test_a_refusal_finds_its_field_beside_what_was_filled_in_for_the_other_method():
    values = {"lora_r": "4", "data.path": "not there.jsonl"}
    assert field_of("There is no data at not there.jsonl.", values, FULL.fields) == "data.path"
