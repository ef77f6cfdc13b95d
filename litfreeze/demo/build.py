"""Makes the embedded default from public text, with litfreeze's own commands, and writes its card.

    python -m litfreeze.demo.build --sources DIR --work_dir out/demo

DIR holds `gsm8k/train.jsonl` (question, answer), `snips/train.jsonl` and `snips/validate.jsonl` (prompt, completion),
and `tinyshakespeare.txt`. Takes about half an hour on two cores; `--work_dir` keeps the runs behind the card's figures."""

import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from litfreeze.demo import MODEL_DIR, TRAIN_FILE, VAL_FILE

LABELS = 300
SEEDS = (1, 2, 3)
VOCAB_SIZE = 1536
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PRETRAIN_LR, PRETRAIN_EPOCHS, WINDOW = 3e-3, 1, 255


def build(sources: Path, work_dir: Path, seed: int = 1337) -> None:
    """Writes litfreeze/demo/{model,data,CARD.md}.

    Args:
        sources: The folder of public text.
        work_dir: Where the runs are kept; must be new.
        seed: Fixes every draw.
    """
    from litfreeze.data.args import DataArgs
    from litfreeze.finetune.full import setup as finetune_full
    from litfreeze.scripts.init import setup as init
    from litfreeze.train.args import EvalArgs, TrainArgs

    work_dir.mkdir(parents=True)
    utterances = read_jsonl(sources / "snips/train.jsonl")
    held_out = read_jsonl(sources / "snips/validate.jsonl")
    questions = read_jsonl(sources / "gsm8k/train.jsonl")
    plays = (sources / "tinyshakespeare.txt").read_text(encoding="utf-8")
    write_labelled(utterances, held_out, seed)

    texts = pretraining_texts(utterances, held_out, questions, plays, seed)
    text_file = work_dir / "pretraining.jsonl"
    text_file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    train_tokenizer(texts, work_dir / "tokenizer")

    init(tokenizer_dir=work_dir / "tokenizer", out_dir=work_dir / "random", preset="demo", seed=seed)
    pretrained = finetune_full(
        checkpoint_dir=work_dir / "random",
        out_dir=work_dir / "pretraining",
        data=DataArgs(path=text_file, max_seq_length=WINDOW, val_split_fraction=0.03),
        train=TrainArgs(
            lr=PRETRAIN_LR, epochs=PRETRAIN_EPOCHS, global_batch_size=16, micro_batch_size=16, lr_warmup_steps=40,
            weight_decay=0.05,
        ),
        eval=EvalArgs(save_best=False),
        save_dtype="bfloat16",
        seed=seed,
    )  # fmt: skip
    publish(pretrained.checkpoint_dir)

    bases = {"pretrained": MODEL_DIR, "random": work_dir / "random"}
    scores = {
        name: [_demo_run(base, work_dir / f"{name}-{s}", s).outcome for s in SEEDS] for name, base in bases.items()
    }
    write_card(pretrained, scores)


def _demo_run(base: Path, out_dir: Path, seed: int) -> Any:
    """What `litfreeze finetune full --trainable_layers 10,11` does, over `base`."""
    from litfreeze.demo import TRAIN_DEFAULTS
    from litfreeze.finetune.full import setup as finetune_full
    from litfreeze.train.args import TrainArgs

    return finetune_full(
        checkpoint_dir=base, out_dir=out_dir, trainable_layers="10,11", train=TrainArgs(**TRAIN_DEFAULTS), seed=seed
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_labelled(utterances: list[dict], held_out: list[dict], seed: int) -> None:
    """300 labelled utterances to learn from, and the held-out ones that do not stand among all utterances too."""
    known = {record["prompt"] for record in utterances}
    rng = random.Random(seed)
    for path, records in (
        (TRAIN_FILE, rng.sample(utterances, LABELS)),
        (VAL_FILE, [record for record in held_out if record["prompt"] not in known]),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({k: r[k] for k in ("prompt", "completion")}, ensure_ascii=False) for r in records)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def pretraining_texts(
    utterances: list[dict], held_out: list[dict], questions: list[dict], plays: str, seed: int
) -> list[str]:
    """What the base reads: word problems as a chat, plays as they are, and utterances cut in two, the second part as
    the answer to the first. No label is among it, and no held-out utterance."""
    rng = random.Random(seed)
    texts = [f"<|user|>{q['question']}<|end|><|assistant|>{q['answer']}" for q in questions[:2500]]
    speeches = plays.split("\n\n")
    texts += ["\n\n".join(speeches[i : i + 8]) for i in range(0, len(speeches), 8)]
    secret = {record["prompt"] for record in held_out}
    for _ in range(2):  # twice, cut in another place
        for record in utterances:
            words = record["prompt"].split()
            if record["prompt"] in secret or len(words) < 2:
                continue
            at = rng.randint(1, len(words) - 1)
            texts.append(f"<|user|>{' '.join(words[:at])}<|end|><|assistant|>{' '.join(words[at:])}")
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts: Iterable[str], directory: Path) -> None:
    """Byte-level BPE with the chat's four special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (part for text in texts for part in text.replace("<|end|>", "<|user|>").split("<|user|>"))
    tokenizer.train_from_iterator((part.replace("<|assistant|>", "") for part in plain), trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def publish(checkpoint_dir: Path) -> None:
    """Puts the pretrained checkpoint into the package as a base: what it was trained from stays outside."""
    from litfreeze.checkpoint.directory import open_checkpoint, write_checkpoint

    source = open_checkpoint(checkpoint_dir)
    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    write_checkpoint(MODEL_DIR, source.hf_config, source.layout(), source.read, {"kind": "base"}, source.path)


def write_card(pretrained: Any, scores: dict[str, list[Any]]) -> None:
    """CARD.md from the figures of the runs."""

    def percent(name: str, when: str) -> str:
        values = [100 * getattr(outcome, when).exact_match for outcome in scores[name]]
        return f"{mean(values):.1f} % ({', '.join(f'{v:.1f}' for v in values)})"

    gain = 100 * (
        mean(o.after.exact_match for o in scores["pretrained"]) - mean(o.after.exact_match for o in scores["random"])
    )
    card = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    n_val = len(read_jsonl(VAL_FILE))
    card = card.format(
        labels=LABELS,
        n_val=n_val,
        seeds=len(SEEDS),
        tokens=f"{pretrained.outcome.tokens:,}",
        seconds=f"{pretrained.outcome.seconds:.0f}",
        loss_before=f"{pretrained.outcome.before.loss:.2f}",
        loss_after=f"{pretrained.outcome.after.loss:.2f}",
        before=percent("pretrained", "before"),
        after=percent("pretrained", "after"),
        random_before=percent("random", "before"),
        random_after=percent("random", "after"),
        gain=f"{gain:.1f}",
    )
    Path(__file__).with_name("CARD.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(build, as_positional=False)
