"""Messages to the text a model sees, and which parts of it are the response."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from litfreeze.data.formats import Message
from litfreeze.errors import UsageError, did_you_mean
from litfreeze.tokenizer import Tokenizer

Segment = tuple[str, bool]  # text, and whether it is the response

STYLES = ("chat_template", "alpaca", "chatml", "llama3", "plain")
_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_PREAMBLE_INPUT = ", paired with an input that provides further context"
# Stands in for a message's content, to see where a template puts it.
_PLACEHOLDER = "litfreeze-content-5b1e9f"


@dataclass(frozen=True)
class Prompt:
    """A prompt style for one tokenizer. `encode` makes tokens of the beginning of a text; what follows it is encoded
    without adding special tokens.

    Attributes:
        style: One of `STYLES`.
        tokenizer: Brings the chat template and the texts of BOS and EOS.
        arguments: Variables for the chat template, such as `{"enable_thinking": False}`.
    """

    style: str
    tokenizer: Tokenizer
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.style not in STYLES:
            raise UsageError(
                f"Unknown prompt style {self.style!r}; known are {', '.join(STYLES)}.{did_you_mean(self.style, STYLES)}"
            )
        if self.style == "chat_template" and self.tokenizer.chat_template is None:
            raise UsageError(
                f"This checkpoint has no chat template; choose another prompt style: {', '.join(STYLES[1:])}."
            )
        if taken := self.arguments.keys() & {"messages", "add_generation_prompt"}:
            raise UsageError(
                f"{', '.join(sorted(taken))} cannot be a chat template argument: it is set for every prompt."
            )
        if self.style != "chat_template" and self.arguments:
            raise UsageError(f"The prompt style {self.style} takes no arguments, but got {', '.join(self.arguments)}.")

    @classmethod
    def choose(
        cls,
        style: str | None,
        saved: Mapping[str, Any] | None,
        tokenizer: Tokenizer,
        arguments: Mapping[str, Any] | None = None,
    ) -> "Prompt":
        """The style asked for, else the one the checkpoint was trained with, else its chat template, else alpaca.

        Args:
            style: A name of `STYLES` or None.
            saved: `to_dict()` of an earlier run, from the checkpoint, or None.
            tokenizer: The checkpoint's.
            arguments: For the chat template; they go over the saved ones.

        Raises:
            UsageError: The style is unknown, or its chat template or arguments do not exist.
        """
        if style is None and saved:
            style = saved.get("style")
        if style is None:
            style = "alpaca" if tokenizer.chat_template is None else "chat_template"
        kept = saved.get("arguments", {}) if saved and saved.get("style") == style else {}
        return cls(style, tokenizer, {**kept, **(arguments or {})})

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; `choose` takes it as `saved`."""
        return {"style": self.style, "arguments": self.arguments}

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The text of a conversation up to its last response, cut into what is given and what is learned.

        Learned is every assistant message, unless its `weight` is 0, and what closes its turn, up to the end token: not
        the line break after it, nor anything after the last one. Tokenise the segments one by one, since that is what
        happens in a generation: the model goes on after the tokens of the prompt.

        Raises:
            UsageError: There is no assistant message, or the style cannot tell its place in the text.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            raise UsageError("holds no assistant message to learn from")
        messages = [self._without_eos(message) for message in messages[: last + 1]]
        if self.style == "chat_template":
            return self._template_segments(messages)
        return self._style_segments(messages)

    def encode(self, beginnings: Sequence[str]) -> list[list[int]]:
        """Tokens of texts of `for_generation`, or of first segments: a style has BOS before them if the tokenizer adds
        it, a chat template writes its own. It is no part of the text, since some tokenizers put a space only before the
        very first word."""
        begins = [self.tokenizer.bos_id] if self.style != "chat_template" and self.tokenizer.adds_bos else []
        return [begins + ids for ids in self.tokenizer.encode_batch(beginnings)]

    def for_generation(self, messages: Sequence[Message]) -> str:
        """The text after which the model writes the assistant's next turn."""
        if self.style == "chat_template":
            return self.tokenizer.render_chat(messages, add_generation_prompt=True, **self.arguments)
        # What comes before a response is the prompt of a generation, whatever that response will be.
        segments = self._style_segments([*messages, {"role": "assistant", "content": ""}])
        return "".join(text for text, _ in segments[:-1])

    def _without_eos(self, message: Message) -> Message:
        """Some sets write the end token into their responses; the style writes it, once."""
        eos = self.tokenizer.eos_token
        if message["role"] != "assistant" or not eos:
            return message
        return {**message, "content": message["content"].removesuffix(eos)}

    # Styles that need no template

    def _style_segments(self, messages: Sequence[Message]) -> list[Segment]:
        style = _STYLES[self.style]
        segments: list[Segment] = []
        given = ""
        for i, message in enumerate(messages):
            if message.get("tool_calls"):
                raise UsageError(f"the prompt style {self.style} cannot write 'tool_calls'")
            if message["role"] == "assistant":
                learned = message.get("weight") != 0
                segments += [(given + style.opens, False), (message["content"] + self._end(style.closes), learned)]
                given = style.between
            elif message["role"] == "tool":
                raise UsageError(f"the prompt style {self.style} cannot write the role 'tool'")
            else:
                given += style.given(message, i == 0)
        return segments

    def _end(self, closes: str) -> str:
        """What ends a response: the style's own closing text, and EOS unless that text ends a generation by itself."""
        ids = self.tokenizer.encode(closes, continues=True)
        if len(ids) == 1 and ids[0] in self.tokenizer.eos_ids:
            return closes
        return closes + (self.tokenizer.eos_token or "")

    # The checkpoint's own template

    def _template_segments(self, messages: Sequence[Message]) -> list[Segment]:
        whole = self._render(messages)
        segments: list[Segment] = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._span(messages, i, whole)
            if not at <= start < end:
                raise UsageError(_LOST.format(i + 1))
            segments += [(whole[at:start], False), (whole[start:end], message.get("weight") != 0)]
            at = end
        text, learned = segments[-1]
        if text.endswith(messages[-1]["content"].strip()):  # a template that closes the turn with nothing
            segments[-1] = (text + (self.tokenizer.eos_token or ""), learned)
        return segments

    def _render(self, messages: Sequence[Message]) -> str:
        return self.tokenizer.render_chat(messages, **self.arguments)

    def _span(self, messages: Sequence[Message], i: int, whole: str) -> tuple[int, int]:
        """Start and end in `whole` of what assistant message `i` teaches."""
        prefix = self.for_generation(messages[:i])
        until = whole if i == len(messages) - 1 else self._render(messages[: i + 1])
        if until.startswith(prefix) and whole.startswith(until.rstrip()):
            return len(prefix), len(until.rstrip())

        # The template writes this turn otherwise once others follow (Qwen3 drops the thinking of earlier turns): put a
        # placeholder into the message and see where it comes out, and what closes it when the turn is the last.
        marked = [*messages[:i], {**messages[i], "content": _PLACEHOLDER}, *messages[i + 1 :]]
        before, found, after = self._render(marked).partition(_PLACEHOLDER)
        _, found_last, closing = self._render(marked[: i + 1]).partition(_PLACEHOLDER)
        closing = closing.rstrip()
        if not (
            found
            and found_last
            and _PLACEHOLDER not in after
            and whole.startswith(before)
            and whole.endswith(after)
            and after.startswith(closing)
            and len(before) + len(after) <= len(whole)
        ):
            raise UsageError(_LOST.format(i + 1))
        return len(before), len(whole) - len(after) + len(closing)


