"""A tokenizer in GGUF's metadata (tokenizer.ggml.*) and in a directory's files, both ways.

llama.cpp has two kinds that matter here. "gpt2" is BPE over bytes; `tokenizer.ggml.pre` names the way a text is split
before, one of those built into llama.cpp. "llama" is SentencePiece's BPE: two pieces are joined if that gives a token,
those first that give the token with the highest score.

A tokenizer that llama.cpp would run differently is refused, or told about where only some texts are concerned."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import sentencepiece

from litfreeze.errors import UsageError
from litfreeze.json_file import read_json
from litfreeze.tokenizer import Tokenizer
from litfreeze.whole import write_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"
BYTES = [f"<0x{i:02X}>" for i in range(256)]

# How a text is split, one regular expression after the other, each on what the one before has left
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
QWEN2, LLAMA3 = (
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
# tokenizer.ggml.pre -> the splits, and whether a word that is a token is taken without merging (ignore_merges)
SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((GPT2,), False),
    "smollm": ((DIGIT, GPT2), False),
    "llama-bpe": ((LLAMA3,), True),
    "dbrx": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}
# Other names for the same in llama.cpp
SAME = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"),
}
OTHER_NAMES = {other: name for name, others in SAME.items() for other in others}

SPACED = (
    "llama.cpp puts a space before a text even if it begins with one, and after every special token; the tokenizer "
    "does not. Such texts are tokenized differently."
)
# Tokens that llama.cpp takes for special ones by their text, whatever their type: an answer ends with them
# fmt: off
ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~[",
    "<|ifm|im_end|>",
})
# fmt: on
# ... but for one that only ends a part of it, where these are tokens too
PARTS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|flush|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}),
)
# In a model that is called so every special token but these takes the white space behind it: no key says it
STRIPPING = re.compile("phi-?3", re.IGNORECASE)
KEEPING = {"<unk>", "<s>", "<|endoftext|>"}
STRIPPED = "Special tokens take the white space behind them: in llama.cpp only that of ASCII, in the tokenizer any."
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # an added token's fields


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


# --- reading a directory's files as metadata --------------------------------------------------------------------------


def tokenizer_metadata(path: Path, tokenizer: Tokenizer, n_tokens: int) -> tuple[dict[str, Any], list[str]]:
    """The metadata of the tokenizer in the directory `path`, for a model of `n_tokens` embeddings, and what is to be
    told of it. Raises UsageError if llama.cpp has nothing that splits texts the same way."""
    if (path / "tokenizer.json").is_file():
        file = path / "tokenizer.json"
        content = read_json(file)
        try:
            spm = bool(content["model"].get("byte_fallback"))
            found, told = (_sentencepiece_json if spm else _byte_level)(content, file)
            tokens = {i: token for token, i in content["model"]["vocab"].items()}
            kinds = {
                i: UNKNOWN if token == content["model"].get("unk_token") else NORMAL for i, token in tokens.items()
            }
            for added in content["added_tokens"]:
                tokens[added["id"]] = added["content"]
                kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
            stripping = {added["content"]: bool(added["rstrip"]) for added in content["added_tokens"]}
            if {"</s>", *KEEPING} <= set(stripping) and all(stripping[t] != (t in KEEPING) for t in stripping):
                found["general.name"], stripping = "Phi-3", {}
                told.append(STRIPPED)
            for added in content["added_tokens"]:
                if added["lstrip"] or stripping.get(added["content"]) or added["single_word"]:
                    raise UsageError(
                        f"{file}: {added['content']!r} takes the spaces beside it, or stands for a whole word only; "
                        "a GGUF file cannot say so."
                    )
        except (AttributeError, KeyError, TypeError) as error:
            raise UsageError(f"{file} is not what the tokenizers library writes ({error!r}).") from None
    else:
        file = path / "tokenizer.model"
        tokens, kinds, found, told = _sentencepiece_model(file, tokenizer)
    if max(tokens) >= n_tokens:
        raise UsageError(f"{file} has a token {max(tokens)}, but the model has {n_tokens} embeddings.")

    if looks := [token for i, token in tokens.items() if kinds[i] == NORMAL and token in ENDS]:
        told.append(f"llama.cpp takes {looks[0]!r} for a special token: it is one in a text, and ends an answer.")

    scores = found.pop("scores", None)
    ids = {token: i for i, token in tokens.items()}
    if scores is not None:
        kinds |= {ids[token]: BYTE for token in BYTES}
        found[_key("scores")] = [float(scores.get(tokens.get(i), 0)) for i in range(n_tokens)]
    found |= {
        # What has no token is padding
        _key("tokens"): [tokens.get(i, f"[PAD{i}]") for i in range(n_tokens)],
        _key("token_type"): [kinds.get(i, UNUSED) for i in range(n_tokens)],
        **_named(tokenizer, ids, file),
    }
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found, told


def _named(tokenizer: Tokenizer, ids: Mapping[str, int], file: Path) -> dict[str, Any]:
    """The special tokens by name, and which of them are put around a text."""
    if tokenizer.eos_id is None:
        raise UsageError(f"{file}: no eos_token is named, and llama.cpp would end texts at a token of its own choice.")
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", special_tokens=True)
    bos, eos = whole[:1] == [tokenizer.bos_id], whole[-1:] == [tokenizer.eos_id]
    if whole != [tokenizer.bos_id] * bos + plain + [tokenizer.eos_id] * eos:
        raise UsageError(f"{file} puts {whole} around a text's {plain}; llama.cpp can only put one BOS and one EOS.")
    found = {_key("add_bos_token"): bos, _key("add_eos_token"): eos}
    named = {name: ids.get(tokenizer.special_tokens.get(NAMED[name])) for name in ("unknown", "padding")}
    named |= {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    unusual = {i for text, i in ids.items() if text not in ENDS}
    if others := [i for i in tokenizer.eos_ids if i != tokenizer.eos_id and i in unusual]:
        named["eot"] = others[0]  # llama.cpp has one place for another, and knows the usual ones by their text
    return found | {_key(f"{name}_token_id"): i for name, i in named.items() if i is not None}


def _steps(part: Optional[Mapping[str, Any]], inside: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as a list of plain ones."""
    if part is None:
        return []
    return [step for each in part[inside] for step in _steps(each, inside)] if part["type"] == "Sequence" else [part]


