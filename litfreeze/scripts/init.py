"""`litfreeze init`: a checkpoint with random weights, from which `finetune full` pretrains."""

from pathlib import Path
from typing import Literal, Optional


def setup(
    tokenizer_dir: Optional[Path] = None,
    out_dir: Path = Path("out/init"),
    preset: Optional[str] = None,
    config_file: Optional[Path] = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 1337,
) -> Path:
    """Make a checkpoint with random weights. Train it on plain text with `litfreeze finetune full --data text.txt`.

    Args:
        tokenizer_dir: Where tokenizer.json or tokenizer.model lies; without it, the embedded demo's tokenizer.
        out_dir: The checkpoint directory to write.
        preset: A shape by name, such as qwen3-0.6b; a wrong one tells them all. By default demo.
        config_file: A shape from a Hugging Face config.json instead.
        dtype: What the weights are stored in, rounded once.
        seed: Fixes the weights.
    """
    import torch

    from litfreeze.checkpoint.write import stored_as, write_checkpoint
    from litfreeze.config import Config, language_config
    from litfreeze.demo import MODEL_DIR
    from litfreeze.errors import UsageError, did_you_mean
    from litfreeze.json_file import read_json
    from litfreeze.model import GPT
    from litfreeze.presets import PRESETS
    from litfreeze.tokenizer import Tokenizer

    if preset is not None and config_file is not None:
        raise UsageError("--preset and --config_file both name a shape; keep one of them.")
    if config_file is None:
        preset = preset or "demo"
    if preset is not None and preset not in PRESETS:
        raise UsageError(
            f"--preset {preset!r} is unknown.{did_you_mean(preset, PRESETS)} Presets: {', '.join(PRESETS)}."
        )
    tokenizer_dir = Path(tokenizer_dir or MODEL_DIR)
    hf_config = (
        dict(PRESETS[preset]) if preset is not None else language_config(read_json(config_file), str(config_file))
    )
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    if preset is not None:
        hf_config |= {"vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id}
        hf_config |= {"eos_token_id": tokenizer.eos_id}
    stored = getattr(torch, dtype)
    hf_config = stored_as(hf_config, stored)  # whatever the file says
    config = Config.from_hf(hf_config, str(config_file or preset))
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"{tokenizer_dir}: {tokenizer.vocab_size} tokens do not fit a vocab_size of {config.vocab_size}."
        )
    model = GPT(config)
    model.init_weights(seed)
    weights = dict(model.named_parameters())
    layout = {name: (stored, tuple(weight.shape)) for name, weight in weights.items()}
    write_checkpoint(
        Path(out_dir), hf_config, layout, lambda name: weights[name].to(stored), {"kind": "init"}, tokenizer_dir
    )
    total = sum(weight.numel() for weight in weights.values())
    print(f"{out_dir}: {config.n_layer} blocks, {total:,} random parameters (seed {seed}).")
    print(f"Next: litfreeze finetune full --checkpoint_dir {out_dir} --data text.txt")
    return Path(out_dir)
