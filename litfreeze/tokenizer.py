"""Text to token ids and back, and messages to text by the checkpoint's own chat template.

`tokenizer.json` is read with the tokenizers library, `tokenizer.model` with sentencepiece. The former alone decides how
text is cut and what is added around it; the other JSON files only name the special tokens and the template.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from litfreeze.chat_template import ChatTemplate
from litfreeze.errors import UsageError
from litfreeze.json_file import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


class Tokenizer:
    """The tokenizer of a checkpoint directory. Make one with `Tokenizer.from_dir`.

    Attributes:
        bos_id: Id of the token that begins a text, or None.
        names_bos: Whether the tokenizer's own files name that token; else the model's do.
        eos_id: Id of the tokenizer's own end token, which closes a trained response, or None.
        eos_ids: Every id that ends a generation; `generation_config.json` first, then `config.json`, then `eos_id`.
        special_tokens: Texts of the named special tokens: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
        chat_template: The jinja source, or None.
    """

    def __init__(
        self,
        backend: "_TokenizersBackend | _SentencePieceBackend",
        special_tokens: dict[str, str],
        end_ids: Sequence[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
    ):
        self._backend = backend
        self.special_tokens = special_tokens
        self.names_bos = "bos_token" in special_tokens
        self.chat_template = chat_template
        self.bos_id = self._special_id("bos_token", bos_id)
        self.eos_id = self._special_id("eos_token", end_ids[0] if end_ids else None)
        self.eos_ids = tuple(dict.fromkeys([*end_ids, *([] if self.eos_id is None else [self.eos_id])]))

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint directory.

        Raises:
            UsageError: There is none, or a file of it cannot be read.
        """
        path = Path(path)
        config = _read_json(path / "tokenizer_config.json")
        names = {**_read_json(path / "special_tokens_map.json"), **config}
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            text = names.get(name)
            text = text.get("content") if isinstance(text, dict) else text
            if isinstance(text, str):
                special[name] = text

        if (path / "tokenizer.json").is_file():
            backend = _TokenizersBackend(path / "tokenizer.json")
        elif (path / "tokenizer.model").is_file():
            named = {*special.values(), *_texts(names.get("additional_special_tokens") or [])}
            added = {text: (int(i), text in named) for text, i in _read_json(path / "added_tokens.json").items()}
            for i, token in config.get("added_tokens_decoder", {}).items():
                added[token["content"]] = int(i), token.get("special", False)
            backend = _SentencePieceBackend(path / "tokenizer.model", added, config)
            special = backend.named_tokens | special
        else:
            raise UsageError(f"No tokenizer in {path}: it has neither tokenizer.json nor tokenizer.model.")

        generation, model = _read_json(path / "generation_config.json"), _read_json(path / "config.json")
        given = ((path / "generation_config.json", generation), (path / "config.json", model))
        end_ids = [i for file, found in given for i in _id_list(file, found, "eos_token_id")]
        bos_id = next((i for file, found in given for i in _id_list(file, found, "bos_token_id")), None)
        return cls(backend, special, end_ids, bos_id, _read_chat_template(path, config))

    def _special_id(self, name: str, otherwise: int | None) -> int | None:
        """The id of a named special token; GPT-2 names none, so `otherwise` is the id the model's config gives."""
        if name in self.special_tokens:
            token_id = self._backend.token_to_id(self.special_tokens[name])
            if token_id is None:
                raise UsageError(f"The tokenizer names {self.special_tokens[name]!r} as {name} but has no such token.")
            return token_id
        text = None if otherwise is None else self._backend.id_to_token(otherwise)
        if text is None:
            return None
        self.special_tokens[name] = text
        return otherwise

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts its BOS before a text."""
        return self.bos_id is not None and self.encode("a", special_tokens=True)[:1] == [self.bos_id]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; a model may have more rows than that."""
        return self._backend.vocab_size()

    def encode(self, text: str, special_tokens: bool = False, continues: bool = False) -> list[int]:
        """Token ids of one text. Special tokens written out in it become their ids.

        Args:
            special_tokens: Add what the tokenizer itself adds around a text, such as BOS.
            continues: The text goes on after another, so no space is put before its first word, as SentencePiece does
                at the start of a text.
        """
        return self.encode_batch([text], special_tokens, continues)[0]

    def encode_batch(
        self, texts: Sequence[str], special_tokens: bool = False, continues: bool = False
    ) -> list[list[int]]:
        """`encode` for many texts, in parallel where the library can."""
        if not (continues and self._start):
            return self._backend.encode_batch(texts, special_tokens)
        # A newline never joins what follows it in such vocabularies: encode behind one and take it off again.
        encoded = self._backend.encode_batch(["\n" + text for text in texts], False)
        return [ids[len(self._start) :] for ids in encoded]

    @cached_property
    def _start(self) -> list[int]:
        """Ids of a newline at the start of a text, where a space is put before the first word; else empty."""
        start, behind, plain = self._backend.encode_batch(["\n", "\na", "a"], False)
        return start if behind[: len(start)] == start and behind[len(start) :] != plain else []

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that make no character become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder for ids that come one at a time."""
        return TextStream(self, skip_special_tokens)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of the byte tokens `<0x00>` to `<0xFF>` that SentencePiece vocabularies fall back on."""
        return frozenset(i for byte in range(256) if (i := self._backend.token_to_id(f"<0x{byte:02X}>")) is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out by default."""
        return self._backend.special_ids()

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None if there is none of that id."""
        return self._backend.id_to_token(token_id)

    def ends(self, stops: Sequence[str]) -> tuple[list[int], list[str]]:
        """What ends an answer that is to end before `stops`: ids, `eos_ids` and those of the special tokens among them,
        which no decoded text shows; and the texts that are left."""
        found = {text: i for text in stops if (i := self._backend.token_to_id(text)) in self.special_ids}
        return [*self.eos_ids, *found.values()], [text for text in stops if text not in found]

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **arguments: Any
    ) -> str:
        """The text the checkpoint's chat template makes of `messages`, special tokens written out.

        Args:
            messages: Mappings with at least `role` and `content`.
            add_generation_prompt: End with what opens the assistant's next turn.
            arguments: Further variables of the template, such as `enable_thinking`.

        Raises:
            UsageError: There is no template, or it fails, refuses the messages, or tries something unsafe.
        """
        if self.chat_template is None:
            raise UsageError("This checkpoint has no chat template; choose another prompt style.")
        variables = {"tools": None, "documents": None, **self.special_tokens, **arguments}
        try:
            text = self._template.render(
                {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
            text.encode("utf-8")  # half of a surrogate pair is no text
            return text
        except Exception as error:  # a template is a program of someone else's: anything may come out of it
            told = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"The checkpoint's chat template failed: {told}") from error

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.chat_template)


