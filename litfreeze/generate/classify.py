"""`litfreeze classify`: the class of a text, or of every text in a file."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Optional

from litfreeze.data.args import TextArgs

TOP = 5  # classes shown of one text
MOST = 12  # classes shown with how many texts they got


def setup(
    checkpoint_dir: Path,
    text: Optional[str] = None,
    data: TextArgs = TextArgs(),
    out_csv: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    top: int = TOP,
    precision: Optional[Literal["32-true", "bf16-true"]] = None,
    accelerator: str = "auto",
) -> list[str]:
    """Tell the class of a text, or of the texts in a file, with a classifier made by finetune --task classification.

    Args:
        checkpoint_dir: A classifier: litfreeze's, whole or over its base, or Hugging Face's.
        text: What to classify.
        data: Texts to classify, in place of one.
        out_csv: Write where it stands, text, class and probability of every record of the data there.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        top: Show the probabilities of so many classes.
        precision: By default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
    """
    from litfreeze.checkpoint.load import load_model
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.data.classes import read_labelled, tokenise
    from litfreeze.data.counts import Counts
    from litfreeze.data.samples import max_length
    from litfreeze.errors import UsageError
    from litfreeze.generate.classes import likeliest, probabilities
    from litfreeze.launch import one_device
    from litfreeze.whole import check_new_file

    data = data if isinstance(data, TextArgs) else TextArgs(path=Path(data))
    if (text is None) == (data.path is None):
        raise UsageError("Say what to classify: either --text '…', or --data and a file of texts.")
    if out_csv is not None and data.path is None:
        raise UsageError("--out_csv is for the answers to --data.")
    check_new_file("out_csv", out_csv)
    if top != TOP and data.path is not None:
        raise UsageError("--top is for --text; --out_csv has the likeliest class of each and its probability.")
    if top < 1:
        raise UsageError(f"--top {top} must be at least 1.")
    checkpoint = open_checkpoint(checkpoint_dir, base_dir)
    labels = checkpoint.config.labels
    if not labels:
        raise UsageError(
            f"{checkpoint.path} is a language model. Make a classifier of it with litfreeze finetune full "
            f"--task classification --checkpoint_dir {checkpoint.path} --data FILE."
        )
    length = max_length(data, checkpoint.config.block_size)
    if data.path is None:
        texts, known, sources, told = [text], [None], [""], ""
    else:
        counts = Counts()
        labelled = list(read_labelled(data.path, data, counts, data.split, needs_label=False))
        texts, known = [one.text for one in labelled], [one.label for one in labelled]
        sources, told = [one.source for one in labelled], counts.describe()
        strange = sorted({label for label in known if label is not None} - set(labels))
        if strange and data.label_key is not None:
            first = next(one.source for one in labelled if one.label == strange[0])
            raise UsageError(
                f"{data.path}: {strange[0]!r}, first at {first}, is no class of {checkpoint.path}. Its classes are "
                f"{', '.join(labels[:12])}{', …' if len(labels) > 12 else ''}."
            )
        if strange:  # no label was asked for: what stands there may be something else
            told += (
                f"\nNote      {strange[0][:40]!r} is no class of this model, so nothing is counted as right or wrong."
            )
            known = [None] * len(known)
    tokens = tokenise(texts, checkpoint.tokenizer(), length, checkpoint.hf_config.get("pad_token_id"))
    for text_given, (ids, _) in zip(texts, tokens, strict=True):
        if not ids:
            raise UsageError(f"The text {text_given[:40]!r} has no tokens.")
        checkpoint.check_tokens(ids)

    fabric, kept = one_device(accelerator, precision)
    model = load_model(checkpoint, lambda _: kept.frozen).to(fabric.device)
    shares = probabilities(model, [ids for ids, _ in tokens])  # (N, K)
    answers = [labels[i] for i in shares.argmax(1).tolist()]

    if data.path is None:
        for label, share in likeliest(shares[0], labels, top):
            print(f"{100 * share:6.2f} %  {label}")
        return answers
    _tell(told, labels, answers, known)
    if out_csv is not None:
        _write(Path(out_csv), zip(sources, texts, answers, shares.amax(1).tolist(), strict=True))
        print(f"Written   {out_csv}")
    return answers


def _tell(told: str, labels: Sequence[str], answers: Sequence[str], known: Sequence[Optional[str]]) -> None:
    """How many texts got which class and, of those whose class is known, how many the right one."""
    import numpy as np

    from litfreeze.confusion import accuracy, macro_f1

    given = Counter(answers).most_common()
    more = f", and {len(given) - MOST} classes more" if len(given) > MOST else ""
    print(f"Read      {told}")
    print(f"Classes   {', '.join(f'{label} ({count:,})' for label, count in given[:MOST])}{more}")
    ids = {label: i for i, label in enumerate(labels)}
    pairs = [(ids[label], ids[answer]) for label, answer in zip(known, answers, strict=True) if label is not None]
    if pairs:
        counts = np.zeros((len(labels), len(labels)), np.int64)
        np.add.at(counts, tuple(np.array(pairs).T), 1)
        figures = f"accuracy {100 * accuracy(counts):.1f} %, macro F1 {100 * macro_f1(counts):.1f} %"
        print(f"Right     {figures} of {len(pairs):,} texts whose class is known")


def _write(path: Path, rows: Iterable[tuple[str, str, str, float]]) -> None:
    """A row for each text, in the order of the file: where it stands in it, the text, its class, the probability."""
    import csv
    import io

    from litfreeze.whole import write_text

    written = io.StringIO(newline="")
    table = csv.writer(written, lineterminator="\n")
    table.writerow(("source", "text", "label", "probability"))
    table.writerows((*row, f"{share:.6f}") for *row, share in rows)
    write_text(path, written.getvalue())
