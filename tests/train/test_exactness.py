"""Nothing that is spared changes what is learned.

"Plain" is a padded batch through the whole model: `--data.packing off --cache off`, which test_parity.py and
test_peft_parity.py hold against transformers and PEFT. Against it stand, alone and together, streams without pads,
beginnings that are shared, the last block and the head on target rows, the kept prefix and frozen weights in the dtype
they are stored in.

A micro-batch, its loss and every gradient, over families, plans and records: in float64, where all ways agree to 1e-6
(the logits are fp32 in all of them), so that no wrong row can pass for rounding. Then whole runs, in fp32 and
bf16-mixed, and what goes on with a cache: a second run, a resumed one, another model."""

import csv
import json
import shutil
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from families import BLOCK_SIZE, FAMILIES, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stops import ctrl_c_in_step
from torch import nn

from litfreeze.config import Config
from litfreeze.data.args import DataArgs
from litfreeze.data.batches import build_batch
from litfreeze.data.shelf import IGNORE, Sample
from litfreeze.finetune.full import setup as finetune_full
from litfreeze.finetune.lora import setup as finetune_lora
from litfreeze.freeze.args import FrozenArgs, ThawArgs
from litfreeze.freeze.plan import FreezePlan
from litfreeze.lora import LoRA, add_lora, linear_layers
from litfreeze.model import GPT
from litfreeze.place import PlaceArgs
from litfreeze.prefix import prefix as prefix_module
from litfreeze.prefix.prefix import Prefix
from litfreeze.prefix.store import ActivationStore
from litfreeze.scripts.init import setup as init
from litfreeze.train.args import EvalArgs, TrainArgs
from litfreeze.train.loss import NextToken

# --- one micro-batch --------------------------------------------------------------------------------------------------


@st.composite
def plans(draw, config: Config) -> FreezePlan:
    """Everything, chosen blocks, modules inside them, extras beside them or alone, adapters, adapters beside these."""
    blocks = sorted(draw(st.sets(st.integers(0, config.n_layer - 1), min_size=1)))
    above = ["final_norm"] if config.tie_embeddings else ["final_norm", "head"]
    extra = draw(st.lists(st.sampled_from(above), unique=True))
    below = ["embed", "head"] if config.tie_embeddings else ["embed"]
    kind = draw(st.sampled_from(["all", "blocks", "last", "modules", "extras", "embed", "lora", "lora head", "mixed"]))
    if kind == "all":
        return FreezePlan.everything(config)
    if kind == "blocks":
        return FreezePlan.choose(config, blocks, extra=extra)
    if kind == "last":
        return FreezePlan.choose(config, "-1", extra=extra)
    if kind == "modules":
        words = draw(st.lists(st.sampled_from(["attn", "mlp", "norm", "q_proj", "v_proj", "down_proj"]), min_size=1))
        return FreezePlan.choose(config, blocks, words, extra)
    if kind == "extras":
        return FreezePlan.choose(config, "none", extra=extra or above[:1])
    if kind == "embed":
        return FreezePlan.choose(config, draw(st.sampled_from(["none", "-1"])), extra=below)
    inside = [module for module in linear_layers(config) if module.startswith(tuple(f"blocks.{i}." for i in blocks))]
    chosen = draw(st.lists(st.sampled_from(inside), min_size=1, unique=True))
    targets = {"lora": chosen, "lora head": ["head"], "mixed": [*chosen, "head"]}[kind]
    lora = LoRA(dict.fromkeys(targets, 2), dict.fromkeys(targets, 4.0), dora=draw(st.booleans()))
    others = [f"blocks.{i}." for i in range(config.n_layer) if i not in blocks]
    full = [name for name in FreezePlan.everything(config).sizes if name.startswith(tuple(others))]
    return FreezePlan.adapter(config, lora, full if kind == "mixed" else [])


