"""Several checkpoints over one base: they answer as if each stood alone, and have in memory once what they share."""

import json
import shutil
from contextlib import nullcontext

import pytest

from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.checkpoint.write import write_peft
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.generate.answer import BASE, Answer, Answerer, load_models, open_answerers
from litfreeze.generate.base import setup as generate
from litfreeze.generate.sample import Sampling, generate_tokens
from litfreeze.scripts.merge import merge_delta, merge_lora

PROMPTS = ("Play some jazz", "Book a table for six in a bar", "What is the weather in Rome?")


def say(answerer: Answerer, prompt: str, most: int = 24, **words) -> str:
    tokens = answerer.tokens([{"role": "user", "content": prompt}])
    return "".join(Answer(answerer, tokens, most, **words))


@pytest.fixture(scope="module")
def several(adapter, delta, mixed) -> dict[str, Answerer]:
    answerers = open_answerers(MODEL_DIR, adapters=f"lora={adapter},delta={delta},mixed={mixed}")
    load_models(answerers.values(), "cpu", None)
    return answerers


def test_each_answers_token_for_token_as_a_fresh_load_of_its_directory(several):
    said = {}
    for name in [*several, *several]:  # and once more, after all the others
        checkpoint = open_checkpoint(several[name].checkpoint.path)
        alone = load_model(checkpoint, lambda _: several[BASE].model.embed.weight.dtype)
        for prompt in PROMPTS[:1]:
            tokens = several[name].tokens([{"role": "user", "content": prompt}])
            for sampling in (Sampling(), Sampling(temperature=1.0)):
                drawn = [list(generate_tokens(m, tokens, 8, (), sampling, 3)) for m in (several[name].model, alone)]
                assert drawn[0] == drawn[1]
                said.setdefault((name, sampling, prompt), drawn[0])
                assert said[name, sampling, prompt] == drawn[0]
    assert len({tuple(tokens) for tokens in said.values()}) > 5  # of 8: they do differ


def test_what_they_share_is_in_memory_once(several):
    base = dict(several[BASE].model.named_parameters())
    for name, answerer in several.items():
        own = set() if name == BASE else set(answerer.checkpoint.tensors)
        found = dict(answerer.model.named_parameters())
        assert set(found) - set(base) == {n for n in own if ".lora_" in n}
        for parameter in base:
            assert (found[parameter] is base[parameter]) == (parameter not in own)
            assert (found[parameter].data_ptr() == base[parameter].data_ptr()) == (parameter not in own)
    assert sum(len(answerer.checkpoint.replaced) for answerer in several.values()) == 2 * 9 + 9 + 1


def test_generate_says_the_same(several, capsys):
    for name in ("lora", "delta", "mixed", BASE):
        words = {"checkpoint_dir": several[name].checkpoint.path, "max_new_tokens": 24}
        assert generate(PROMPTS[1], **words) == say(several[name], PROMPTS[1])
        assert generate(PROMPTS[1], temperature=0.8, top_k=9, top_p=0.9, seed=3, **words) == say(
            several[name], PROMPTS[1], sampling=Sampling(0.8, 9, 0.9), seed=3
        )


def test_a_checkpoint_over_its_base_comes_with_it(adapter, delta):
    answerers = open_answerers(adapter, adapters=[f"t={delta}"])
    assert list(answerers) == ["tunes", BASE, "t"]  # the name of the run's folder
    assert answerers[BASE].checkpoint.base is None
    load_models(answerers.values(), "cpu", None)
    assert answerers["tunes"].model.embed.weight is answerers[BASE].model.embed.weight
    assert say(answerers["tunes"], PROMPTS[0]) == generate(PROMPTS[0], adapter, max_new_tokens=24)


