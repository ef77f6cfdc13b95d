"""From the command line's words to what trains: ours (`--trainable_…`, `--lora_…`), LLaMA-Factory's (`--freeze_…`)."""

from typing import Any, Optional

from litfreeze.config import Config
from litfreeze.errors import UsageError
from litfreeze.freeze.args import FactoryArgs, ThawArgs
from litfreeze.freeze.layers import Names, Spec, format_layers, parse_layers, spread
from litfreeze.freeze.modules import narrow
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.freeze.thaw import Lisa, Thawing, Unfreezing
from litfreeze.lora import linear_layers

LISA_INTERVAL = 20  # steps
# LLaMA-Factory takes the names of transformers' modules, in which a norm's depends on whether others follow
MODULE_ALIASES = {"self_attn": "attn", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
POST_NORM_ALIASES = {
    **MODULE_ALIASES,
    "post_attention_layernorm": "post_norm_1",
    "pre_feedforward_layernorm": "norm_2",
    "post_feedforward_layernorm": "post_norm_2",
}
EXTRA_ALIASES = {"embed_tokens": "embed", "lm_head": "head", "score": "head", "norm": "final_norm"}


def weights_in_full(config: Config, layers: Optional[Spec], extra: Names) -> frozenset[str]:
    """The weights that train themselves beside an adapter: all of the blocks `layers`, the extras, and the head of a
    classifier."""
    if layers is None and extra is None and not config.labels:
        return frozenset()
    parse_layers("none" if layers is None else layers, config.n_layer, "full_layers", config.new_blocks)
    words = _extras(config, _split(extra))
    if not words and layers == "none":
        return frozenset()
    return FreezePlan.choose(config, "none" if layers is None else layers, extra=words).trained


def plan_from_words(
    config: Config,
    trainable_layers: Optional[Spec] = None,
    trainable_modules: Names = None,
    trainable_extra: Names = None,
    factory: FactoryArgs = FactoryArgs(),
    thaw: ThawArgs = ThawArgs(),
) -> FreezePlan:
    """The plan these words ask for; with no word at all, everything trains. It has all that trains at any time. The
    head of a classifier always does.

    Raises UsageError for words that contradict each other, and for all that `FreezePlan.choose` refuses."""
    layers = one_of(
        trainable_layers=trainable_layers,
        freeze_trainable_layers=_llama_factorys_count(config, factory.freeze_trainable_layers, factory.use_llama_pro),
        freeze_trainable_layers_ids=factory.freeze_trainable_layers_ids,
        unfreeze=thawing_layers(config, thaw),
    )
    if layers is None and thaw.lisa_layers is not None:
        layers = "all"
    theirs = {"freeze_trainable_modules": factory.freeze_trainable_modules}
    modules = _split(one_of(trainable_modules=trainable_modules, **theirs))
    extra = _split(one_of(trainable_extra=trainable_extra, freeze_extra_modules=factory.freeze_extra_modules))
    if layers is None and modules is None and extra is None:
        return FreezePlan.everything(config)
    if layers is None and modules is None:
        raise UsageError("--trainable_extra needs --trainable_layers: none to train the extras alone, or all.")
    if modules is not None:
        modules = [_ours(config, word) for word in modules]
        modules = None if modules == ["all"] else modules
    return FreezePlan.choose(config, "all" if layers is None else layers, modules, _extras(config, extra))


def _ours(config: Config, word: str) -> str:
    """Our name of a module."""
    return (POST_NORM_ALIASES if config.post_norm else MODULE_ALIASES).get(word, word)


def _extras(config: Config, words: Optional[list[str]]) -> list[str]:
    """What trains outside the blocks, by our names."""
    ours = [EXTRA_ALIASES.get(word, word) for word in words or ()]
    return [*ours, "head"] if config.labels and "head" not in ours else ours


def thawing_layers(config: Config, thaw: ThawArgs) -> Optional[Spec]:
    """The blocks that `--unfreeze` names; None without it."""
    thawing = Unfreezing.parse(thaw.unfreeze, config.n_layer, config.new_blocks) if thaw.unfreeze is not None else None
    return thawing and format_layers(thawing.blocks)


def thawing_from_words(config: Config, thaw: ThawArgs, seed: int) -> Optional[Thawing]:
    """When blocks train, if not from beginning to end."""
    if thaw.unfreeze is not None:
        return Unfreezing.parse(thaw.unfreeze, config.n_layer, config.new_blocks)
    return None if thaw.lisa_layers is None else Lisa(thaw.lisa_layers, thaw.lisa_interval or LISA_INTERVAL, seed)


def adapter_targets(config: Config, layers: Spec, targets: Names) -> list[str]:
    """The linear layers that `targets` name inside the blocks `layers`: all of them, or modules as for
    `--trainable_modules`; `head` stands outside the blocks. In the model's order.

    Raises UsageError for a word that matches nothing, for a classifier's head, and if nothing is left."""
    chosen = set(parse_layers(layers, config.n_layer, new=config.new_blocks))
    words = _split(targets)
    linear = linear_layers(config)
    inside = [f"{module}.weight" for module in linear if block_of(module) in chosen]
    named = [_ours(config, word) for word in words if EXTRA_ALIASES.get(word, word) not in ("head", "all")]
    found = set(inside) if "all" in words else set()
    if named:
        everywhere = [f"{module}.weight" for module in linear if block_of(module) is not None]
        found |= set(narrow(inside, named, everywhere, option="lora_targets"))
    if any(EXTRA_ALIASES.get(word, word) == "head" for word in words):
        found.add("head.weight")
    if config.labels and "head.weight" in found:
        raise UsageError("--lora_targets head: a classifier's head always trains in full. Leave it out.")
    if not found and config.labels:
        raise UsageError(
            "No layer is left to adapt: name blocks with --trainable_layers. A classifier's head alone trains with "
            "litfreeze finetune full --task classification --trainable_layers none."
        )
    if not found:
        raise UsageError("No layer is left to adapt: name blocks with --trainable_layers, or --lora_targets head.")
    return [module for module in linear if f"{module}.weight" in found]


def _llama_factorys_count(config: Config, count: Optional[int], use_llama_pro: bool) -> Optional[Spec]:
    """LLaMA-Factory's sign: 8 is the last eight blocks, -8 the first eight; with `use_llama_pro` 8 is the last block of
    each of eight equal groups, as its script for block expansion puts new ones in."""
    n_layer = config.n_layer
    if count is None:
        if use_llama_pro:
            raise UsageError(
                "--use_llama_pro needs --freeze_trainable_layers, the number of new blocks. "
                "--trainable_layers new needs none, after litfreeze expand."
            )
        return None
    if use_llama_pro:
        every = f"every:{n_layer // len(spread(n_layer, count, 'freeze_trainable_layers'))}"
        if config.new_blocks and parse_layers(every, n_layer) != list(config.new_blocks):
            raise UsageError(
                f"--use_llama_pro --freeze_trainable_layers {count} means blocks {every}, but the new ones of this "
                f"model are {format_layers(config.new_blocks)}. Say --trainable_layers new."
            )
        return every
    if isinstance(count, bool) or not isinstance(count, int) or count == 0 or abs(count) > n_layer:
        raise UsageError(
            f"--freeze_trainable_layers {count}: n > 0 trains the last n blocks, n < 0 the first n; "
            f"this model has {n_layer}."
        )
    return f"last:{count}" if count > 0 else f"first:{-count}"


def one_of(**words: Any) -> Any:
    """The word that is given of several options that mean the same; None if none is. Raises UsageError if two are."""
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
