"""`litfreeze chat`: a conversation in the terminal."""

from pathlib import Path
from typing import Literal, Optional, Union

from litfreeze.texts import Texts


def setup(
    checkpoint_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    adapters: Union[str, list[str], None] = None,
    system: Optional[str] = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    stop: Texts = None,
    prompt_style: Optional[str] = None,
    precision: Optional[Literal["32-true", "bf16-true"]] = None,
    accelerator: str = "auto",
    seed: int = 1337,
) -> None:
    """Talk with a checkpoint, its base and its adapters: a line is a turn, and what was said before is remembered.

    Answers go to standard output, everything else to standard error; lines can be piped in. Ctrl-C ends an answer,
    Ctrl-D the conversation, /help lists the commands.

    Args:
        checkpoint_dir: A litfreeze, Hugging Face or PEFT directory; without it, the embedded demo model.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        adapters: More adapters or deltas over the same base, as sql=out/sql/final,chat=out/chat/final. /adapter NAME
            goes to one; what they have in common is in memory once.
        system: A system message before the conversation.
        max_new_tokens: The most tokens of an answer.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: Draw among the k likeliest tokens only.
        top_p: Draw among the likeliest tokens that together reach this probability.
        stop: Also end an answer before this text, or any of a list: ["###", "<|im_end|>"].
        prompt_style: chat_template, alpaca, chatml, llama3 or plain; by default as for generate.
        precision: By default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
        seed: Fixes the draws.
    """
    from litfreeze.demo import MODEL_DIR
    from litfreeze.generate.answer import check_options, load_models, open_answerers
    from litfreeze.generate.conversation import Conversation
    from litfreeze.generate.sample import Sampling

    stops = check_options(max_new_tokens, stop)
    sampling = Sampling(temperature, top_k, top_p)
    answerers = open_answerers(checkpoint_dir or MODEL_DIR, base_dir, adapters, prompt_style)
    load_models(answerers.values(), accelerator, precision)
    Conversation(answerers, system, max_new_tokens, sampling, stops, seed).talk()
