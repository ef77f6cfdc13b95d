"""lm-eval's tasks through our model: what its own HFLM gets from transformers, we get too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import saved_model, write_json

pytest.importorskip("lm_eval", reason="lm-eval is not installed (litfreeze[eval])")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from litfreeze.__main__ import main
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import RunError
from litfreeze.evaluate.evaluate import setup as evaluate
from litfreeze.evaluate.harness import Ours
from litfreeze.scripts.convert import to_hf

pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [("play", "jazz", 0), ("book", "a table", 1), ("find", "the weather in Rome", 2), ("rate", "this novel", 3)]
CHOICES = ["PlayMusic", "BookRestaurant", "GetWeather now", "RateBook"]
TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "<|user|>{{verb}} {{what}}<|end|><|assistant|>",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{verb}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "the"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{verb}} {{what}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of task files over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    records = [{"verb": v, "what": w, "choices": CHOICES, "answer": a} for v, w, a in QUESTIONS * 3]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for name, fields in TASKS.items():
        split = {"test_split": "train", "fewshot_split": "train"}
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "own.jsonl")}, **split}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **fields}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory) -> Path:
    return to_hf(out_dir=tmp_path_factory.mktemp("demo") / "hf")


def theirs(folder) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def ours(folder) -> Ours:
    checkpoint = open_checkpoint(folder)
    return Ours(load_model(checkpoint, lambda name: torch.float32), checkpoint.tokenizer())


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_the_same_results_as_hflm(tasks, demo_dir, num_fewshot):
    names = list(TASKS) if num_fewshot is None else ["own_choice", "own_answer"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(theirs(demo_dir), tasks=names, task_manager=manager, num_fewshot=num_fewshot)["results"]
    # Twice the same checkpoint: the examples before a question are the same for both
    found = evaluate([str(demo_dir), str(MODEL_DIR)], tasks=names, include_path=tasks, num_fewshot=num_fewshot)
    assert found[0]["tasks"] == found[1]["tasks"] and list(found[0]["tasks"]) == names
    compared = 0
    for name, metrics in found[0]["tasks"].items():
        for metric, (value, error) in metrics.items():
            assert value == pytest.approx(expected[name][f"{metric},none"], rel=1e-4)
            if error is not None:
                assert error == pytest.approx(expected[name][f"{metric}_stderr,none"], rel=1e-3)
            compared += 1
    assert compared == (5 if num_fewshot is None else 3)


LONG = "the band plays on and the quick brown fox jumps over the lazy dog while nobody listens "
PAIRS = [
    ("play some", " jazz"),
    ("play some ", "jazz"),  # the blank goes to the continuation
    ("", "play"),
    ("", "a whole sentence without a context"),
    ("café naïve ☃", " ünï"),
    ("<s>", "play"),
    (LONG * 6, " and that was too long"),
    (LONG, LONG[:60]),
    ("line\n\n", "\nnext"),
]  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def small(request, tmp_path_factory, demo_dir):
    """A random Llama that sees 96 tokens, with the demo's tokenizer; with a BOS before each text, or without."""
    fields = json.loads((demo_dir / "config.json").read_text(encoding="utf-8"))
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    fields |= sizes | {"head_dim": 8, "max_position_embeddings": 96}
    for name in ("dtype", "torch_dtype"):
        fields.pop(name, None)
    with saved_model(fields) as (folder, _):
        tokenizer = json.loads((demo_dir / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((demo_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        if request.param:
            bos = settings["bos_token"] = "<|system|>"  # any token of its own
            bos_id = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == bos)
            single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
            special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
            own = {
                "type": "TemplateProcessing",
                "single": single,
                "pair": single + single[1:],
                "special_tokens": special,
            }
            tokenizer["post_processor"] = own
        write_json(folder / "tokenizer.json", tokenizer)
        write_json(folder / "tokenizer_config.json", settings)
        yield ours(folder), theirs(folder)


def requests(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_likelihoods_are_hflms_whatever_stands_there(small):
    bos = small[1].tokenizer.bos_token
    pairs = PAIRS + ([(f"{bos}play some", " jazz"), ("", bos + "x")] if bos else [])
    with pytest.raises(RunError, match="no token of its own"):
        small[0].loglikelihood(requests("loglikelihood", [("a", "b")]), disable_tqdm=True)  # together they are one
    found, expected = (each.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for each in small)
    for pair, (total, greedy), (their_total, their_greedy) in zip(pairs, found, expected, strict=True):
        assert total == pytest.approx(their_total, rel=1e-4, abs=1e-4) and greedy == their_greedy, pair
    texts = [("play",), (LONG,), (LONG * 20,), ("☃",)]
    found, expected = (
        each.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for each in small
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_answers_are_hflms(small):
    arguments = [
        ("play some", {"until": ["\n\n"], "max_gen_toks": 20}),
        ("play some jazz", {"until": ["e"], "max_gen_toks": 30}),
        ("book", {"until": [], "max_gen_toks": 10, "do_sample": False}),
        (LONG * 6, {"until": ["\n"], "max_gen_toks": 16}),  # the context loses its beginning
        ("rate", {"until": "o", "max_new_tokens": 24}),
    ]
    own, other = small
    assert own.generate_until(requests("generate_until", arguments)) == [
        other.generate_until(requests("generate_until", [each]), disable_tqdm=True)[0] for each in arguments
    ]


def test_an_answer_stops_at_a_special_token_as_hflms(demo_dir, tmp_path):
    """A base model whose end token is another than the one that closes a turn."""
    folder = Path(shutil.copytree(demo_dir, tmp_path / "model"))
    for name, end in (("tokenizer_config", {"eos_token": "<|system|>"}), ("config", {"eos_token_id": 1})):
        fields = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        write_json(folder / f"{name}.json", fields | end)
    (folder / "generation_config.json").unlink(missing_ok=True)
    asked = [("<|user|>play some jazz<|end|><|assistant|>", {"until": ["Q:", "<|end|>"], "max_gen_toks": 40})]
    answer, expected = (
        each.generate_until(requests("generate_until", asked), disable_tqdm=True)
        for each in (ours(folder), theirs(folder))
    )
    assert answer == expected == ["music"]


def test_what_is_wrong_with_tasks_is_told(tasks, tmp_path, capsys, monkeypatch):
    absent = {"task": "no_data", "dataset_path": "json", "dataset_kwargs": {"data_files": "/no/such.jsonl"}}
    write_json(tmp_path / "bad.yaml", absent | TASKS["own_text"])
    own = json.loads((tasks / "own_answer.yaml").read_text(encoding="utf-8"))
    for name, more in (("beams", {"num_beams": 2}), ("much", {"max_gen_toks": 600, "num_beams": 1})):
        kwargs = {key: value for key, value in own["generation_kwargs"].items() if key != "max_gen_toks"} | more
        write_json(tmp_path / f"{name}.yaml", own | {"task": name, "generation_kwargs": kwargs})
    monkeypatch.setattr("litfreeze.checkpoint.load.load_model", None)  # all of it is told before
    local = ["--include_path", str(tasks)]
    for words, code, told in (
        (["--tasks", "own_choic", *local], 2, "Did you mean 'own_choice'?"),
        (["--tasks", "own_choice", "--include_path", "no/folder"], 2, "is no folder here"),
        (["--tasks", "no_data", "--include_path", str(tmp_path)], 1, "no_data cannot be loaded"),
        (["--tasks", "own_choice", "--data.seed", "3", *local], 2, "without --data"),
        (["--tasks", "beams", "--include_path", str(tmp_path)], 2, "beams: A task asks for num_beams"),
        (["--tasks", "much", "--include_path", str(tmp_path)], 2, "much asks for answers of 600 tokens"),
    ):
        assert main(["evaluate", *words]) == code
        assert told in capsys.readouterr().err
