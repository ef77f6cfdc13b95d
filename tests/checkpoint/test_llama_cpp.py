"""What `to_gguf` writes, run by the real llama.cpp: the same tokens for a text, and the same model."""

import json
import os
import random
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from families import FAMILIES, for_llama_cpp, random_tokens, saved_model, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from litfreeze.checkpoint.convert.gguf_file import GGUFFile, write_gguf
from litfreeze.checkpoint.convert.gguf_tokenizer import LLAMA3, QWEN2, SPLITS
from litfreeze.checkpoint.load import load_model
from litfreeze.checkpoint.open import open_checkpoint
from litfreeze.config import Config
from litfreeze.demo import MODEL_DIR
from litfreeze.errors import UsageError
from litfreeze.model import GPT
from litfreeze.scripts.convert import from_gguf, to_gguf

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (pip install xllamacpp) is not installed")


class LlamaCpp:
    """llama.cpp's own server over one file, in this process, in float32 throughout."""

    def __init__(self, path, n_ctx=256):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.port = str(path), n_ctx, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = params.n_threads_http = 1
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        self.server = xllamacpp.Server(params)

    def ask(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def encode(self, text, special_tokens=False):
        return self.ask("/tokenize", content=text, add_special=special_tokens, parse_special=True)["tokens"]

    def greedy(self, prompt, n):
        answer = self.ask("/completion", prompt=prompt, n_predict=n, temperature=0, return_tokens=True)
        return answer["tokens"]

    def ends(self, tokens):
        """Those of `tokens` that end an answer."""

        def stop(token):
            return self.ask("/completion", prompt=[5], n_predict=2, temperature=0, logit_bias=[[token, 1e6]])[
                "stop_type"
            ]

        return {token for token in tokens if stop(token) == "eos"}

    def log_probabilities(self, prompt, vocab_size):
        """Those of every token after `prompt`: (vocab_size,)."""
        plain = self.encode("a")[0]  # what is sampled matters not, but behind an end or half a letter nothing is told
        answer = self.ask(
            "/completion", prompt=prompt, n_predict=1, n_probs=vocab_size, temperature=0, logit_bias=[[plain, 1000]]
        )
        found = torch.full((vocab_size,), float("nan"))
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


@torch.no_grad()
def our_log_probabilities(model, prompt):
    tokens = torch.tensor([prompt])
    return torch.log_softmax(model(tokens)[0, -1].float(), -1)


def our_greedy(model, prompt, n, ends):
    found = []
    while len(found) < n and not (found and found[-1] in ends):
        found.append(int(our_log_probabilities(model, prompt + found).argmax()))
    return found


# --- the same model ---------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1539,  # three more than the demo's tokenizer has
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
GPT2 = {"model_type": "gpt2", "vocab_size": 1539, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 128}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
NEOX |= {"model_type": "gpt_neox", "tie_word_embeddings": False}
GEMMA = LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
GEMMA2 = GEMMA | {"model_type": "gemma2", "num_hidden_layers": 3}
GEMMA3 = GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7}
DEEP = {"hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 3, "num_key_value_heads": 1}
DEEP |= {"query_pre_attn_scalar": 8}
OLMO2 = LLAMA | {"model_type": "olmo2", "tie_word_embeddings": False}
PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": None}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.25], "long_factor": [2.0, 3.5]}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True}
MODELS = {
    "llama": LLAMA,
    "llama, own head, eps": LLAMA | {"tie_word_embeddings": False, "rms_norm_eps": 1e-2, "rope_theta": 500.0},
    "llama, wide heads": LLAMA | {"head_dim": 16},
    "llama, biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama 3": LLAMA | {"rope_theta": 500.0, "rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 64}},
    "llama, linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 3.5}},
    "llama, yarn": LLAMA | {"rope_theta": 100.0, "rope_scaling": YARN},
    "llama, yarn, temperature": LLAMA | {"rope_theta": 100.0, "rope_scaling": {**YARN, "attention_factor": 0.8}},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "mistral, window": LLAMA | {"model_type": "mistral", "sliding_window": 48},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2, own head, yarn": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False, "rope_scaling": YARN},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gpt2": GPT2,
    "gpt2, own head": GPT2 | {"tie_word_embeddings": False, "n_inner": 40},
    "gpt_neox": NEOX,
    "gpt_neox, sequential": NEOX | {"use_parallel_residual": False, "rotary_pct": 0.5},
    "olmo2": OLMO2,
    "olmo2, yarn": OLMO2 | {"rope_theta": 100.0, "rope_scaling": YARN},
    "phi3": PHI3,
    "phi3, a share, window": PHI3 | {"partial_rotary_factor": 0.5, "sliding_window": 48},
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE | {"head_dim": 16, "moe_intermediate_size": 24},
}
GEMMAS = {
    "gemma2": GEMMA2,
    "gemma2, caps, linear": GEMMA2
    | {
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.5},
    },
    "gemma2, windows only": GEMMA2 | {"layer_types": ["sliding_attention"] * 3},
    "gemma2, 46 blocks": GEMMA2 | DEEP | {"num_hidden_layers": 46},
    "gemma3": GEMMA3,
    "gemma3, pattern, bases, own head": GEMMA3
    | {
        "num_hidden_layers": 4,
        "sliding_window_pattern": 2,
        "rope_theta": 500.0,
        "rope_local_base_freq": 30.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": False,
    },
    "gemma3, no window, cap": GEMMA3
    | {"num_hidden_layers": 2, "sliding_window_pattern": 1, "final_logit_softcapping": 3.0},
    "gemma3, 62 blocks": GEMMA3 | DEEP | {"num_hidden_layers": 62},
}
# llama.cpp looks GELU up in a table of float16, and GPT-NeoX's is approximated besides
WITHIN = {"gpt2": 5e-3, "gpt_neox": 5e-3}


def converted(fields, folder, n_ctx=256, weights=1.0):
    """A random model of `fields` with the demo's tokenizer, its weights times `weights`: our checkpoint and model, and
    llama.cpp with its file."""
    with saved_model(fields) as (saved, _):
        shutil.copytree(saved, folder / "model")
    stored = load_file(folder / "model" / "model.safetensors")
    save_file({k: v * weights for k, v in stored.items()}, folder / "model" / "model.safetensors", {"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / file, folder / "model" / file)
    checkpoint = open_checkpoint(folder / "model")
    model = load_model(checkpoint, lambda _: torch.float32)
    return checkpoint, model, LlamaCpp(to_gguf(folder / "model", folder / "model.gguf", "f32"), n_ctx)


def agree(model, theirs, within, lengths=(1, 2, 36)):
    """Log-probabilities after prompts of these lengths; the last prompt."""
    for seed, length in enumerate(lengths):
        prompt = random_tokens(1536, 1, length, seed)[0].tolist()
        ours = our_log_probabilities(model, prompt)
        torch.testing.assert_close(theirs.log_probabilities(prompt, len(ours)), ours, atol=within, rtol=0)
    return prompt


def agree_on_answers(checkpoint, model, theirs, prompt):
    assert theirs.greedy(prompt, 12)[:12] == our_greedy(model, prompt, 12, checkpoint.tokenizer().eos_ids)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path):
    checkpoint, model, theirs = converted(MODELS[name], tmp_path)
    within = WITHIN.get(MODELS[name]["model_type"], 1e-3)
    prompt = agree(model, theirs, within)
    if within == 1e-3:
        agree_on_answers(checkpoint, model, theirs, prompt)


class InHalf(torch.nn.Module):
    """GELU as llama.cpp's table on a processor has it: of a float16, as a float16."""

    def forward(self, x):
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.parametrize("name", GEMMAS)
def test_llama_cpp_computes_the_same_gemma(name, tmp_path):
    """Far beyond the window too. Random weights are small here, so that depth does not magnify what GELU's table
    rounds; with the same table of ours nothing is left of the difference."""
    depth = GEMMAS[name]["num_hidden_layers"]
    checkpoint, model, theirs = converted(GEMMAS[name], tmp_path, weights={46: 0.2, 62: 0.1}.get(depth, 0.3))
    agree(model, theirs, 5e-3)
    for block in model.blocks:
        block.mlp.activation = InHalf()
    prompt = agree(model, theirs, 1e-3, lengths=(1, 2, 36, 60))
    agree_on_answers(checkpoint, model, theirs, prompt)


NEWER = ("gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen3_moe")


@pytest.mark.parametrize("family", NEWER)
@settings(max_examples=4)
@given(data=st.data())
def test_llama_cpp_computes_the_same_as_any(family, data, tmp_path_factory):
    fields = for_llama_cpp(data.draw(FAMILIES[family]))
    gemma = family.startswith("gemma")
    fields |= {} if gemma else {"sliding_window": None}  # a context of a few tokens is none to the server
    if "original_max_position_embeddings" in fields:  # the server runs for 256
        longer = {"max_position_embeddings": 4 * fields["max_position_embeddings"]}
        fields |= longer | {"original_max_position_embeddings": 256}
    try:
        _, model, theirs = converted(fields, tmp_path_factory.mktemp("any"), weights=0.3 if gemma else 1.0)
    except UsageError as error:
        assert Config.from_hf(fields).rope.kind in ("llama3", "yarn") and "llama.cpp's" in str(error)
        return
    if gemma:
        for block in model.blocks:
            block.mlp.activation = InHalf()
    agree(model, theirs, 1e-3, lengths=(1, 36))


def test_llama_cpp_turns_as_far_as_its_texts_are_long(tmp_path):
    """Phi-3's short factors if it is run for no more positions than the model was trained with, and its long ones."""
    sizes = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
    fields = PHI3 | sizes | {"partial_rotary_factor": 0.5, "rope_scaling": LONGROPE}
    checkpoint, model, theirs = converted(fields, tmp_path)
    agree_on_answers(checkpoint, model, theirs, agree(model, theirs, 1e-3))
    rope = replace(model.config.rope, factors=tuple(LONGROPE["long_factor"]))
    longer = GPT(replace(model.config, rope=rope))
    longer.load_state_dict(model.state_dict())
    agree(longer, LlamaCpp(tmp_path / "model.gguf", 512), 1e-3)


def test_quantised_files_run(tmp_path):
    """The real model, which is the embedded one, in every format; its answers differ by no more than its bits do."""
    model = load_model(open_checkpoint(MODEL_DIR), lambda _: torch.float32)
    prompt = open_checkpoint(MODEL_DIR).tokenizer().encode("<|user|>play some jazz on spotify<|end|><|assistant|>")
    ours = our_log_probabilities(model, prompt)
    for dtype, within in {"f32": 1e-3, "f16": 2e-2, "bf16": 5e-2, "q8_0": 0.3, "q4_0": 3.0}.items():
        theirs = LlamaCpp(to_gguf(MODEL_DIR, tmp_path / f"{dtype}.gguf", dtype))
        found = theirs.log_probabilities(prompt, len(ours))
        torch.testing.assert_close(found, ours, atol=within, rtol=0)
        assert found.argmax() == ours.argmax()


def test_the_real_model_answers_as_ours(smollm2, tmp_path):
    checkpoint = open_checkpoint(smollm2)
    model = load_model(checkpoint, lambda _: torch.float32)
    tokenizer = checkpoint.tokenizer()
    text = tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}], True)
    prompt = tokenizer.encode(text)
    theirs = LlamaCpp(to_gguf(smollm2, tmp_path / "model.gguf", "f32"))
    assert theirs.encode(text) == prompt
    ours, found = our_log_probabilities(model, prompt), theirs.log_probabilities(prompt, 49152)
    torch.testing.assert_close(found, ours, atol=1e-3, rtol=0)
    assert theirs.greedy(prompt, 12) == our_greedy(model, prompt, 12, tokenizer.eos_ids)


