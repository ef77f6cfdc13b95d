"""A byte-level tokenizer with chat tokens, written with or without a chat template."""

import json
from functools import cache

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from litfreeze.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """make_tokenizer(template=None, eos="</s>", bos=False): a Tokenizer; its folder is `.path`."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["user assistant system the quick brown fox jumps over the lazy dog"] * 4, trainer)
    plain = backend.to_str()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    with_bos = backend.to_str()

    @cache
    def make(template=None, eos="</s>", bos=False):
        path = tmp_path_factory.mktemp("tokenizer")
        (path / "tokenizer.json").write_text(with_bos if bos else plain, encoding="utf-8")
        config = {"bos_token": "<s>", "eos_token": eos, "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer = Tokenizer.from_dir(path)
        tokenizer.path = path
        return tokenizer

    return make
