"""`litfreeze cache ls` and `litfreeze cache rm`: the activations of frozen blocks that runs have kept."""

from pathlib import Path
from typing import Optional

SHOWN = 12  # characters of a key


def ls(cache_dir: Optional[Path] = None) -> None:
    """List what finetune has kept of frozen blocks, the last used first.

    Args:
        cache_dir: The folder it is kept in; by default ~/.cache/litfreeze/prefix.
    """
    import time

    from litfreeze.prefix.folder import default_cache_dir, list_caches
    from litfreeze.sizes import megabytes

    root = Path(cache_dir or default_cache_dir())
    entries = list_caches(root)
    if not entries:
        print(f"{root} holds no caches.")
        return
    rows = [("key", "model", "blocks", "dtype", "records", "size", "last used", "")]
    for entry in entries:
        facts = (str(entry.about.get(name, "?")) for name in ("model", "layers", "dtype"))
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        state = "in use" if entry.in_use else ""
        rows.append((entry.key[:SHOWN], *facts, f"{entry.records:,}", megabytes(entry.nbytes), used, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["<", "<", ">", "<", ">", ">", "<", "<"]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True))
        print("  ".join(cells).rstrip())
    count = f"{len(entries)} cache{'s' if len(entries) > 1 else ''}"
    print(f"\n{count}, {megabytes(sum(entry.nbytes for entry in entries))} in {root}")


def rm(keys: str, cache_dir: Optional[Path] = None) -> None:
    """Remove what finetune has kept of frozen blocks. A cache that a run is using stays.

    Args:
        keys: The beginning of a key that `litfreeze cache ls` shows, or several as a,b; or all.
        cache_dir: The folder they are kept in; by default ~/.cache/litfreeze/prefix.
    """
    from litfreeze.errors import RunError
    from litfreeze.prefix.folder import default_cache_dir, list_caches, remove
    from litfreeze.sizes import megabytes

    root = Path(cache_dir or default_cache_dir())
    sizes = {entry.key: entry.nbytes for entry in list_caches(root)}
    chosen = list(sizes) if keys == "all" else _find(keys, list(sizes), root)
    try:
        left = remove(root, chosen)
    except OSError as error:
        raise RunError(f"{error.filename} cannot be removed: {error.strerror}.") from None
    removed = [key for key in chosen if key not in left]
    count = f"{len(removed)} cache{'' if len(removed) == 1 else 's'}"
    print(f"Removed {count}, {megabytes(sum(sizes[key] for key in removed))}, from {root}", flush=True)
    if left:
        names = ", ".join(key[:SHOWN] for key in left)
        raise RunError(f"{names}: in use by a run, and left alone. Try again when it has ended.")


def _find(keys: str, known: list[str], root: Path) -> list[str]:
    """The keys whose beginnings stand in `keys`, each once. Raises UsageError unless each begins exactly one."""
    from litfreeze.errors import UsageError, did_you_mean

    found = []
    for word in (part.strip() for part in keys.split(",")):
        fitting = [key for key in known if word and key.startswith(word)]
        fitting = [word] if word in fitting else fitting
        if len(fitting) > 1:
            raise UsageError(f"{word!r} begins {len(fitting)} keys: {', '.join(fitting)}. Write more of one.")
        if not fitting:
            shown = [key[:SHOWN] for key in known]
            near, there = did_you_mean(word, shown), ", ".join(shown) or "none"
            raise UsageError(f"{root} holds no cache that begins with {word!r}.{near} Caches: {there}.")
        found += fitting
    return list(dict.fromkeys(found))
