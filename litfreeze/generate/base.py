"""`litfreeze generate`: write on from a prompt."""

import sys
from pathlib import Path
from typing import Literal, Optional

from litfreeze.texts import Texts

DEFAULT_PROMPT = "Book a table for"


def setup(
    prompt: str = DEFAULT_PROMPT,
    checkpoint_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    stop: Texts = None,
    prompt_style: Optional[str] = None,
    system: Optional[str] = None,
    precision: Optional[Literal["32-true", "bf16-true"]] = None,
    accelerator: str = "auto",
    seed: int = 1337,
) -> str:
    """Answer a prompt, token by token as it comes.

    The prompt is put the way the checkpoint was trained: in the style saved in it, else in its chat template, else as
    it is (`--prompt_style` chooses another).

    Args:
        prompt: What to answer.
        checkpoint_dir: A litfreeze, Hugging Face or PEFT directory, or ORG/NAME on the Hub; else the embedded model.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        max_new_tokens: Stop after this many tokens.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the likeliest tokens that together reach this probability.
        stop: Also end before this text, or any of a list: ["###", "<|im_end|>"]. It may be a special token.
        prompt_style: chat_template, alpaca, chatml, llama3 or plain.
        system: A system message before the prompt.
        precision: By default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
        seed: Fixes the draws.
    """
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.demo import MODEL_DIR
    from litfreeze.generate.answer import Answer, Answerer, check_options, load_models
    from litfreeze.generate.sample import Sampling

    stops = check_options(max_new_tokens, stop)
    sampling = Sampling(temperature, top_k, top_p)
    answerer = Answerer(open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir), prompt_style)
    messages = [{"role": "system", "content": system}] if system is not None else []
    tokens = answerer.tokens([*messages, {"role": "user", "content": prompt}])
    load_models([answerer], accelerator, precision)
    if prompt == DEFAULT_PROMPT:
        path = answerer.checkpoint.path
        print(f"{path}, asked {prompt!r} (--prompt and --checkpoint_dir choose others):", file=sys.stderr)
    answer = ""
    for piece in Answer(answerer, tokens, max_new_tokens, sampling, stops, seed):
        answer += piece
        print(piece, end="", flush=True)
    print()
    return answer