_LOST = (
    "the chat template hides where message {} begins or ends, so its response cannot be told from the rest; "
    "choose a style with --data.prompt_style"
)


@dataclass(frozen=True)
class _Style:
    given: Callable[[Message, bool], str]  # the text of a message that is no response; is it the first?
    opens: str  # before a response
    closes: str  # right after it, learned with it
    between: str  # before the next message


def _alpaca(message: Message, first: bool) -> str:
    if message["role"] == "system":
        return f"{message['content']}\n\n"
    preamble = _PREAMBLE.format(_PREAMBLE_INPUT if "input" in message else "") if first else ""
    text = f"### Instruction:\n{message.get('instruction', message['content'])}\n\n"
    return preamble + text + (f"### Input:\n{message['input']}\n\n" if "input" in message else "")


def _chatml(message: Message, first: bool) -> str:
    return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


def _llama3(message: Message, first: bool) -> str:
    return f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content']}<|eot_id|>"


def _plain(message: Message, first: bool) -> str:
    return message["content"] + ("\n" if message["role"] == "system" else "")


_STYLES = {
    "alpaca": _Style(_alpaca, "### Response:\n", "", "\n\n"),
    "chatml": _Style(_chatml, "<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "llama3": _Style(_llama3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "plain": _Style(_plain, "", "", ""),
}
