"""adapter_config.json: what PEFT says of an adapter beside its tensors.

As with config.json, every field is honoured, known to leave the mathematics alone, or refused."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Optional

from litfreeze.errors import UsageError

PEFT_CONFIG = "adapter_config.json"

# --- reading ---------------------------------------------------------------------------------------------------------

Kind = tuple[Callable[[Any], bool], str]  # whether a value is one, and what it must be


def _patterns(kind: Kind) -> Kind:
    """PEFT's regular expressions over names of modules, each with a value of `kind`."""
    allowed, must = kind

    def are(value: Any) -> bool:
        try:
            return isinstance(value, dict) and all(re.compile(key) and allowed(v) for key, v in value.items())
        except re.error:
            return False

    return are, f"an object that gives regular expressions {must} each"


RANK: Kind = (lambda v: type(v) is int and v > 0, "a positive whole number")
ALPHA: Kind = (lambda v: type(v) in (int, float) and 0 < v < math.inf, "a positive number")
SHARE: Kind = (lambda v: type(v) in (int, float) and 0 <= v <= 1, "a number from 0 to 1")
FLAG: Kind = (lambda v: type(v) is bool, "true or false")
WORDS: Kind = (lambda v: isinstance(v, list) and all(type(word) is str and word for word in v), "a list of names")
BASE_KEPT: Kind = (
    lambda v: v in (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "one that leaves the base's weights alone. PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) "
    "makes a plain adapter of PiSSA, OLoRA, CorDA and LoRA-GA",
)
# What is honoured: the value where none is given, and what it must be
FIELDS: dict[str, tuple[Any, Kind]] = {
    "peft_type": (None, (lambda v: v == "LORA", "LORA; litfreeze knows no other kind of adapter")),
    "task_type": ("CAUSAL_LM", (lambda v: v == "CAUSAL_LM", "CAUSAL_LM")),
    "init_lora_weights": (True, BASE_KEPT),
    "r": (8, RANK),
    "lora_alpha": (8, ALPHA),
    "rank_pattern": ({}, _patterns(RANK)),
    "alpha_pattern": ({}, _patterns(ALPHA)),
    "lora_dropout": (0.0, SHARE),
    "use_rslora": (False, FLAG),
    "use_dora": (False, FLAG),
    "modules_to_save": ([], WORDS),
}
# What the tensors say themselves, how the adapter began, and bookkeeping
# fmt: off
HARMLESS = frozenset({
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "fan_in_fan_out",
    "ensure_weight_tying", "eva_config", "loftq_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "megatron_core", "runtime_config", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "peft_version",
})
# fmt: on
OFF = (None, False, 0, "", [], {})


def honoured(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The value of each of `FIELDS` in `settings`, the content of `file`. Raises UsageError for a wrong value, and for
    any other field that is set and not harmless."""
    known = {}
    for key, (default, (allowed, must)) in FIELDS.items():
        value = settings.get(key)
        known[key] = default if value is None else value
        if not allowed(known[key]):
            raise UsageError(f"{file}: {key} is {json.dumps(value)[:60]}; it must be {must}.")
    rest = {k: v for k, v in settings.items() if k not in FIELDS and k not in HARMLESS and v not in OFF}
    if rest:
        told = ", ".join(f"{key}={json.dumps(value)[:60]}" for key, value in list(rest.items())[:3])
        raise UsageError(
            f"{file}: litfreeze does not honour {told}. "
            "If PEFT can fold this adapter into its base (merge_and_unload), use what that gives."
        )
    return known


def matching(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """What the first of PEFT's patterns that names `module` gives it: one of its rank_pattern or alpha_pattern."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


# --- writing ---------------------------------------------------------------------------------------------------------


def settings_for(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    blocks: Mapping[str, Optional[int]],
    n_layer: int,
    alone: bool = True,
) -> dict[str, Any]:
    """The fields that give exactly the modules in `ranks` an adapter, of these ranks and alphas.

    `blocks` tells of every module of the model which block it is in (None: in none). If it is not `alone`, beside it
    are modules of the same short names, which shall have none."""
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    targets, layers = _targets(ranks, blocks, n_layer) if alone else (sorted(ranks), None)
    return {
        "r": r,
        "lora_alpha": _number(alpha),
        "rank_pattern": {re.escape(module): own for module, own in ranks.items() if own != r},
        "alpha_pattern": {re.escape(module): _number(own) for module, own in alphas.items() if own != alpha},
        "target_modules": targets,
        "layers_to_transform": layers,
    }


def _number(alpha: float) -> float:
    """PEFT's alphas are whole numbers where they can be."""
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(
    adapted: Collection[str], blocks: Mapping[str, Optional[int]], n_layer: int
) -> tuple[list[str], Optional[list[int]]]:
    """target_modules and layers_to_transform: short names where some blocks have the same adapted, else full ones."""
    inside: dict[int, set[str]] = {}  # block -> names within it
    outside = []
    for module in adapted:
        if (block := blocks[module]) is None:
            outside.append(module)
        else:
            inside.setdefault(block, set()).add(module.partition(f".{block}.")[2])
    if len(set(map(frozenset, inside.values()))) != 1:
        return sorted(adapted), None
    targets = [_shortest(name, blocks) for name in next(iter(inside.values()))]
    return sorted(targets + outside), None if len(inside) == n_layer else sorted(inside)


def _shortest(name: str, modules: Collection[str]) -> str:
    """The last word of `name`, unless something else in a block ends in it too."""
    word = name.rpartition(".")[2]
    alone = all(module.endswith(f".{name}") for module in modules if module.endswith(f".{word}"))
    return word if alone else name
