"""`litfreeze download`: a model from the Hugging Face Hub."""

from pathlib import Path
from typing import Optional


def setup(repo_id: str, out_dir: Optional[Path] = None, token: Optional[str] = None) -> Path:
    """Download a model from the Hugging Face Hub: its config, tokenizer and weights, and nothing else.

    It goes into the Hub's cache, which other tools share; --checkpoint_dir ORG/NAME takes it from there, and downloads
    what is not there. An adapter's base comes along.

    Args:
        repo_id: ORG/NAME or ORG/NAME@REVISION: a model's, or an adapter's.
        out_dir: A directory to download to, in place of the cache.
        token: For a private or gated model; HF_TOKEN, or what hf auth login keeps, needs no option.
    """
    import shlex

    from litfreeze.checkpoint.hub import download
    from litfreeze.checkpoint.open import open_checkpoint
    from litfreeze.errors import LitfreezeError
    from litfreeze.hub import with_token

    with with_token(token):
        folder = download(repo_id, out_dir and Path(out_dir))
        try:
            checkpoint = open_checkpoint(folder)
        except LitfreezeError as error:
            if "--base_dir" not in str(error):
                raise
            took = f"The adapter is here, {folder}: --base_dir goes with --checkpoint_dir, in generate and the others."
            raise type(error)(f"{' '.join(str(error).split())}\n{took}") from None
    config = checkpoint.config
    adapter = f", {checkpoint.lora.describe()} over {checkpoint.base.path}" if checkpoint.lora else ""
    print(f"Here      {folder}   ({config.n_layer} blocks of width {config.n_embd}{adapter})")
    ask = "classify --text Hello" if config.labels else "generate --prompt Hello"
    print(f"Next      litfreeze {ask} --checkpoint_dir {shlex.quote(str(repo_id if out_dir is None else folder))}")
    return folder