GEMMA = os.environ.get("GEMMA_GGUF")


@pytest.mark.skipif(not GEMMA, reason="GEMMA_GGUF names no file of a real Gemma, whose terms are to be agreed to first")
def test_a_real_gemma_answers_as_ours(tmp_path):
    """Its file, and what we make of it in F32: the same tokens and answers. Log-probabilities differed by 0.013 behind
    5 tokens and 0.16 behind 586 (Gemma 3, 270M), which is llama.cpp's table of GELU: built without (GGML_GELU_FP16 in
    its vec.h), they differed by 3e-5 and 0.002, of which ours were 4e-4 from float64."""
    from_gguf(Path(GEMMA), tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    model, tokenizer = load_model(checkpoint, lambda _: torch.float32), checkpoint.tokenizer()
    theirs = LlamaCpp(to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32"), 1024)
    for some in texts(60):
        assert theirs.encode(some) == tokenizer.encode(some), some
    prompt = tokenizer.encode("The capital of France is")
    long = tokenizer.encode("The capital of France is Paris, that of Spain is Madrid. " * 45)  # over the window of 512
    assert len(long) > 512
    for tokens in (prompt, long):
        ours = our_log_probabilities(model, tokens)
        found = theirs.log_probabilities(tokens, len(ours))
        print(f"{len(tokens)} tokens: log-probabilities differ by at most {(found - ours).abs().max():.2g}")
        assert found.argmax() == ours.argmax()
        torch.testing.assert_close(found, ours, atol=0.5, rtol=0)
    assert theirs.greedy(prompt, 12) == our_greedy(model, prompt, 12, tokenizer.eos_ids)


# --- the same tokens --------------------------------------------------------------------------------------------------

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's WE'VE I'LL don't, 12 345 678 times. naïve café, x = y_1 + 2.5!",
    "你好世界。日本語のテスト 한국어 Привет, мир! שלום عربي हिन्दी ไทย 😀👩‍👩‍👧🏽 🇺🇸",
    "def f(a):\n    return a[0]\n\n\n\tif x:\r\n        pass  # a  b   c    d",
] * 3
NASTY = (
    "Hello,  world!   \n\n\n\tx=1234567; I'LL don't it's WE'VE 'S \r\n 3.14159 ½²③ ٣٤ Ⅷ héllo ﬁ ß İ ǆ "
    "q\u0303 x\u0327\u0323 日本語テスト한국어 Привет мир שָׁלוֹם عَرَبِي हिन्दी ไทย่ 😀👩\u200d👩\u200d👧🏽 🇺🇸 "
    "a\u00a0b\u2003c\u3000d\u2028e\u0085 \u200b\ufeff\u180e\x1c "
    "<|im_start|>user\nhi<|im_end|><s>  </s>[INST]<unk>  trailing   "
)
PIECES = [*NASTY, *SPECIAL, "  ", "\n\n", "'s", "'LL", "e\u0301", "A\u030a", "▁", "€", "_", "$"]


def texts(n, without=()):
    """NASTY, and `n` random mixtures of what stands in it."""
    chance = random.Random(0)
    pieces = [piece for piece in PIECES if piece not in without]
    yield NASTY if not without else "".join(letter for letter in NASTY if letter not in without)
    for _ in range(n):
        yield "".join(chance.choice(pieces) for _ in range(chance.randint(0, 40)))


def as_split(*steps):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def regex(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# How a text is split -> the name that llama.cpp has for it
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTE_LEVEL = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (pre_tokenizers.Sequence([DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)]), False),
    "llama-bpe": (as_split(regex(LLAMA3)), True),
    "dbrx": (as_split(regex(LLAMA3)), False),
    "qwen2": (as_split(regex(QWEN2)), False),
    "default": (as_split(*map(regex, SPLITS["default"][0])), False),
}


