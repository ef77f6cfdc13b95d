"""A classifier made of a language model: the same checkpoint with a fresh head in place of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from litfreeze.checkpoint.checkpoint import Checkpoint, InMemory
from litfreeze.checkpoint.convert.hf import CLASSIFIERS
from litfreeze.config import Config
from litfreeze.errors import UsageError

HEAD = "head.weight"


def as_classifier(checkpoint: Checkpoint, labels: Sequence[str], seed: int) -> Checkpoint:
    """`checkpoint`, a language model, as a classifier of `labels`. Its head is drawn from a normal distribution of the
    config's initializer_range, in the dtype that the embedding is stored in.

    It stands over the language model and goes by its path, prompt and history until it is written. An adapter stays.
    Raises UsageError if there is one on the head."""
    if checkpoint.lora is not None and "head" in checkpoint.lora.ranks:
        raise UsageError(
            f"{checkpoint.path} adapts the head, which a classifier does not keep. Fold the adapter in with "
            "litfreeze merge_lora first."
        )
    hf_config = classifier_config(checkpoint.hf_config, labels)
    config = Config.from_hf(hf_config, f"{checkpoint.path} as a classifier")
    generator = torch.Generator().manual_seed(seed)
    head = torch.normal(0.0, config.initializer_range, (len(labels), config.n_embd), generator=generator)
    kept = [name for name in checkpoint.tensors if checkpoint.base is not None and name != HEAD]
    tensors = {name: checkpoint.tensors[name] for name in kept} | {HEAD: head.to(checkpoint.dtype("embed.weight"))}
    return replace(
        checkpoint,
        hf_config=hf_config,
        config=config,
        tensors=InMemory(tensors),
        dtypes={name: checkpoint.dtypes[name] for name in kept} | {HEAD: tensors[HEAD].dtype},
        base=checkpoint.whole,
        aliases={},
        manifest=checkpoint.without_hashes(),
    )


def classifier_config(hf: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The config.json of a language model as that of its classifier.

    transformers takes the class after the last token that is no pad, so that it needs to know one: else the end of a
    text."""
    ends = hf.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    pad = hf.get("pad_token_id")
    return {
        **{name: value for name, value in hf.items() if name not in ("num_labels", "_num_labels")},
        "architectures": [CLASSIFIERS[hf["model_type"]]],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "pad_token_id": end if pad is None or pad < 0 else pad,
    }
