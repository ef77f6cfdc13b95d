"""Where a LoRA run begins: with a new adapter, with the one it was given, or with a new one over the merged base."""

from types import SimpleNamespace
from typing import Any

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.classifier import HEAD
from litfreeze.checkpoint.merge import fold
from litfreeze.errors import UsageError
from litfreeze.freeze.layers import format_layers, parse_layers
from litfreeze.freeze.plan import FreezePlan, block_of
from litfreeze.freeze.words import adapter_targets, thawing_layers, weights_in_full
from litfreeze.lora import MOST_RANK, LoRA, fresh_tensors, grown_tensors, linear_layers

FRESH = {"lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05, "use_rslora": False, "use_dora": False}
LR = 2e-4  # of a new adapter; Dettmers et al., arXiv 2305.14314, for models up to 13B
OTHERWISE = "Leave the option out, or begin a new adapter with --merge_first."
SLOWER = 0.5  # a continued adapter begins with this much of its last learning rate


def begin(opened: Checkpoint, options: SimpleNamespace) -> tuple[Checkpoint, FreezePlan, list[str]]:
    """The checkpoint with the adapter that will train, the plan, and what the person is told about it.

    Raises UsageError for settings out of range, and for those that contradict a given adapter."""
    _check_ranges(options)
    if options.thaw.unfreeze is not None and options.trainable_layers is not None:
        raise UsageError("--unfreeze and --trainable_layers both say which blocks train; keep one of them.")
    if opened.lora is None:
        for name in ("merge_first", "lora_resize"):
            if getattr(options, name):
                raise UsageError(f"--{name}: {opened.path} carries no adapter, so a new one begins anyway.")
        return (*_fresh(opened, options), [])
    if options.merge_first:
        if options.lora_resize:
            raise UsageError(
                "--lora_resize and --merge_first: a new adapter begins, with any --lora_r. Keep one of them."
            )
        told = [
            f"Merged    {opened.lora.describe()} of {opened.path} into its base, {opened.base.path}.",
            *_past(opened),
        ]
        return (*_fresh(fold([opened]), options), told)
    return _continued(opened, options)


def default_lr(opened: Checkpoint, options: SimpleNamespace) -> tuple[float, list[str]]:
    """The learning rate if none is given, and what to say about it: an adapter that has trained goes on slower."""
    runs = _runs(opened)
    last = runs[-1].get("lr") if opened.lora is not None and runs else None
    if last is None or options.merge_first or options.resume:
        return LR, []
    slower, given = last * SLOWER, options.train.lr
    if given is None:
        return slower, [f"Its learning rate was {last:g}; going on with {slower:g} (--train.lr sets another)."]
    gentler = f"Its learning rate was {last:g}; --train.lr {slower:g} or lower is gentler."
    return given, [gentler] if given > slower else []


def _fresh(checkpoint: Checkpoint, options: SimpleNamespace) -> tuple[Checkpoint, FreezePlan]:
    config = checkpoint.config
    full = weights_in_full(config, options.full_layers, options.trainable_extra)
    layers = options.trainable_layers
    if layers is None:
        thawing = thawing_layers(config, options.thaw)
        blocks = parse_layers("all" if thawing is None else thawing, config.n_layer)
        taken = options.full_layers if options.full_layers is not None else "none"
        taken = parse_layers(taken, config.n_layer, "full_layers", config.new_blocks)
        layers = format_layers(i for i in blocks if i not in taken)
    targets = adapter_targets(config, layers, "all" if options.lora_targets is None else options.lora_targets)
    chosen = {
        name: value if getattr(options, name) is None else getattr(options, name) for name, value in FRESH.items()
    }
    lora = LoRA(
        ranks=dict.fromkeys(targets, chosen["lora_r"]),
        alphas=dict.fromkeys(targets, float(chosen["lora_alpha"])),
        dropout=chosen["lora_dropout"],
        rslora=chosen["use_rslora"],
        dora=chosen["use_dora"],
    )
    plan = FreezePlan.adapter(config, lora, full, options.lora_plus_ratio or 1.0, options.full_lr_ratio)
    return checkpoint.with_lora(
        lora, fresh_tensors(lora, linear_layers(config), _weight(checkpoint), options.seed)
    ), plan


def _continued(opened: Checkpoint, options: SimpleNamespace) -> tuple[Checkpoint, FreezePlan, list[str]]:
    lora = opened.lora
    last = (opened.manifest or {}).get("training") or {}  # nothing of a PEFT adapter
    trained = last.get("trained", opened.replaced)
    # A classifier's head always trains, a fresh one over a language model's adapter too
    in_full = [name for name in opened.replaced if name in trained or (name == HEAD and opened.config.labels)]
    _refuse_conflicts(opened, in_full, options)
    told = [f"Continues {lora.describe()} of {opened.path}, over {opened.base.path}.", *_past(opened)]
    new = lora
    # PEFT's may be stored in bf16; what trains is kept as it trained
    tensors = {name: opened.read(name).float() for module in lora.ranks for name in lora.parameters(module)}
    if options.lora_resize:
        new = lora.resized(options.lora_r)
        tensors = grown_tensors(lora, new, opened.read, options.seed)
        told.append(f"Rank {options.lora_r} from here on, alpha {_one(new.alphas)}: the same function to begin with.")
    if options.lora_dropout is not None and options.lora_dropout != lora.dropout:
        told.append(f"Dropout {options.lora_dropout:g} from here on; it was {lora.dropout:g}.")
        new = LoRA(new.ranks, new.alphas, options.lora_dropout, new.rslora, new.dora)
    ratio = options.lora_plus_ratio
    if ratio is None and (ratio := last.get("lora_plus_ratio", 1.0)) != 1:
        told.append(f"B goes on at {ratio:g} times the learning rate of A (LoRA+), as before.")
    plan = FreezePlan.adapter(opened.config, new, in_full, ratio, options.full_lr_ratio)
    return opened.with_lora(new, tensors), plan, told


def _refuse_conflicts(opened: Checkpoint, in_full: list[str], options: SimpleNamespace) -> None:
    """An option that says something else than the adapter is an error that names both, never ignored."""
    lora, config = opened.lora, opened.config
    if options.lora_resize:
        if options.lora_r is None:
            raise UsageError("--lora_resize needs --lora_r, the new rank.")
        if smaller := [r for r in lora.ranks.values() if r > options.lora_r]:
            raise UsageError(
                f"--lora_r {options.lora_r} --lora_resize: the adapter has rank {max(smaller)}, and a smaller one "
                "cannot compute the same. Choose a larger one, or --merge_first for a new adapter of any rank."
            )
    elif options.lora_r is not None:
        larger = options.lora_r > max(lora.ranks.values())
        _compare("lora_r", options.lora_r, lora.ranks.values(), opened, " --lora_resize makes it larger." * larger)
    alphas = (lora.resized(options.lora_r) if options.lora_resize else lora).alphas
    _compare("lora_alpha", options.lora_alpha, alphas.values(), opened)
    _compare("use_rslora", options.use_rslora, [lora.rslora], opened)
    _compare("use_dora", options.use_dora, [lora.dora], opened)
    _compare_places(opened, options)
    for name in ("full_layers", "trainable_extra"):
        if getattr(options, name) is not None:
            full = weights_in_full(config, options.full_layers, options.trainable_extra)
            if full != frozenset(in_full):
                had = f"{len(in_full)} tensors" if in_full else "nothing"
                raise UsageError(
                    f"--{name} {getattr(options, name)} names {len(full)} tensors to train in full; in {opened.path} "
                    f"{had} did. {OTHERWISE}"
                )


def _compare_places(opened: Checkpoint, options: SimpleNamespace) -> None:
    """Blocks are compared with the adapter's blocks, targets with what it has in them."""
    lora, config = opened.lora, opened.config
    blocks = sorted({block_of(module) for module in lora.ranks} - {None})
    asked = blocks
    wrong = None
    if options.trainable_layers is not None:
        asked = parse_layers(options.trainable_layers, config.n_layer, new=config.new_blocks)
        wrong = "trainable_layers" if asked != blocks else None
    if wrong is None and options.lora_targets is not None:
        targets = adapter_targets(config, format_layers(asked), options.lora_targets)
        wrong = "lora_targets" if set(targets) != set(lora.ranks) else None
    if wrong is not None:
        raise UsageError(
            f"--{wrong} {getattr(options, wrong)} contradicts the adapter of {opened.path}, which stands on "
            f"{_where(lora)}. {OTHERWISE}"
        )


def _compare(name: str, asked: Any, own: Any, opened: Checkpoint, hint: str = "") -> None:
    if asked is not None and any(asked != value for value in own):
        shown = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(set(own)))
        raise UsageError(
            f"--{name} {asked} contradicts the adapter of {opened.path}, which has {shown.lower()}.{hint} {OTHERWISE}"
        )