@st.composite
def records(draw, vocabulary: int) -> list[Sample]:
    """Records of which any may begin as another does: with its prompt, with a part of its answers, with all of it.
    Targets are the end, some turns, or everything."""
    words = np.random.default_rng(draw(st.integers(0, 99)))
    samples: list[Sample] = []
    for i in range(draw(st.integers(1, 7))):
        tokens = np.zeros(0, np.int32)
        if samples and draw(st.integers(0, 3)):
            other = draw(st.sampled_from(samples)).tokens
            tokens = other[: draw(st.sampled_from([len(other), len(other) - 1, 9, draw(st.integers(0, 40))]))]
        own = draw(st.integers(0 if len(tokens) > 1 else 2, 24))
        tokens = np.concatenate([tokens, words.integers(0, vocabulary, own)])[:BLOCK_SIZE].astype(np.int32)
        learned = np.zeros(len(tokens), bool)
        kind = draw(st.sampled_from(["answer", "answer", "turns", "all"]))
        if kind == "turns":
            learned = words.integers(0, 2, len(tokens)).astype(bool)
        short = max(1, len(tokens) - draw(st.integers(1, 5)))  # so that much stands before it, which may be shared
        first = {"answer": short, "turns": len(tokens) - 1, "all": 0}[kind]
        learned[first:] = True
        samples.append(Sample(tokens, np.where(learned, tokens, IGNORE), f"drawn:{i}", (first, len(tokens))))
    return samples


