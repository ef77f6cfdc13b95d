"""`litfreeze serve`: answers over HTTP, in OpenAI's form."""

from pathlib import Path
from typing import Literal, Optional, Union

from litfreeze.local import LOCAL

LOOPBACK = LOCAL[0]
MISSING = "litfreeze serve needs LitServe. Install it: pip install 'litfreeze[serve]'."


def setup(
    checkpoint_dir: Optional[Path] = None,
    base_dir: Optional[Path] = None,
    adapters: Union[str, list[str], None] = None,
    host: Literal["127.0.0.1", "0.0.0.0", "::"] = LOOPBACK,
    port: int = 8000,
    api_key: Optional[str] = None,
    max_new_tokens: int = 1024,
    prompt_style: Optional[str] = None,
    precision: Optional[Literal["32-true", "bf16-true"]] = None,
    accelerator: str = "auto",
) -> None:
    """Serve a checkpoint, its base and its adapters to OpenAI's clients: /v1/chat/completions and /v1/models.

    A request names one of them as its `model`. Whatever it asks for that cannot be done is refused. Answers are written
    one after the other.

    Args:
        checkpoint_dir: A litfreeze, Hugging Face or PEFT directory; without it, the embedded demo model.
        base_dir: The base of an adapter or of a delta, where it is not where it was.
        adapters: More adapters or deltas over the same base, as sql=out/sql/final,chat=out/chat/final: the names of
            their models. What they have in common is in memory once.
        host: 127.0.0.1 serves this machine alone; 0.0.0.0 and :: every one that reaches it, and need an api_key.
        port: From 1024 to 65535.
        api_key: What clients must send as `Authorization: Bearer …`. The environment's LITFREEZE_API_KEY hides it from
            who lists this machine's processes.
        max_new_tokens: The most tokens of an answer to a request that does not say.
        prompt_style: chat_template, alpaca, chatml, llama3 or plain; by default as for generate.
        precision: By default 32-true on a CPU and bf16-true on a GPU that has it.
        accelerator: cpu, cuda, mps or auto.
    """
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError
    from litfreeze.generate.answer import check_options, open_answerers
    from litfreeze.launch import one_device

    check_options(max_new_tokens, None)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UsageError("--api_key must be printable ASCII, without blanks around it.")
    if host != LOOPBACK and api_key is None:
        raise UsageError(
            f"--host {host} lets other machines in: set an --api_key, or LITFREEZE_API_KEY in the environment."
        )
    try:
        from litfreeze.serve.processes import Server
        from litfreeze.serve.worker import Answers, Served
    except ImportError as error:
        if error.name != "litserve":
            raise
        raise UsageError(MISSING) from None
    _check_port(host, port)
    checkpoint_dir = checkpoint_dir or MODEL_DIR
    # What is wrong is told from here; the process of the model opens everything once more
    models = list(open_answerers(checkpoint_dir, base_dir, adapters, prompt_style))
    one_device(accelerator, precision)
    served = Served(checkpoint_dir, base_dir, adapters, prompt_style, max_new_tokens, accelerator, precision)
    Server(Answers(served, models, api_key), _greeting(host, port, models, api_key)).serve(host, port)


def _check_port(host: str, port: int) -> None:
    """Raises UsageError if it cannot be served on."""
    import socket

    from litfreeze.errors import UsageError

    if not 1024 <= port <= 65535:
        raise UsageError(f"--port {port} must be from 1024 to 65535.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise UsageError(f"--port {port} of {host} cannot be used: {error.strerror}. Choose another.") from None


def _greeting(host: str, port: int, models: list[str], api_key: Optional[str]) -> str:
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else '[::1]' if host == '::' else host}:{port}/v1"
    key = ' -H "Authorization: Bearer $LITFREEZE_API_KEY"' if api_key else ""
    asked = f'{{"model": "{models[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    everywhere = "" if host == LOOPBACK else f" (and every address of this machine: {host})"
    return (
        f"Serves    {url}{everywhere}; models: {', '.join(models)}\n"
        f"Try       curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{asked}'\n"
        "Ctrl-C ends it."
    )