def write_byte_level(folder, name):
    pre_tokenizer, ignore_merges = BYTE_LEVEL[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["[INST]"])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if name == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_sentencepiece(folder):
    corpus = folder / "corpus"
    corpus.write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


@pytest.fixture
def with_tokenizer(tmp_path):
    """with_tokenizer(write): a tiny model's directory with the tokenizer that `write(folder)` puts there."""

    def make(write, vocab_size=1539):
        folder = tmp_path / "model"
        small = {"vocab_size": vocab_size, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1}
        with saved_model(LLAMA | small) as (saved, _):
            shutil.copytree(saved, folder)
        write(folder)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages }}"}
        if not (folder / "tokenizer_config.json").is_file():
            write_json(folder / "tokenizer_config.json", names)
        return folder

    return make


def differing(ours, theirs, some):
    """Texts that are tokenized differently, among `some`."""
    return [text for text in some if ours.encode(text) != theirs.encode(text)]


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_bytes_bpe_gives_the_same_tokens(name, with_tokenizer, tmp_path, capsys):
    source = with_tokenizer(lambda folder: write_byte_level(folder, name))
    ours = open_checkpoint(source).tokenizer()
    file = to_gguf(source, tmp_path / "model.gguf")
    theirs, back = LlamaCpp(file), open_checkpoint(from_gguf(file, tmp_path / "back")).tokenizer()
    some = list(texts(300))
    assert differing(back, theirs, some) == []
    assert ("NFC" in capsys.readouterr().out) == (name == "qwen2")
    if name == "qwen2":  # llama.cpp does not compose characters: on what is composed already they agree
        some = [ours._backend._tokenizer.normalizer.normalize_str(text) for text in some]
    assert differing(ours, theirs, some) == []
    assert theirs.encode("a b", special_tokens=True) == ours.encode("a b", special_tokens=True)
    assert back.encode("a b", special_tokens=True) == ours.encode("a b", special_tokens=True)
    assert (back.special_tokens, back.chat_template) == (ours.special_tokens, ours.chat_template)
    assert back.eos_ids == (2, 4) and theirs.ends(range(9)) == {2, 4}  # <|im_end|> by its text: no key names it
    assert [back.decode([i], False) for i in range(700)] == [ours.decode([i], False) for i in range(700)]