def _byte_level(content: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """BPE over bytes."""
    model = content["model"]
    prefixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"), model.get("dropout"))
    splits = _splits(content["pre_tokenizer"])
    if model["type"] != "BPE" or any(prefixes) or splits is None:
        raise UsageError(f"{file}: llama.cpp has no tokenizer like it. It has BPE over bytes and SentencePiece's BPE.")
    ways = splits, bool(model.get("ignore_merges"))
    pre = next((name for name, way in SPLITS.items() if way == ways), None)
    if pre is None:
        raise UsageError(
            f"{file}: llama.cpp does not split texts as it does, {' then '.join(map(repr, splits))} with "
            f"ignore_merges {str(ways[1]).lower()}. It would tokenize them wrongly. Known are: {', '.join(SPLITS)}."
        )
    normalizers, told = [step["type"] for step in _steps(content["normalizer"], "normalizers")], []
    if normalizers == ["NFC"]:
        told.append("The tokenizer composes characters (NFC); llama.cpp takes them as they are written.")
    elif normalizers:
        raise UsageError(f"{file}: llama.cpp does not change texts as its normalizer {', '.join(normalizers)} does.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {_key("model"): "gpt2", _key("pre"): pre, _key("merges"): merges}, told


def _splits(pre_tokenizer: Optional[Mapping[str, Any]]) -> Optional[tuple[str, ...]]:
    """The regular expressions that a text is split with before its bytes are merged, if that is all that happens."""
    splits: list[str] = []
    *steps, last = _steps(pre_tokenizer, "pretokenizers") or [{"type": "none"}]
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            splits.append(DIGIT)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and "Regex" in step["pattern"]:
            splits.append(step["pattern"]["Regex"])
        else:
            return None
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    return (*splits, *([GPT2] if last.get("use_regex", True) else []))


def _sentencepiece_json(content: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], list[str]]:
    """SentencePiece's BPE as the tokenizers library spells it: with merges, in place of scores."""
    model, vocab = content["model"], content["model"]["vocab"]
    normalizers = _steps(content["normalizer"], "normalizers")
    prefixes = [step["prepend"] for step in normalizers if step["type"] == "Prepend"]
    replaced = any(
        step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE
        for step in normalizers
    )
    known, told = len(prefixes) + replaced == len(normalizers) and prefixes in ([], [SPACE]), []
    spaced = bool(prefixes)
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and step.get("split") is False:
            replaced, spaced = True, step.get("prepend_scheme", "always") != "never"
            if spaced:
                told.append(SPACED)
        elif not (replaced and step["type"] == "Split" and step["pattern"] == {"String": " "}):
            known = False
    missing = set(BYTES) - set(vocab)
    if not known or not replaced or missing or model["type"] != "BPE":
        raise UsageError(f"{file}: llama.cpp has no tokenizer like it. It has BPE over bytes and SentencePiece's BPE.")
    added = {token["content"] for token in content["added_tokens"]}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    joined = set(merges)
    scores: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -rank)
    for token in scores:
        if token not in added and any(pair not in joined for pair in _pairs(token, vocab)):
            raise UsageError(
                f"{file}: {token!r} is not merged from all pairs of tokens that make it, as SentencePiece and "
                "llama.cpp do. It would tokenize texts wrongly."
            )
    return {_key("model"): "llama", _key("add_space_prefix"): spaced, "scores": scores}, told


