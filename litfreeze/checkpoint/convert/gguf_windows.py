"""Sliding windows in GGUF's metadata and in config.json, both ways."""

from collections.abc import Callable
from typing import Any

from litfreeze.checkpoint.convert.gguf_family import Family
from litfreeze.checkpoint.convert.gguf_file import GGUFFile
from litfreeze.checkpoint.convert.gguf_rope import LOCAL_BASE
from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.fields import MOST_LAYERS


def hf_windows(file: GGUFFile, take: Callable[..., Any], family: Family, n_layer: Any) -> dict[str, Any]:
    """The fields of config.json that say which of `n_layer` blocks have a sliding window."""
    if family.windows is None:
        return {}
    size = take("attention.sliding_window", family.windows.size)
    if not family.windows.used:
        return {"sliding_window": size or None}
    period = take("attention.sliding_window_pattern", family.windows.period)
    if type(period) is not int or period < 0:
        raise UsageError(f"{file.path}: {family.arch}.attention.sliding_window_pattern is {period}.")
    period = 1 if family.windows.size is None and not size else period  # no window at all
    blocks = range(n_layer if type(n_layer) is int and n_layer <= MOST_LAYERS else 0)
    kinds = ["full_attention" if _sees_all(i, period) else "sliding_attention" for i in blocks]
    return {"layer_types": kinds, **({} if period == 1 else {"sliding_window": size})}


def _sees_all(i: int, period: int) -> bool:
    """Whether block `i` is without a window if each `period`-th is; 0 is none."""
    return period > 0 and i % period == period - 1


def windows_metadata(config: Config, family: Family) -> tuple[dict[str, Any], list[str]]:
    """The keys that say which blocks have a sliding window, and what is to be told of them."""
    if family.windows is None:
        return {}, []
    if not family.windows.used:
        return {"attention.sliding_window": 0}, []
    usual, blocks = family.windows.period, range(config.n_layer)
    for period in (usual, 0, *range(1, config.n_layer + 1)):
        if all((config.windows[i] is None) == _sees_all(i, period) for i in blocks):
            break
    else:
        raise UsageError(
            f"llama.cpp's {family.arch} has a window in every block but each n-th; this model has it elsewhere."
        )
    if period == 1 and family.windows.size is None:
        return {}, []
    if period == 1:
        raise UsageError(f"llama.cpp's {family.arch} does not run without a block with a window; this model has none.")
    found = {} if period == usual else {"attention.sliding_window_pattern": period}
    if config.local_rope is not None and config.local_rope.theta != LOCAL_BASE:
        found["rope.freq_base_swa"] = config.local_rope.theta
    told = [f"Older versions of llama.cpp know no {key} ({value}), and answer wrongly." for key, value in found.items()]
    sizes = {window for window in config.windows if window is not None}
    return found | ({"attention.sliding_window": sizes.pop()} if sizes else {}), told


def context_length(config: Config, family: Family) -> int:
    """How many positions llama.cpp computes as the model does: its smallest window where llama.cpp has none."""
    if family.windows is not None and family.windows.used:
        return config.block_size
    return min([config.block_size, *(window for window in config.windows if window is not None)])