def test_sentencepiece_gives_the_same_tokens(with_tokenizer, tmp_path, capsys):
    source = with_tokenizer(write_sentencepiece)
    ours = open_checkpoint(source).tokenizer()
    file = to_gguf(source, tmp_path / "model.gguf")
    assert "puts a space before a text" in capsys.readouterr().out
    theirs = LlamaCpp(file)
    assert differing(ours, theirs, [text for text in texts(300, without=(*SPECIAL, "<")) if text[:1] != " "]) == []
    assert theirs.encode("a b", special_tokens=True) == ours.encode("a b", special_tokens=True)

    # As a tokenizer.json it does just what llama.cpp does, and so it does in the next file
    folder = from_gguf(file, tmp_path / "back")
    back = open_checkpoint(folder).tokenizer()
    assert differing(back, theirs, texts(300)) == []
    assert back.decode(back.encode(CORPUS[1]), False) == CORPUS[1]
    again = LlamaCpp(to_gguf(folder, tmp_path / "again.gguf"))
    assert "puts a space" not in capsys.readouterr().out
    assert differing(back, again, texts(100)) == []


def write_sentencepiece_json(folder, added, prefix):
    """SentencePiece's BPE as Gemma and Phi-3 have it: a tokenizer.json with a merge for every pair that makes a token.
    `added`: (text, whether special, whether it takes the white space behind it) of tokens beside, ids from 0 on."""
    write_sentencepiece(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "tokenizer.model").unlink()
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    made = [p for p in pieces if not p.startswith("<") or len(p) == 1]
    made += ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "\n"]
    vocab = list(dict.fromkeys([text for text, *_ in added] + [f"<0x{i:02X}>" for i in range(256)] + made))
    merges = [[p[:cut], p[cut:]] for p in made for cut in range(1, len(p)) if {p[:cut], p[cut:]} <= set(vocab)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips,
                "normalized": False,
                "special": special,
            }
            for i, (text, special, strips) in enumerate(added)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]} if prefix else replace,
        "pre_tokenizer": None
        if prefix
        else {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(vocab)},
            "merges": merges,
        },
    }
    write_json(folder / "tokenizer.json", content)


