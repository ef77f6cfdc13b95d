"""One record that the model is asked about before and after training, for the person to compare."""

import textwrap
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric

from litfreeze.data.shelf import Sample
from litfreeze.generate.classes import likeliest, probabilities
from litfreeze.generate.sample import generate_tokens
from litfreeze.model import GPT
from litfreeze.tokenizer import Tokenizer
from litfreeze.train.stage import Ready


@dataclass
class Exchange:
    """The record, and what the model answered to it."""

    tokenizer: Tokenizer
    prompt_tokens: list[int]
    prompt: str  # with its special tokens
    question: str  # what a person would type to ask it again
    expected: str
    before: str = ""
    after: str = ""
    given: str = "Prompt"  # what the prompt is to the model

    @classmethod
    def of(cls, tokenizer: Tokenizer, samples: Sequence[Sample], labels: Sequence[str]) -> "Exchange":
        """Of the first sample that has an answer; of plain text, its first tokens are the prompt. A classifier's
        `labels` say what it answers."""
        if labels:
            prompt = samples[0].prompt_tokens.tolist()
            text = tokenizer.decode(prompt)
            question = textwrap.shorten(text, 100, placeholder="") or "Hello"
            return cls(tokenizer, prompt, text, question, labels[samples[0].labels[-1]], given="Text")
        sample = next((s for s in samples if len(s.response_tokens)), samples[0])
        cut = min(len(sample.prompt_tokens), len(sample.tokens) - 1) or min(16, len(sample.tokens) // 2)
        expected = sample.response_tokens if cut == len(sample.prompt_tokens) else sample.tokens[cut:]
        prompt = sample.tokens[:cut].tolist()
        lines = [line.strip() for line in tokenizer.decode(prompt).splitlines() if len(line.split()) > 1]
        shown = tokenizer.decode(prompt, skip_special_tokens=False)
        return cls(tokenizer, prompt, shown, lines[-1] if lines else "Hello", tokenizer.decode(expected.tolist()))

    @torch.no_grad()
    def ask(self, fabric: Fabric, ready: Ready, max_new_tokens: int) -> str:
        """What the model answers now. Every process enters, since every process may hold a part of it."""
        with ready.prefix.at_hand() if ready.prefix else nullcontext():
            return ready.model.lend(self._answer, fabric, max_new_tokens)

    def _answer(self, gpt: GPT, fabric: Fabric, max_new_tokens: int) -> str:
        """What it says greedily or, of a classifier, the class it tells."""
        gpt.eval()
        with fabric.autocast():
            if labels := gpt.config.labels:
                [(label, share)] = likeliest(probabilities(gpt, [self.prompt_tokens])[0], labels, 1)
                return f"{label} ({100 * share:.1f} %)"
            ids = list(generate_tokens(gpt, self.prompt_tokens, max_new_tokens, self.tokenizer.eos_ids))
        return self.tokenizer.decode(ids)
