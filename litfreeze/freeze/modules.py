"""Words for what is inside of blocks: --trainable_modules attn, norm, experts.3, '*.q_proj.*', re:…"""

import re
from fnmatch import fnmatchcase

from litfreeze.errors import UsageError, did_you_mean

NORMS = ("norm_1", "post_norm_1", "norm_2", "post_norm_2", "q_norm", "k_norm")


def narrow(inside: list[str], words: list[str], all_names: list[str], option: str = "trainable_modules") -> list[str]:
    """Those of the parameters `inside` that one of `words` names; every word must name something."""
    if not words or "" in words:
        raise UsageError(f"--{option} has an empty part. Modules: {_known(all_names)}.")
    kept: set[str] = set()
    for word in words:
        matched = {name for name in inside if _matches(word, name)}
        if not matched:
            where = (
                "in the chosen blocks" if any(_matches(word, name) for name in all_names) else "in this model's blocks"
            )
            known = _known(all_names)
            raise UsageError(
                f"--{option} {word!r} matches nothing {where}.{did_you_mean(word, known.split(', '))} "
                f"Modules: {known}; or a glob such as '*.q_proj.*', or re:… on full names."
            )
        kept |= matched
    return [name for name in inside if name in kept]


def _matches(word: str, name: str) -> bool:
    if word.startswith("re:"):
        try:
            return re.fullmatch(word[3:], name) is not None
        except re.error as error:
            raise UsageError(f"{word!r} is no regular expression: {error}.") from None
    if any(sign in word for sign in "*?["):
        return fnmatchcase(name, word) or fnmatchcase(name.rpartition(".")[0], word)
    components, parts = inner(name).split("."), word.split(".")
    if parts[0].isdigit():
        return False  # an expert, and no word of its own: experts.3
    named = any(components[at : at + len(parts)] == parts for at in range(len(components)))
    return named or (word == "norm" and any(c in NORMS for c in components))


def _known(names: list[str]) -> str:
    """The words that name a module here."""
    every = [inner(name).split(".") for name in names]
    components = dict.fromkeys(c for inner in every for c in inner if c not in ("weight", "bias") and not c.isdigit())
    experts = {int(inner[2]) for inner in every if inner[1:2] == ["experts"]}
    several = [f"experts.0 to experts.{max(experts)}"] if experts else []
    norm = ["norm"] if any(component in NORMS for component in components) else []
    bias = ["bias"] if norm and any(name.endswith(".bias") for name in names) else []
    return ", ".join([*norm, *components, *several, *bias])


def inner(name: str) -> str:
    """'blocks.10.attn.q_proj.weight' is 'attn.q_proj.weight' inside its block."""
    return name.split(".", 2)[2]