def test_a_peft_adapter_and_a_merged_directory(tmp_path, adapter, delta, several):
    write_peft(tmp_path / "peft", open_checkpoint(adapter))
    merge_delta(delta, out_dir=tmp_path / "merged")
    peft = open_answerers(MODEL_DIR, adapters={f"p={tmp_path / 'peft'}"})["p"]
    merged = open_answerers(tmp_path / "merged")[BASE]
    load_models([peft], "cpu", None)
    load_models([merged], "cpu", None)
    for prompt in PROMPTS:
        assert say(peft, prompt) == say(several["lora"], prompt)
        assert say(merged, prompt) == say(several["delta"], prompt)
    # An adapter that trained over other weights than these is none of theirs
    with pytest.raises(UsageError, match=r"--adapters x: .*merged is not the base that .* was trained on"):
        open_answerers(tmp_path / "merged", adapters=f"x={adapter}")


def test_a_peft_adapter_of_another_base_is_refused_or_told(tmp_path, adapter, capsys):
    write_peft(tmp_path / "peft", open_checkpoint(adapter))
    other, file = tmp_path / "other", tmp_path / "peft" / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    merge_lora(adapter, tmp_path / "other")
    words = {"adapters": f"p={tmp_path / 'peft'}"}
    with pytest.raises(UsageError, match=r"was trained over .*, and not over .*other"):
        open_answerers(other, **words)
    copy = shutil.copytree(MODEL_DIR, tmp_path / "copy")
    open_answerers(copy, **words)  # other files, the same weights
    assert capsys.readouterr().err == ""
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "some-org/a-model"}), encoding="utf-8")
    assert list(open_answerers(copy, **words)) == [BASE, "p"]
    assert "names some-org/a-model as its base; whether" in capsys.readouterr().err
    manifest = json.loads((copy / "litfreeze.json").read_text(encoding="utf-8"))
    for source, same in (("some-org/a-model@1234", True), ("some-org/another", False)):
        (copy / "litfreeze.json").write_text(json.dumps(manifest | {"source": source}), encoding="utf-8")
        with nullcontext() if same else pytest.raises(UsageError, match="was trained over some-org/a-model"):
            open_answerers(copy, **words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("lora", "write NAME=DIR"),
        ("=x", "write NAME=DIR"),
        ("a b=x", "no blanks"),
        ("a={0},", "write NAME=DIR"),
        ("base={0}", "the name base is taken"),
        ("a={0},a={0}", "gives the name a twice"),
        ("a=nowhere", "--adapters a: nowhere is no directory"),
        (f"a={MODEL_DIR}", "--adapters a: .* holds all its weights"),
    ],
)
def test_wrong_adapters_are_refused(words, told, adapter):
    with pytest.raises(UsageError, match=told):
        open_answerers(MODEL_DIR, adapters=words.format(adapter))


def test_an_answer_knows_why_it_ended(several):
    answerer = several[BASE]
    tokens = answerer.tokens([{"role": "user", "content": PROMPTS[0]}])
    whole = Answer(answerer, tokens, 100)
    text = "".join(whole)
    drawn = list(generate_tokens(answerer.model, tokens, 100, answerer.tokenizer.eos_ids))
    assert (whole.finish_reason, whole.tokens) == ("stop", len(drawn)) and 3 < len(drawn) < 100
    cut = Answer(answerer, tokens, 3)
    assert text.startswith("".join(cut)) and (cut.finish_reason, cut.tokens) == ("length", 3)
    stop = text[4:6]
    stopped = Answer(answerer, tokens, 100, stops=[stop])
    assert "".join(stopped) == text[: text.index(stop)] and stopped.finish_reason == "stop"
    size = answerer.checkpoint.config.block_size
    full = Answer(answerer, [5] * (size - 2), 100, Sampling(9.0), seed=1)
    assert full.finish_reason is None
    assert "".join(full) and (full.finish_reason, full.tokens) == ("length", 2)


def test_a_stop_may_be_a_special_token(several, monkeypatch):
    answerer = several[BASE]
    tokens = answerer.tokens([{"role": "user", "content": PROMPTS[0]}])
    text = "".join(Answer(answerer, tokens, 20))
    monkeypatch.setattr(answerer.tokenizer, "eos_ids", ())
    assert len("".join(Answer(answerer, tokens, 20))) > len(text) > 5
    stopped = Answer(answerer, tokens, 20, stops=["never", "<|end|>"])
    assert "".join(stopped) == text and stopped.finish_reason == "stop"