def _check_ranges(options: SimpleNamespace) -> None:
    r = options.lora_r
    if r is not None and (not isinstance(r, int) or not 1 <= r <= MOST_RANK):
        raise UsageError(f"--lora_r {r} must be a whole number, from 1 to {MOST_RANK:,}.")
    if options.lora_alpha is not None and not 0 < options.lora_alpha < float("inf"):
        raise UsageError(f"--lora_alpha {options.lora_alpha:g} must be a number above 0.")
    if options.lora_dropout is not None and not 0 <= options.lora_dropout < 1:
        raise UsageError(f"--lora_dropout {options.lora_dropout:g} must be at least 0 and below 1.")
    for name in ("lora_plus_ratio", "full_lr_ratio"):
        if getattr(options, name) is not None and not 0 < getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(options, name):g} must be a number above 0.")


def _past(opened: Checkpoint) -> list[str]:
    """How far it had trained, and what it had reached."""
    lines = []
    for run in _runs(opened):
        after = f", validation loss {run['after']['loss']:.4f}" if run.get("after") else ""
        steps = f"{run['step']} step{'s' * (run['step'] != 1)} ({run['epochs']:g} epochs, {run['tokens']:,} tokens)"
        lines.append(f"Trained   {run['kind']}: {steps}{after}.")
    return lines


def _runs(opened: Checkpoint) -> list[dict[str, Any]]:
    """What trained it, as far as is known: a PEFT adapter says nothing, and what its base says is not its own."""
    return opened.history if opened.manifest is not None else []


def _where(lora: LoRA) -> str:
    kinds = list(dict.fromkeys(module.rpartition(".")[2] for module in lora.ranks))
    blocks = {block_of(module) for module in lora.ranks} - {None}
    return ", ".join(kinds) + (f" of blocks {format_layers(blocks)}" if blocks else "")


def _one(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values.values())))


def _weight(checkpoint: Checkpoint):
    """The weight under an adapter, by module; a tied head's is the embedding."""
    tied = checkpoint.config.tie_embeddings

    def read(module: str):
        return checkpoint.read("embed.weight" if tied and module == "head" else f"{module}.weight")

    return read
