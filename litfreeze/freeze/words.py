"""From the command line's words to a plan: ours (`--trainable_…`) and LLaMA-Factory's (`--freeze_…`)."""

from typing import Optional

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.freeze.layers import Names, Spec
from litfreeze.freeze.plan import FreezePlan

# LLaMA-Factory takes the names of transformers' modules
MODULE_ALIASES = {"self_attn": "attn", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
EXTRA_ALIASES = {"embed_tokens": "embed", "lm_head": "head", "norm": "final_norm"}


def plan_from_words(
    config: Config,
    trainable_layers: Optional[Spec] = None,
    trainable_modules: Names = None,
    trainable_extra: Names = None,
    freeze_trainable_layers: Optional[int] = None,
    freeze_trainable_modules: Names = None,
    freeze_extra_modules: Names = None,
    freeze_trainable_layers_ids: Optional[Spec] = None,
) -> FreezePlan:
    """The plan these words ask for; with no word at all, everything trains.

    Raises UsageError for words that contradict each other, and for all that `FreezePlan.choose` refuses."""
    layers = _one_of(
        trainable_layers=trainable_layers,
        freeze_trainable_layers=_count_from_an_end(freeze_trainable_layers, config.n_layer),
        freeze_trainable_layers_ids=freeze_trainable_layers_ids,
    )
    modules = _split(_one_of(trainable_modules=trainable_modules, freeze_trainable_modules=freeze_trainable_modules))
    extra = _split(_one_of(trainable_extra=trainable_extra, freeze_extra_modules=freeze_extra_modules))
    if layers is None and modules is None and extra is None:
        return FreezePlan.everything(config)
    if layers is None and modules is None:
        raise UsageError("--trainable_extra needs --trainable_layers: none to train the extras alone, or all.")
    if modules is not None:
        modules = [MODULE_ALIASES.get(word, word) for word in modules]
        modules = None if modules == ["all"] else modules
    extra = [EXTRA_ALIASES.get(word, word) for word in extra or ()]
    return FreezePlan.choose(config, "all" if layers is None else layers, modules, extra)


def _count_from_an_end(count: Optional[int], n_layer: int) -> Optional[Spec]:
    """LLaMA-Factory's sign: 8 is the last eight blocks, -8 the first eight."""
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int) or count == 0 or abs(count) > n_layer:
        raise UsageError(
            f"--freeze_trainable_layers {count}: n > 0 trains the last n blocks, n < 0 the first n; "
            f"this model has {n_layer}."
        )
    return f"last:{count}" if count > 0 else f"first:{-count}"


def _one_of(**words):
    given = {name: value for name, value in words.items() if value is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join('--' + name for name in given)} say the same thing; keep one of them.")
    return next(iter(given.values()), None)


def _split(names: Names) -> Optional[list[str]]:
    """'attn, mlp' or ['attn', 'mlp'] as a list; commas inside a regular expression are its own."""
    if names is None:
        return None
    items = [names] if isinstance(names, str) else list(names)
    parts: list[str] = []
    for item in items:
        if not isinstance(item, str):
            raise UsageError(f"Module names are words, not {item!r}.")
        parts += [item] if item.startswith("re:") else [part.strip() for part in item.split(",")]
    if not parts or "" in parts:
        raise UsageError(f"An empty name in {names!r}.")
    return parts