GEMMAS_TOKENS = [("<pad>", True, False), ("<eos>", True, False), ("<bos>", True, False), ("<unk>", True, False)]
GEMMAS_TOKENS += [("<start_of_turn>", True, False), ("<end_of_turn>", True, False), ("\n\n", False, False)]
GEMMAS_TOKENS += [("▁▁", False, False), ("▁▁▁", False, False), ("[multimodal]", False, False)]
PHI3S_TOKENS = [("<unk>", True, False), ("<s>", True, False), ("</s>", False, True), ("<|endoftext|>", True, False)]
PHI3S_TOKENS += [("<|user|>", True, True), ("<|end|>", True, True), ("<|assistant|>", True, True)]


def with_turns(n):
    """The mixtures of `texts`, with what chats have in between."""
    chance, more = (
        random.Random(1),
        ["<start_of_turn>", "<end_of_turn>\n", "[multimodal]", "<|user|>\n ", "<|end|>  \n"],
    )
    more += ["<|endoftext|> \n", "</s> ", "   ", "\n\n\n", "<eos>"]
    for text in texts(n, without=("<", *SPECIAL)):
        words = text.split(" ")
        for _ in range(3):
            words.insert(chance.randint(0, len(words)), chance.choice(more))
        yield " ".join(words)


def test_gemmas_tokenizer_gives_the_same_tokens(with_tokenizer, tmp_path, capsys):
    """As Hugging Face has it, and as llama.cpp's own files have it, where runs of spaces are spelled as such."""
    template = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}

    def write(folder):
        write_sentencepiece_json(folder, GEMMAS_TOKENS, prefix=False)
        write_json(folder / "tokenizer_config.json", names | {"chat_template": template, "add_bos_token": True})

    source = with_tokenizer(write)
    write_json(source / "generation_config.json", {"eos_token_id": [1, 5]})
    ours = open_checkpoint(source).tokenizer()
    file = to_gguf(source, tmp_path / "model.gguf")
    assert "puts a space" not in capsys.readouterr().out
    theirs, back = LlamaCpp(file), open_checkpoint(from_gguf(file, tmp_path / "back")).tokenizer()
    some = [*texts(300), *with_turns(200)]
    assert differing(ours, theirs, some) == [] and differing(back, theirs, some) == []
    assert (back.special_tokens, back.eos_ids, back.chat_template) == (ours.special_tokens, (1, 5), template)
    chat = ours.render_chat([{"role": "user", "content": "x  y"}], True)
    assert theirs.encode(chat) == back.encode(chat) == ours.encode(chat)

    opened = GGUFFile(file)
    meta = {key: value for key, value in opened.metadata.items() if key != "general.architecture"}
    kinds = meta["tokenizer.ggml.token_type"]
    spelled = [t.replace("▁", " ") if kinds[i] == 4 else t for i, t in enumerate(meta["tokenizer.ggml.tokens"])]
    layout = {name: (place.kind, place.shape) for name, place in opened.places.items()}
    path = tmp_path / "theirs.gguf"
    write_gguf(
        path, "llama", meta | {"tokenizer.ggml.tokens": spelled}, layout, lambda n: opened.read(n, torch.float32)
    )
    back = open_checkpoint(from_gguf(path, tmp_path / "spelled")).tokenizer()
    assert differing(back, LlamaCpp(path), some) == []
    again = LlamaCpp(to_gguf(tmp_path / "spelled", tmp_path / "again.gguf"))
    assert differing(back, again, some) == []