def _pairs(token: str, vocab: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that `token` can be made of."""
    for cut in range(1, len(token)):
        if token[:cut] in vocab and token[cut:] in vocab:
            yield token[:cut], token[cut:]


def _sentencepiece_model(
    file: Path, tokenizer: Tokenizer
) -> tuple[dict[int, str], dict[int, int], dict[str, Any], list[str]]:
    """SentencePiece's own file."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = model.vocab_size()
    tokens = {i: model.id_to_piece(i) for i in range(size)}
    kinds = {i: UNKNOWN if model.is_unknown(i) else UNUSED if model.is_unused(i) else NORMAL for i in tokens}
    for i in {*tokenizer.special_ids, *range(size, tokenizer.vocab_size)}:
        if (text := tokenizer.token(i)) is not None:
            tokens[i], kinds[i] = text, CONTROL if i in tokenizer.special_ids else USER_DEFINED
    scores = {tokens[i]: model.get_score(i) for i in range(size)}
    probe = model.normalize("  ﬁ x ")
    spaced = probe == f"{SPACE * 3}ﬁ{SPACE}x{SPACE}"
    # In a BPE model a score is a rank; in a unigram model, the logarithm of a probability
    bpe = all(score == int(score) for score in scores.values())
    if not bpe or not (spaced or probe == f"{SPACE * 2}ﬁ{SPACE}x{SPACE}") or not set(BYTES) <= set(scores):
        raise UsageError(
            f"{file}: llama.cpp has no tokenizer like it. Of SentencePiece's it has BPE with bytes to fall back on, "
            "without normalization."
        )
    found = {_key("model"): "llama", _key("add_space_prefix"): spaced, "scores": scores}
    return tokens, kinds, found, [SPACED] if spaced else []


# --- writing a directory's files from metadata ------------------------------------------------------------------------


def write_tokenizer(directory: Path, metadata: Mapping[str, Any], source: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json into `directory`, chat template included.
    Raises UsageError, naming the file `source`, if the metadata is damaged or of a kind that is not supported."""
    model = metadata.get(_key("model"))
    if model not in ("gpt2", "llama"):
        raise UsageError(f"{source}: its tokenizer is {model!r}. Supported: gpt2 (bytes' BPE), llama (SentencePiece).")
    spm = model == "llama"
    tokens = _list(metadata, "tokens", str, source)
    kinds = _list(metadata, "token_type", int, source, [NORMAL] * len(tokens))
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens) or not tokens:
        raise UsageError(f"{source}: its tokenizer is damaged: {len(tokens)} tokens, {len(kinds)} types, or one twice.")
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if spm else {}  # llama.cpp's
    ids = {name: metadata.get(_key(f"{name}_token_id"), defaults.get(name)) for name in (*NAMED, "eot")}
    ids = {name: i for name, i in ids.items() if i is not None}
    if bad := [f"{name} {i!r}" for name, i in ids.items() if type(i) is not int or not 0 <= i < len(tokens)]:
        raise UsageError(f"{source}: its tokenizer is damaged: it has no token for {bad[0]}.")
    names = {NAMED[name]: tokens[i] for name, i in ids.items() if name in NAMED}

    vocab = {t: i for i, t in enumerate(tokens) if kinds[i] != UNUSED or t != f"[PAD{i}]"}
    pre = str(metadata.get(_key("pre"), "default"))
    pre = OTHER_NAMES.get(pre, pre)
    if spm:
        content = _sentencepiece_parts(metadata, kinds, vocab, names, source)
    else:
        content = _byte_level_parts(metadata, vocab, pre, source)
    bos = bool(metadata.get(_key("add_bos_token"), spm or pre == "llama-bpe")) and "bos" in ids
    eos = bool(metadata.get(_key("add_eos_token"), False)) and "eos" in ids
    around = [names.get("bos_token")] * bos + [None] + [names.get("eos_token")] * eos
    stripping = STRIPPING.search(str(metadata.get("general.name", "")))
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": t,
                **PLAIN,
                "rstrip": bool(stripping) and t not in KEEPING,
                "special": kinds[i] != USER_DEFINED,
            }
            for i, t in enumerate(tokens)
            if kinds[i] in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        **content,
        "post_processor": _template(around, vocab) if bos or eos else None,
    }
    settings = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos,
        "add_eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    by_text = ENDS - {part for part, others in PARTS if others <= vocab.keys()}
    ends = [ids[name] for name in ("eos", "eot") if name in ids] + [i for i, t in enumerate(tokens) if t in by_text]
    ends = list(dict.fromkeys(ends))
    generation = {"bos_token_id": ids.get("bos"), "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    files = {"tokenizer.json": written, "tokenizer_config.json": settings, "generation_config.json": generation}
    for name, content in files.items():
        write_text(directory / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _list(metadata: Mapping[str, Any], name: str, of: Any, source: Path, default: Optional[list] = None) -> list:
    value = metadata.get(_key(name), default)
    if not isinstance(value, list) or not all(isinstance(item, of) for item in value):
        raise UsageError(f"{source}: its tokenizer is damaged: {_key(name)} is missing, or not what it should be.")
    return value


def _byte_level_parts(metadata: Mapping[str, Any], vocab: Mapping[str, int], pre: str, source: Path) -> dict[str, Any]:
    """What tokenizer.json has of its own for BPE over bytes."""
    if pre not in SPLITS:
        raise UsageError(
            f"{source}: its texts are split the way {pre!r} (tokenizer.ggml.pre), which litfreeze does not know. "
            f"Known are: {', '.join([*SPLITS, *OTHER_NAMES])}."
        )
    splits, ignore_merges = SPLITS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in splits
    ]
    merges = [merge.partition(" ") for merge in _list(metadata, "merges", str, source)]
    if damaged := [a + b for a, _, b in merges if not (a in vocab and b in vocab and a + b in vocab)]:
        raise UsageError(f"{source}: its tokenizer is damaged: it merges {damaged[0]!r}, or a part of it is no token.")
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "decoder": byte_level,
        "model": _bpe(vocab, [(left, right) for left, _, right in merges], None, ignore_merges),
    }


def _sentencepiece_parts(
    metadata: Mapping[str, Any],
    kinds: Sequence[int],
    vocab: Mapping[str, int],
    names: Mapping[str, str],
    source: Path,
) -> dict[str, Any]:
    """What tokenizer.json has of its own for SentencePiece's BPE: a merge for each pair of tokens that makes a token,
    ordered by that one's score."""
    scores = _list(metadata, "scores", (int, float), source)
    if len(scores) != len(kinds) or "unk_token" not in names or not set(BYTES) <= set(vocab):
        raise UsageError(f"{source}: its tokenizer is damaged: it lacks scores, an unknown token or tokens of bytes.")
    joined = {t: i for t, i in vocab.items() if kinds[i] in (NORMAL, USER_DEFINED)}
    best_first = sorted(joined, key=lambda token: -scores[joined[token]])
    merges = [pair for token in best_first for pair in _pairs(token, joined)]
    spaced = bool(metadata.get(_key("add_space_prefix"), True))
    prepend = [{"type": "Prepend", "prepend": SPACE}] * spaced
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * spaced
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(vocab, merges, names["unk_token"], False),
    }


def _bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: Optional[str], ignore_merges: bool
) -> dict[str, Any]:
    """A BPE model; with an `unknown` token, one that falls back on bytes."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": unknown is not None,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _template(around: Sequence[Optional[str]], vocab: Mapping[str, int]) -> dict[str, Any]:
    """What puts special tokens around a text, which stands as None among them."""

    def one(text: str) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": text, "type_id": 0}} if token is None else {"SpecialToken": {"id": token, "type_id": 0}}
            for token in around
        ]

    special = {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in around if t is not None}
    return {"type": "TemplateProcessing", "single": one("A"), "pair": one("A") + one("B"), "special_tokens": special}