class TextStream:
    """Decodes ids as they come: what `push` and `finish` return, joined, is `decode` of all the ids.

    Text is held back while its last bytes may still become another character, and each piece is decoded together with
    the ids of the piece before, since a decoder treats the first word of a text differently from the others.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._before: list[int] = []  # the ids of the last piece given out
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; often one word, sometimes nothing."""
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._new.append(int(token_id))
        # A run of byte tokens is read as a whole: an invalid one behind spoils even the valid ones before it.
        if self._new[-1] in self._tokenizer.byte_ids:
            return ""
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._before, self._new = self._new, []
        return text

    def finish(self) -> str:
        """What was still held back."""
        text, self._new = self._pending(), []
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._before, self._skip)
        return self._tokenizer.decode(self._before + self._new, self._skip)[len(before) :]


class _TokenizersBackend:
    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"{path} is not a readable tokenizer: {error}") from error
        # What the file's author trained with must not cut or pad our texts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode_batch(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        except Exception as error:  # the library raises nothing narrower
            raise UsageError(f"The tokenizer cannot encode the text: {error}") from error
        return [e.ids for e in encoded]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1


class _SentencePieceBackend:
    """SentencePiece knows no special or added token inside a text, so the text is cut at them here. `added` has ids by
    text, and whether the token is a special one, which a decoded text lacks."""

    def __init__(self, path: Path, added: dict[str, tuple[int, bool]], config: dict[str, Any]):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise UsageError(f"{path} is not a readable SentencePiece model: {error}") from error
        model = self._model
        self._size = model.vocab_size()
        named = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        self.named_tokens = {name: model.id_to_piece(i) for name, i in named.items() if i >= 0}
        controls = {model.id_to_piece(i): i for i in range(self._size) if model.is_control(i)}
        self._whole = {**controls, **{text: i for text, (i, _) in added.items()}}
        self._special = frozenset(controls.values()) | {i for i, is_special in added.values() if is_special}
        # Any other that is a piece of the model's own is decoded by it
        self._texts = {i: text for text, i in self._whole.items() if i in self._special or i >= self._size}
        texts = sorted(self._whole, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None
        # Llama's convention, where the files say nothing: BOS before a text and no EOS behind it.
        self._bos = [model.bos_id()] if config.get("add_bos_token", True) and model.bos_id() >= 0 else []
        self._eos = [model.eos_id()] if config.get("add_eos_token", False) and model.eos_id() >= 0 else []
        start = model.encode("\n")
        self._newline = start if model.decode(start) == "\n" else []

    def encode_batch(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        bos, eos = (self._bos, self._eos) if special_tokens else ([], [])
        return [bos + self._encode(text) + eos for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(self._cut.split(text) if self._cut else [text]):
            if piece in self._whole:
                ids.append(self._whole[piece])
            elif i == 0 or not self._newline:
                ids += self._model.encode(piece)
            else:  # only the start of a text gets a space before it
                ids += self._model.encode("\n" + piece)[len(self._newline) :]
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        texts, run = [], []
        for i in [*ids, None]:
            if i is not None and i not in self._texts:
                run.append(i)
                continue
            if skip_special_tokens and i in self._special:
                continue
            if texts and self._newline:
                texts.append(self._model.decode(self._newline + run)[1:])
            else:
                texts.append(self._model.decode(run))
            if i is not None:
                texts.append(self._texts[i])
            run = []
        return "".join(texts)

    def token_to_id(self, token: str) -> int | None:
        if token in self._whole:
            return self._whole[token]
        token_id = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._texts:
            return self._texts[token_id]
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._size else None

    def special_ids(self) -> frozenset[int]:
        return self._special

    def vocab_size(self) -> int:
        return max([self._size - 1, *self._texts]) + 1


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _texts(tokens: Sequence[Any]) -> list[str]:
    """Tokens as a file names them: as texts, or as mappings with their `content`."""
    return [token["content"] if isinstance(token, dict) else token for token in tokens]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _id_list(path: Path, found: Mapping[str, Any], name: str) -> list[int]:
    value = found.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UsageError(f"{path}: {name} is {value!r}; it must be a token's id, a list of them or null.")
    return ids


def _read_chat_template(path: Path, config: dict[str, Any]) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return _read_text(path / "chat_template.jinja")
    template = _read_json(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str | None):
        raise UsageError(f"{path}: its chat template is a {type(template).__name__}; it must be text.")
    return template
