"""Makes the embedded default from public text, with litfreeze's own commands, and writes its card.

    python -m litfreeze.demo.build --sources DIR --work_dir out/demo

DIR holds `gsm8k/train.jsonl` (question, answer), `snips/train.jsonl`, `snips/validate.jsonl` (prompt, completion) and
`tinyshakespeare.txt`. Takes about half an hour on two cores; `--work_dir` keeps the runs behind the card's figures."""

import json
import random
import re
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
QUESTIONS = 2500


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

    texts = plain_texts(questions, plays, seed)
    text_file = write_jsonl(work_dir / "texts.jsonl", [{"text": text} for text in texts])
    secret = {record["prompt"] for record in held_out}
    open_utterances = [record["prompt"] for record in utterances if record["prompt"] not in secret]
    half_file = write_jsonl(work_dir / "halves.jsonl", halves(open_utterances * 2, seed))
    unseen = [record["prompt"] for record in read_jsonl(VAL_FILE)]
    unseen_half_file = write_jsonl(work_dir / "unseen_halves.jsonl", halves(unseen, seed))
    train_tokenizer([*texts, *open_utterances], work_dir / "tokenizer")

    init(tokenizer_dir=work_dir / "tokenizer", out_dir=work_dir / "random", preset="demo", seed=seed)
    on_text = finetune_full(
        checkpoint_dir=work_dir / "random",
        out_dir=work_dir / "on_text",
        data=DataArgs(path=text_file, max_seq_length=255, val_split_fraction=0.03),
        train=TrainArgs(lr=3e-3, epochs=2, global_batch_size=8, micro_batch_size=8, weight_decay=0.05),
        eval=EvalArgs(save_best=False),
        save_dtype="float32",
        seed=seed,
    )
    on_halves = finetune_full(
        checkpoint_dir=on_text.checkpoint_dir,
        out_dir=work_dir / "on_halves",
        data=DataArgs(path=half_file, val_path=unseen_half_file, mask_prompt=False),
        train=TrainArgs(lr=2e-3, epochs=1, global_batch_size=16, micro_batch_size=16, weight_decay=0.05),
        eval=EvalArgs(save_best=False),
        save_dtype="bfloat16",
        seed=seed,
    )
    publish(on_halves.checkpoint_dir)

    all_labels = write_jsonl(work_dir / "all_labels.jsonl", (r for r in utterances if r["prompt"] not in secret))
    write_card(on_text.outcome, on_halves.outcome, measure(work_dir, all_labels), alike(unseen, open_utterances))


def measure(work_dir: Path, all_labels: Path) -> dict[str, list[Any]]:
    """The runs behind the card, three seeds each: what the first command does, and what it is held against."""
    from litfreeze.data.args import DataArgs
    from litfreeze.demo import TRAIN_DEFAULTS
    from litfreeze.finetune.full import setup as finetune_full
    from litfreeze.train.args import EvalArgs, TrainArgs

    random_base = work_dir / "random"
    few, many = TrainArgs(**TRAIN_DEFAULTS), TrainArgs(lr=TRAIN_DEFAULTS["lr"], epochs=1)
    everyone = DataArgs(path=all_labels, val_path=VAL_FILE)
    choices = {
        "pretrained": (MODEL_DIR, "10,11", DataArgs(), few),
        "random": (random_base, "10,11", DataArgs(), few),
        "first": (MODEL_DIR, "0,1", DataArgs(), few),
        "pretrained_all": (MODEL_DIR, "10,11", everyone, many),
        "random_all": (random_base, "10,11", everyone, many),
    }
    return {
        name: [
            finetune_full(
                checkpoint_dir=base,
                out_dir=work_dir / f"{name}-{seed}",
                trainable_layers=layers,
                data=data,
                train=train,
                eval=EvalArgs(save_best=False),
                seed=seed,
            ).outcome
            for seed in SEEDS
        ]
        for name, (base, layers, data, train) in choices.items()
    }


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_labelled(utterances: list[dict], held_out: list[dict], seed: int) -> None:
    """300 labelled utterances to learn from, and the held-out ones that do not stand among all utterances too."""
    known = {record["prompt"] for record in utterances}
    rng = random.Random(seed)
    for path, records in (
        (TRAIN_FILE, rng.sample(utterances, LABELS)),
        (VAL_FILE, [record for record in held_out if record["prompt"] not in known]),
    ):
        write_jsonl(path, ({key: record[key] for key in ("prompt", "completion")} for record in records))