def test_phi_3s_special_tokens_take_the_space_behind_them(with_tokenizer, tmp_path, capsys):
    """No key of a GGUF file says so, but its name; and no other file's name does."""
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "add_bos_token": True}

    def write(folder):
        write_sentencepiece_json(folder, PHI3S_TOKENS, prefix=True)
        write_json(folder / "tokenizer_config.json", names)

    source = with_tokenizer(write)
    ours = open_checkpoint(source).tokenizer()
    file = to_gguf(source, tmp_path / "mine.gguf")
    assert "white space behind them" in capsys.readouterr().out and GGUFFile(file).metadata["general.name"] == "Phi-3"
    theirs, back = LlamaCpp(file), open_checkpoint(from_gguf(file, tmp_path / "back")).tokenizer()
    odd = "\u00a0\u2003\u3000\u2028\u0085\u1680\x1c\x1d\x1e\x1f"  # no white space to llama.cpp
    some = ["".join(letter for letter in text if letter not in odd) for text in with_turns(300)]
    assert any("<|end|> " in text for text in some)
    assert differing(ours, theirs, some) == [] and differing(back, theirs, some) == []

    plain = [(text, special, False) for text, special, _ in PHI3S_TOKENS]
    write_sentencepiece_json(source, plain, prefix=True)
    file = to_gguf(source, tmp_path / "my-Phi3.gguf")
    ours, theirs = open_checkpoint(source).tokenizer(), LlamaCpp(file)
    assert differing(ours, theirs, some) == []


def test_ordinary_tokens_that_llama_cpp_takes_for_special_are_told(with_tokenizer, tmp_path, capsys):
    """Qwen has </s> among its ordinary tokens: its texts never give it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, "<|eos|>", "ab", "</s>", "<|im_start|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|eos|>"])

    def write(folder):
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"eos_token": "<|eos|>"})

    source = with_tokenizer(write)
    file = to_gguf(source, tmp_path / "model.gguf")
    assert "llama.cpp takes '</s>' for a special token" in capsys.readouterr().out
    theirs, back = LlamaCpp(file), open_checkpoint(from_gguf(file, tmp_path / "back")).tokenizer()
    assert theirs.encode("</s>") == [vocab["</s>"]] and len(theirs.encode("<|im_start|>")) > 1
    assert back.encode("</s>") == open_checkpoint(source).tokenizer().encode("</s>") != [vocab["</s>"]]


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_real_tokenizers_give_the_same_tokens(name, request, with_tokenizer, tmp_path):
    from_dir = MODEL_DIR if name == "demo" else request.getfixturevalue("smollm2")

    def write(folder):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(from_dir / file, folder / file)

    source = with_tokenizer(write, vocab_size=49160)
    ours = open_checkpoint(source).tokenizer()
    file = to_gguf(source, tmp_path / "model.gguf")
    theirs, back = LlamaCpp(file), open_checkpoint(from_gguf(file, tmp_path / "back")).tokenizer()
    some = list(texts(300))
    assert differing(ours, theirs, some) == [] and differing(back, theirs, some) == []
    assert back.chat_template == ours.chat_template
    assert back.vocab_size == ours.vocab_size