def random_model(plan: FreezePlan, frozen: torch.dtype) -> GPT:
    """What trains in float64, what does not in `frozen`; all of it far from an initialisation."""
    gpt = GPT(plan.config, stream=torch.float64)
    if plan.lora is not None:
        add_lora(gpt, plan.lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(gpt.named_parameters()):
        weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2 + ("norm" in name)
        owner, _, attribute = name.rpartition(".")
        kept = weight.to(torch.float64 if name in plan.trained else frozen)
        setattr(gpt.get_submodule(owner), attribute, nn.Parameter(kept))
    if plan.config.tie_embeddings:
        gpt.head.weight = gpt.embed.weight
    plan.apply(gpt)
    return gpt


def kept_prefix(gpt: GPT, plan: FreezePlan, samples: list[Sample]) -> Prefix:
    """The prefix with all records known, its weights gone."""
    weights = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
    store = ActivationStore(None, "key", plan.config.n_embd, torch.float64)
    prefix = Prefix(gpt, plan.lowest, store, samples, weights.__getitem__, torch.enable_grad)
    prefix.fill(samples)
    assert prefix.released and all(p.numel() == 0 for n, p in gpt.named_parameters() if n in prefix.names)
    return prefix


def learned(gpt: GPT, samples: list[Sample], size: int, prefix: Prefix | None, **batches: bool):
    """Sums over the micro-batches, and the gradient of each parameter that has one."""
    sums = []
    for start in range(0, len(samples), size):
        batch = build_batch(samples, list(range(start, min(start + size, len(samples)))), **batches)
        given = (batch,) if prefix is None else (batch, prefix.stream(batch, samples), prefix.stop)
        scored = NextToken(gpt)(*given)
        scored.loss.backward()
        with torch.no_grad():
            assert all(a == b for a, b in zip(NextToken(gpt)(*given), scored, strict=True))
        sums.append(torch.stack([value.detach().double() for value in scored[:5]]))
    gradients = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
    gpt.zero_grad()
    return sum(sums), gradients


def norm(gradients) -> float:
    return torch.stack([g.norm() for g in gradients]).norm().item()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(data=st.data())
def test_a_micro_batch_teaches_what_the_plain_one_does(family, data):
    config = Config.from_hf(data.draw(FAMILIES[family]))
    plan = data.draw(plans(config))
    samples = data.draw(records(config.vocab_size))
    narrow = plan.lora is not None and plan.lora.dora  # whose row lengths are fp32 and take no wider weight
    frozen = data.draw(st.sampled_from([torch.float32, torch.bfloat16, *([] if narrow else [torch.float64])]))
    size = data.draw(st.integers(1, len(samples)))
    gpt = random_model(plan, frozen)
    plain, slopes = learned(gpt, samples, len(samples), None, packed=False)
    assert set(slopes) == plan.trained
    ways = [{"packed": False}, {"packed": True, "share": False}, {"packed": True, "share": True}]
    for kept, way in product([False, True][: 1 + (plan.lowest > 0)], ways):
        prefix = kept_prefix(gpt, plan, samples) if kept else None
        sums, found = learned(gpt, samples, size, prefix, **way)
        assert sums.tolist() == pytest.approx(plain.tolist(), rel=1e-6), (kept, way)
        assert set(found) == plan.trained, (kept, way)
        assert norm(found[n] - slopes[n] for n in slopes) <= 1e-6 * norm(slopes.values()) + 1e-9, (kept, way)
        if kept:
            prefix.restore()


# --- whole runs -------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 1536, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
MODELS = {
    "llama": {"model_type": "llama", **GROUPED},
    "mistral": {"model_type": "mistral", **GROUPED, "sliding_window": 6, "tie_word_embeddings": True},
    "qwen3": {
        "model_type": "qwen3", **GROUPED, "head_dim": 16, "use_sliding_window": True, "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "gpt_neox": {"model_type": "gpt_neox", **SHAPE, "rotary_pct": 0.5, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 1536, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128,
        "initializer_range": 0.2,
    },
}  # fmt: skip
SYSTEM = "You are a careful clerk who files each request under the one label that fits it, and says no more."
PLAIN = {"packing": "off", "share_prompts": False, "cache": "off"}
EVERY = {"packing": "on", "share_prompts": True, "cache": "disk"}
# 27 records: steps of 8, 8, 8 and 3, each in micro-batches of 2, the last of which holds one; 24 steps
TRAIN = TrainArgs(
    lr=1e-3, epochs=6, global_batch_size=8, micro_batch_size=2, weight_decay=0.1, lr_warmup_steps=8,
    watch_interval=0,
)  # fmt: skip
EVAL = EvalArgs(max_new_tokens=1, interval=10, save_best=False)


def conversations() -> list[dict]:
    """36 chats of one to three turns under one system prompt. Of each three the second is answered otherwise and the
    third goes on where the first ends."""
    found = []
    for i in range(12):
        begin = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Play track {i} of the album."}]
        answer, other = ({"role": "assistant", "content": f"{word} {i}"} for word in ("music", "not a book"))
        more = [{"role": "user", "content": "And then?" * (i % 3 + 1)}, {"role": "assistant", "content": f"stop {i}"}]
        found += [[*begin, answer], [*begin, other], [*begin, answer, *more * (i % 2 + 1)]]
    return [{"messages": messages} for messages in found]


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("records") / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, conversations())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(model): a checkpoint of one of `MODELS`, random."""
    root = tmp_path_factory.mktemp("models")

    def make(model: str) -> Path:
        if not (root / model).exists():
            write_json(root / f"{model}.json", MODELS[model])
            init(out_dir=root / model, config_file=root / f"{model}.json")
        return root / model

    return make


class Runs:
    """Runs in `folder`, each under a name of its own, and what they left."""

    def __init__(self, folder: Path, chats: Path) -> None:
        self.folder = folder
        self.chats = chats

    def __call__(self, name: str, how: dict, script=finetune_full, train: TrainArgs = TRAIN, data=(), **words):
        """Losses of all steps and validations, and the final weights. `how` names what is spared."""
        ours = {field.name for field in fields(FrozenArgs)}
        frozen = FrozenArgs(**{"cache_dir": self.folder / "cache", **{k: v for k, v in how.items() if k in ours}})
        batches = {key: value for key, value in how.items() if key not in ours}
        words = {
            "place": PlaceArgs("32-true"),
            **words,
            **({"save_dtype": "float32"} if script is finetune_full else {}),
        }
        data = DataArgs(**{"path": self.chats, "val_split_fraction": 0.25, **dict(data), **batches})
        script(out_dir=self.folder / name, data=data, train=train, eval=EVAL, frozen=frozen, **words)
        return self.left(name)

    def left(self, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        with (self.folder / name / "metrics.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        losses = [float(row[column]) for row in rows for column in ("train_loss", "val_loss") if row[column]]
        return losses, load_file(next((self.folder / name / "final").glob("*.safetensors")))


@pytest.fixture
def run(tmp_path, chats) -> Runs:
    return Runs(tmp_path, chats)


def check_same(found, plain, rel: float = 1e-5) -> None:
    """Losses and weights agree, each tensor by its norm. Left out is the bias of keys: where it is not rotated it
    shifts all scores of a query alike, so that its gradient is rounding alone, of which AdamW makes whole steps, to no
    effect. What AdamW makes elsewhere of gradients that are next to none is small enough behind a warmup."""
    assert plain[0][-1] < 0.98 * plain[0][0]  # there was something to learn
    assert len(found[0]) == len(plain[0]) and found[0] == pytest.approx(plain[0], rel=rel)
    assert set(found[1]) == set(plain[1])
    for name, weight in plain[1].items():
        if not name.endswith("k_proj.bias"):
            assert (found[1][name] - weight).norm() <= rel * weight.norm(), name


def same_bits(a, b) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][name], b[1][name]) for name in a[1] | b[1])


ALONE = {
    "no pads": {**PLAIN, "packing": "on"},
    "shared beginnings": {**PLAIN, "packing": "on", "share_prompts": True},
    "prefix in memory": {**PLAIN, "cache": "ram"},
    "prefix on disk": {**PLAIN, "cache": "disk"},
    "prefix block by block": {**PLAIN, "cache": "disk", "stream_frozen": True},
}


def test_each_saving_alone_changes_nothing(run, base, capsys):
    words = {"checkpoint_dir": base("mistral"), "trainable_layers": "2,3"}
    plain = run("plain", PLAIN, **words)
    for name, how in ALONE.items():
        capsys.readouterr()
        check_same(run(name, {**how, "cache_dir": run.folder / f"cache of {name}"}, **words), plain)
        assert ("run once per record" in capsys.readouterr().out) == (how["cache"] != "off")


LORA = {"script": finetune_lora, "lora_dropout": 0.0}
TOGETHER = {
    "selective": ("mistral", {"trainable_layers": "1,3"}),
    "with extras": ("qwen3", {"trainable_layers": "-1", "trainable_extra": "head,final_norm"}),
    "modules": ("gpt_neox", {"trainable_layers": "1-2", "trainable_modules": "attn,norm"}),
    "last block": ("gpt2", {"trainable_layers": "-1"}),
    "extras alone": ("llama", {"trainable_layers": "none", "trainable_extra": "head,final_norm"}),
    "full": ("llama", {}),
    "every token": ("qwen3", {"trainable_layers": "2,3", "data": {"mask_prompt": False}}),
    "text": ("llama", {"trainable_layers": "2-3", "data": {"path": "text.txt", "max_seq_length": 32}}),
    "LoRA": ("qwen3", {**LORA, "trainable_layers": "2,3", "lora_targets": "q_proj,down_proj", "use_dora": True}),
    "LoRA on the head": ("gpt2", {**LORA, "trainable_layers": "none", "lora_targets": "head"}),
    "thawing": ("mistral", {"thaw": ThawArgs(unfreeze="0:3; 7:2; 50%:1; 80%:freeze 3")}),
    "thawing to the bottom": ("qwen3", {"thaw": ThawArgs(unfreeze="0:3; 10:0-2")}),
    "LISA": ("gpt2", {"trainable_layers": "1-3", "thaw": ThawArgs(lisa_layers=1, lisa_interval=5)}),
    "LoRA thawing": ("llama", {**LORA, "thaw": ThawArgs(unfreeze="gradual:3"), "lora_plus_ratio": 4.0}),
    "LoRA and full": ("mistral", {**LORA, "trainable_layers": "3", "full_layers": "2"}),
}


IN_CI = ("selective", "full", "text", "LoRA", "thawing to the bottom", "LISA", "LoRA and full")


@pytest.mark.parametrize(
    "plan", [pytest.param(plan, marks=() if plan in IN_CI else pytest.mark.matrix) for plan in TOGETHER]
)
def test_all_savings_together_change_nothing(run, base, plan):
    model, words = TOGETHER[plan]
    words = {"checkpoint_dir": base(model), **words}
    if plan == "text":
        (run.folder / "text.txt").write_text("It was a bright cold day, and the clocks were striking. " * 60, "utf-8")
        words["data"] = {**words["data"], "path": run.folder / "text.txt"}
    every = {**EVERY, "cache": "off"} if plan == "full" else EVERY
    check_same(run("every", every, **words), run("plain", PLAIN, **words))


def test_in_bf16_mixed_they_agree_to_its_rounding(run, base):
    """bf16 has 8 bits, a relative 4e-3; sums over different rows round differently."""
    words = {"checkpoint_dir": base("llama"), "trainable_layers": "2,3", "place": PlaceArgs("bf16-mixed")}
    every = run("every", EVERY, **words)
    check_same(every, run("plain", PLAIN, **words), rel=4e-3)
    assert same_bits(run("again", EVERY, **words), every)


# --- what goes on with a cache ----------------------------------------------------------------------------------------


def test_a_second_run_has_the_bits_of_the_first_and_other_options_its_cache(run, base, capsys):
    words = {"checkpoint_dir": base("llama"), "trainable_layers": "2,3"}
    first = run("first", EVERY, **words)
    capsys.readouterr()
    assert same_bits(run("second", EVERY, **words), first)
    run("third", EVERY, train=replace(TRAIN, lr=1e-4, micro_batch_size=4), seed=3, **words)
    # What stands above the prefix does not matter: the first run's own outcome finds what its base left
    run("fourth", EVERY, checkpoint_dir=run.folder / "first/final", trainable_layers="2,3")
    assert capsys.readouterr().out.count("36 of 36 records known") == 3


@pytest.mark.parametrize(
    "cache", ["disk", *(pytest.param(cache, marks=pytest.mark.matrix) for cache in ("ram", "off"))]
)
def test_a_resumed_run_is_its_twin_to_the_bit(run, base, monkeypatch, cache):
    """The interruption falls into an epoch, and the prefix is made in several goes."""
    monkeypatch.setattr(prefix_module, "AT_ONCE", 300)
    how, train = {**EVERY, "cache": cache}, replace(TRAIN, save_interval=5)
    words = {"checkpoint_dir": base("qwen3"), "trainable_layers": "2,3", "train": train}
    twin = run("twin", {**how, "cache_dir": run.folder / "another cache"}, **words)
    with ctrl_c_in_step(13), pytest.raises(KeyboardInterrupt):
        run("cut", how, **words)
    finetune_full(resume=run.folder / "cut")
    assert same_bits(run.left("cut"), twin)


OTHERS = {
    "weights": ({}, {}),
    "precision": ({}, {"place": PlaceArgs("bf16-mixed")}),
    "blocks": ({}, {"trainable_layers": "1,3"}),
    "dtype": ({"cache_dtype": "bfloat16"}, {}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_cache_never_leads_to_other_losses(run, base, change, capsys):
    spared, other = OTHERS[change]
    how, few = {**EVERY, **spared}, replace(TRAIN, epochs=1, lr_warmup_steps=None)
    words = {"checkpoint_dir": base("llama"), "trainable_layers": "2,3", "train": few}
    before = run("before", EVERY, **words)
    words |= other
    if change == "weights":
        words["checkpoint_dir"] = shutil.copytree(base("llama"), run.folder / "other")
        weights = load_file(run.folder / "other/litfreeze.safetensors")
        weights["blocks.1.mlp.down_proj.weight"][3] *= -1
        save_file(weights, run.folder / "other/litfreeze.safetensors")
    capsys.readouterr()
    after = run("after", how, **words)
    assert "records known" not in capsys.readouterr().out
    assert same_bits(after, run("alone", {**how, "cache_dir": run.folder / "another cache"}, **words))
    assert after[0] != before[0]
