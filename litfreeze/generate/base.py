"""`litfreeze generate`: write on from a prompt."""

import sys
from pathlib import Path
from typing import Literal, Optional, Union

DEFAULT_PROMPT = "Book a table for"


def setup(
    prompt: str = DEFAULT_PROMPT,
    checkpoint_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    stop: Union[str, list[str], None] = None,
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
        stop: Also end before this text, or any of a list of texts.
        prompt_style: chat_template, alpaca, chatml, llama3 or plain.
        system: A system message before the prompt.
        precision: By default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
        seed: Fixes the draws.
    """
    from litfreeze.checkpoint.directory import load_model, open_checkpoint
    from litfreeze.data.prompt import Prompt
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.generate.sample import Sampling, generate_tokens
    from litfreeze.generate.text import until
    from litfreeze.launch import build_fabric
    from litfreeze.precision import default_precision

    if max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {max_new_tokens} must be at least 1.")
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if "" in stops:
        raise UsageError("--stop is empty.")
    sampling = Sampling(temperature, top_k, top_p)
    checkpoint = open_checkpoint(checkpoint_dir or MODEL_DIR, base_dir)
    if checkpoint.config.labels:
        raise UsageError(
            f"{checkpoint.path} is a classifier and writes nothing: litfreeze classify --checkpoint_dir "
            f"{checkpoint.path} --text '…' tells the class of a text."
        )
    tokenizer = checkpoint.tokenizer()
    if prompt_style is None and checkpoint.prompt is None and tokenizer.chat_template is None:
        prompt_style = "plain"
    style = Prompt.choose(prompt_style, checkpoint.prompt, tokenizer)
    messages = [{"role": "system", "content": system}] if system is not None else []
    ids = tokenizer.encode(style.for_generation([*messages, {"role": "user", "content": prompt}]))
    checkpoint.check_tokens(ids)

    name = precision or default_precision(accelerator).replace("mixed", "true")
    fabric, kept = build_fabric(accelerator, 1, 1, name)
    model = load_model(checkpoint, lambda _: kept.frozen).to(fabric.device)
    tokens = generate_tokens(model, ids, max_new_tokens, tokenizer.eos_ids, sampling, seed)
    if prompt == DEFAULT_PROMPT:
        print(f"{checkpoint.path}, asked {prompt!r} (--prompt and --checkpoint_dir choose others):", file=sys.stderr)
    answer = ""
    for piece in until(tokenizer.stream(), tokens, stops):
        answer += piece
        print(piece, end="", flush=True)
    print()
    return answer