def plain_texts(questions: list[dict], plays: str, seed: int) -> list[str]:
    """Word problems with their answers, as a chat, and plays in pieces of eight speeches."""
    texts = [f"<|user|>{q['question']}<|end|><|assistant|>{q['answer']}" for q in questions[:QUESTIONS]]
    speeches = plays.split("\n\n")
    texts += ["\n\n".join(speeches[i : i + 8]) for i in range(0, len(speeches), 8)]
    random.Random(seed).shuffle(texts)
    return texts


def halves(utterances: list[str], seed: int) -> list[dict[str, str]]:
    """Every utterance cut in two at a random word, the second half as the answer to the first."""
    rng = random.Random(seed)
    records = []
    for words in (utterance.split() for utterance in utterances):
        if len(words) > 1:
            at = rng.randint(1, len(words) - 1)
            records.append({"prompt": " ".join(words[:at]), "completion": " ".join(words[at:])})
    return records


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
    special = re.compile("|".join(map(re.escape, SPECIAL)))
    tokenizer.train_from_iterator((part for text in texts for part in special.split(text)), trainer)
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
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.checkpoint.write import write_checkpoint

    source = open_checkpoint(checkpoint_dir)
    shutil.rmtree(MODEL_DIR, ignore_errors=True)
    write_checkpoint(MODEL_DIR, source.hf_config, source.layout(), source.read, {"kind": "base"}, source.path)


def alike(utterances: Iterable[str], others: Iterable[str]) -> int:
    """How many of `utterances` stand among `others` once case and punctuation are left aside."""

    def bare(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    known = {bare(text) for text in others}
    return sum(bare(text) in known for text in utterances)


def write_card(on_text: Any, on_halves: Any, scores: dict[str, list[Any]], n_alike: int) -> None:
    """CARD.md from the figures of the runs."""

    def percent(name: str, when: str) -> str:
        values = [100 * getattr(outcome, when).exact_match for outcome in scores[name]]
        return f"{mean(values):.1f} % ({', '.join(f'{v:.1f}' for v in values)})"

    gain = 100 * (
        mean(o.after.exact_match for o in scores["pretrained"]) - mean(o.after.exact_match for o in scores["random"])
    )
    card = Path(__file__).with_name("card_template.md").read_text(encoding="utf-8")
    card = card.format(
        labels=LABELS,
        alike=n_alike,
        n_val=len(read_jsonl(VAL_FILE)),
        questions=f"{QUESTIONS:,}",
        seeds=len(SEEDS),
        text_tokens=f"{on_text.tokens:,}",
        text_loss=f"{on_text.before.loss:.2f} to {on_text.after.loss:.2f}",
        half_tokens=f"{on_halves.tokens:,}",
        half_loss=f"{on_halves.before.loss:.2f} to {on_halves.after.loss:.2f}",
        seconds=f"{on_text.seconds + on_halves.seconds:.0f}",
        before=percent("pretrained", "before"),
        after=percent("pretrained", "after"),
        random_before=percent("random", "before"),
        random_after=percent("random", "after"),
        first_before=percent("first", "before"),
        first_after=percent("first", "after"),
        pretrained_all=percent("pretrained_all", "after"),
        random_all=percent("random_all", "after"),
        gain=f"{gain:.1f}",
    )
    Path(__file__).with_name("CARD.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(build, as_positional=False)
