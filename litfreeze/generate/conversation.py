"""A conversation, line by line: what was said, what of it still fits, and the commands that begin with a slash."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional

from litfreeze.data.formats import Message
from litfreeze.errors import UsageError, did_you_mean
from litfreeze.generate.answer import Answer, Answerer
from litfreeze.generate.sample import Sampling
from litfreeze.whole import write_text

ROOM = 4  # of the context, a fourth is kept for the answer, if so much is asked for


class Conversation:
    """Reads turns from standard input and answers them on standard output; all else is told on standard error."""

    def __init__(
        self,
        answerers: Mapping[str, Answerer],
        system: Optional[str],
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str],
        seed: int,
    ) -> None:
        self.answerers = answerers
        self.name = next(iter(answerers))
        self.system = system
        self.max_new_tokens, self.sampling, self.stops, self.seed = max_new_tokens, sampling, stops, seed
        self.turns: list[list[Message]] = []  # a question and its answer each
        self.forgotten = 0  # of `turns`, how many the model no longer sees
        self.saved: Optional[Path] = None
        self.over = False
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/adapter": (self._adapter, "NAME  go on with this adapter, or with base; without a name, list them"),
            "/system": (self._set_system, "TEXT   set the system message; without a text, have none"),
            "/reset": (self._reset, "        forget what was said"),
            "/save": (self._save, "FILE     write the conversation to a new .json, which --data can train on"),
            "/help": (self._help, "         show this"),
            "/exit": (self._exit, "         leave, as Ctrl-D does"),
        }

    def talk(self) -> None:
        """Until the input ends, Ctrl-C comes where nothing is written, or /exit. A terminal is told what is wrong and
        asked again; in a pipe it is a UsageError."""
        terminal = sys.stdin.isatty()
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 (gives `input` a history and editing)
        self._tell(f"{self._asked()}. /help lists the commands, Ctrl-D leaves.")
        with suppress(EOFError, KeyboardInterrupt):
            while not self.over:
                line = self._read(terminal)
                try:
                    self._take(line)
                except UsageError as error:
                    if not terminal:
                        raise
                    self._tell(f"error: {error}")
        if terminal and not self.over:
            print()

    @staticmethod
    def _read(terminal: bool) -> str:
        """The next line. Raises EOFError where there is none."""
        try:
            line = input("> " if terminal and sys.stdout.isatty() else "").strip()
            line.encode()  # bytes that are no text may have come through
            return line
        except UnicodeError:
            raise UsageError("What is typed or piped in must be UTF-8.") from None

    def _take(self, line: str) -> None:
        """One line: a command, or something to answer."""
        word, _, rest = line.partition(" ")
        if line.startswith("//"):
            self._answer(line[1:])
        elif line.startswith("/"):
            if word not in self.commands:
                known = f"Known are {', '.join(self.commands)}; a turn that begins with / is written //."
                raise UsageError(f"unknown command {word}.{did_you_mean(word, self.commands)} {known}")
            self.commands[word][0](rest.strip())
        elif line:
            self._answer(line)

    def _answer(self, text: str) -> None:
        question = {"role": "user", "content": text}
        said, drawn_with = "", self.seed + len(self.turns)
        try:
            tokens = self._fitting(question)
            answer = Answer(
                self.answerers[self.name], tokens, self.max_new_tokens, self.sampling, self.stops, drawn_with
            )
            for piece in answer:
                said += piece
                print(piece, end="", flush=True)
            print(flush=True)
            if answer.finish_reason == "length":
                whole = answer.tokens == self.max_new_tokens
                self._tell(f"[cut at --max_new_tokens {answer.tokens}]" if whole else "[the context is full]")
        except KeyboardInterrupt:
            print(flush=True)
            self._tell("[stopped]")
            if not said:
                return
        self.turns.append([question, {"role": "assistant", "content": said}])

    def _fitting(self, question: Message) -> list[int]:
        """The tokens of the conversation and this question, without as many of the oldest turns as it takes to leave
        room to answer. Raises UsageError if the question alone is too long."""
        answerer = self.answerers[self.name]
        size = answerer.checkpoint.config.block_size
        room = min(self.max_new_tokens, size // ROOM)
        for start in range(self.forgotten, len(self.turns) + 1):
            tokens = answerer.tokens([*self._messages(start), question])
            alone = start == len(self.turns)
            if len(tokens) + (1 if alone else room) <= size:
                if start > self.forgotten:
                    told = f"the first {start} of {len(self.turns)} turns"
                    self._tell(f"[the context of {size:,} tokens is full: the model no longer sees {told}]")
                self.forgotten = start
                return tokens
        raise UsageError(f"That is {len(tokens):,} tokens, with all that goes around it; the model sees {size:,}.")

    def _messages(self, start: int = 0) -> list[Message]:
        """What was said from a turn on, the system message before it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *(message for turn in self.turns[start:] for message in turn)]

    def _asked(self) -> str:
        """Who answers, and how it is asked."""
        answerer = self.answerers[self.name]
        others = [name for name in self.answerers if name != self.name]
        style = answerer.prompt.style
        if style == "plain":
            style = "plain (no chat template and no prompt style is known: what was said, one after the other)"
        beside = f", beside {', '.join(others)}" if others else ""
        return f"{self.name} ({answerer.checkpoint.path}){beside}; prompt style {style}"

    # ---- commands ----

    def _adapter(self, name: str) -> None:
        if name and name not in self.answerers:
            raise UsageError(
                f"no adapter {name}.{did_you_mean(name, self.answerers)} Known are {', '.join(self.answerers)}."
            )
        self.name = name or self.name
        self._tell(self._asked())

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._tell(f"[system message: {self.system!r}]" if text else "[no system message]")

    def _reset(self, _: str) -> None:
        self.turns, self.forgotten = [], 0
        self._tell("[nothing was said]")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs the name of a file.")
        path = Path(name).expanduser()
        if path.suffix != ".json" or not path.parent.is_dir():
            raise UsageError(f"/save {name}: it must be a .json, in a folder that is there.")
        if path.exists() and path != self.saved:
            raise UsageError(f"/save {name}: there is such a file already.")
        try:
            write_text(path, json.dumps([{"messages": self._messages()}], ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"/save {name}: {error.strerror}.") from None
        self.saved = path
        self._tell(f"[{len(self.turns)} turns in {path}]")

    def _help(self, _: str) -> None:
        self._tell("\n".join(f"{name} {told}" for name, (_, told) in self.commands.items()))

    def _exit(self, _: str) -> None:
        self.over = True

    @staticmethod
    def _tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
