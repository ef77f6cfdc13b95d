"""Sets of Hugging Face's `datasets`: a folder that `save_to_disk` made, or ORG/NAME (ORG/NAME@REVISION) on the Hub.

A set on the Hub is a `subset` (its configuration) of several splits, kept as Arrow files in the cache that `datasets`
uses. What is there is taken as it is, without asking the Hub; a name with a commit always means the same. Code from the
Hub never runs: `datasets` has not run any since 4.0."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

from litfreeze.data.columns import AT_ONCE, MISSING, fields_of
from litfreeze.errors import LitfreezeError, UsageError, did_you_mean
from litfreeze.hub import NAME, is_hub_name, library, reason, talking
from litfreeze.json_file import read_json

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".parquet")  # a name that ends so is a file's, not one on the Hub
VALIDATION = ("validation", "valid", "val", "dev", "eval")  # a split of such a name is for validation
COMMIT = re.compile("[0-9a-f]{40}")
DEFAULT = "default"  # the subset of a set that has no other


def is_on_hub(path: Path) -> bool:
    """Whether `path` is nothing here, and has the form of a name on the Hub."""
    return is_hub_name(path) and path.suffix.lower() not in SUFFIXES and not path.exists()


def is_dataset(path: Path) -> bool:
    """Whether `path` is a folder made by `save_to_disk`, or a name on the Hub."""
    parts = {"dataset_dict.json"}, {"dataset_info.json", "state.json"}  # of a DatasetDict, of a Dataset
    return any(all((path / name).is_file() for name in names) for names in parts) or is_on_hub(path)


def split_names(path: Path, subset: Optional[str]) -> list[str]:
    """The splits of a set; none of one that was saved without any. Raises what `rows` raises."""
    return [name for name in _splits(path, subset) if name]


def training_splits(
    path: Path, subset: Optional[str], split: Optional[str], val_split: Optional[str], splits_off: bool
) -> tuple[Optional[str], Optional[str]]:
    """The split to train on and the one to validate on, None where the set has no splits or a part is split off.

    Trained on is `split`, by default "train" or the only one. Validated on is `val_split`, by default one that is named
    for it, unless another one than "train" was asked for or a part of the records is (`splits_off`). A test split is
    used if it is asked for: by default nothing is chosen by what should judge it. Raises UsageError if `split` is not
    given and cannot be guessed, and what `rows` raises."""
    names = split_names(path, subset)
    if not names:
        return split, val_split
    taken = split or ("train" if "train" in names else None)
    if val_split is None and not splits_off and taken == "train":
        val_split = next((name for name in VALIDATION if name in names), None)
    taken = taken or _only(path, names)
    if taken == val_split:
        raise UsageError(f"--data.val_split {val_split} is what is trained on. Name another of {', '.join(names)}.")
    return taken, val_split


def rows(path: Path, subset: Optional[str], split: Optional[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of one split, as `columns.fields_of` gives them and with names in place of the numbers of classes, and
    where each stands: `name[split]:row`, counted from 1. Memory holds a few of them at a time.

    Raises UsageError if `datasets` is not installed, the set is broken or not to be had, or it has several splits or
    subsets and none, or another one, is named; RunError if the network fails."""
    splits = _splits(path, subset)
    if split is not None and split not in splits:
        names = [name for name in splits if name]
        there = f"its splits: {', '.join(names)}" if names else "it has none"
        raise UsageError(f"{path} has no split {split!r}; {there}.{did_you_mean(split, names)}")
    split = split or _only(path, list(splits))
    found, label = splits[split], f"{path}[{split}]" if split else str(path)
    change = {name: partial(_class, one) for name, one in found.features.items() if hasattr(one, "int2str")}
    number = 0
    try:
        for table in found.with_format("arrow").iter(AT_ONCE):
            for fields in fields_of(table, change):
                number += 1
                yield fields, f"{label}:{number}"
    except (OSError, ValueError) as error:
        if isinstance(error, LitfreezeError):
            raise
        raise UsageError(f"{label} is broken behind row {number}: {reason(error)}.") from None


def files_of(path: Path, subset: Optional[str]) -> list[Path]:
    """The Arrow files of a set. Raises what `rows` raises."""
    return sorted({Path(file["filename"]) for split in _splits(path, subset).values() for file in split.cache_files})


def pinned(path: Path, subset: Optional[str]) -> Path:
    """`path` or, of a set on the Hub, its name with the commit that is in the cache. Raises what `rows` raises."""
    if not is_on_hub(path):
        return path
    repo, revision = NAME.fullmatch(str(path)).groups()
    commit = revision if COMMIT.fullmatch(revision or "") else _commit(_from_hub(str(path), subset))
    return Path(f"{repo}@{commit}") if commit else path


def seen_from(folder: Path, path: Path) -> Path:
    """What a relative `path` of data meant in `folder`. A set on the Hub has the same name everywhere."""
    return path if is_on_hub(folder / path) or (is_hub_name(path) and is_on_hub(path)) else folder / path


def only_split(path: Path, subset: Optional[str]) -> Optional[str]:
    """The name of the only split, None where there are none. Raises UsageError if there are several, and what `rows`
    raises."""
    names = split_names(path, subset)
    return _only(path, names) if names else None


def _only(path: Path, names: list[str]) -> str:
    if len(names) > 1:
        raise UsageError(f"{path} has the splits {', '.join(names)}. Say with --data.split which.")
    return names[0]


def _class(feature: "datasets.ClassLabel", value: int) -> Optional[str]:
    return feature.int2str(value) if value >= 0 else None  # -1 is no class


def _splits(path: Path, subset: Optional[str]) -> Mapping[str, "datasets.Dataset"]:
    """By name; the one of a set without splits is ""."""
    if is_on_hub(path):
        return _from_hub(str(path), subset)
    if subset is not None:
        raise UsageError(f"--data.subset {subset} is for sets on the Hub, and {path} is a folder. Leave it out.")
    library = _datasets(path)
    with _quiet(library):
        try:
            found = library.load_from_disk(str(path))
        except Exception as error:  # `datasets` raises nothing narrower for files that are absent or broken
            raise UsageError(f"{path} is a broken folder of datasets.save_to_disk: {reason(error)}.") from None
    return found if isinstance(found, library.DatasetDict) else {"": found}


@cache
def _from_hub(name: str, subset: Optional[str]) -> "datasets.DatasetDict":
    """The set `name`, from the cache or, where it is not there, downloaded into it."""
    repo, revision = NAME.fullmatch(name).groups()
    beside = [str(file) for file in Path(name).parent.iterdir()] if Path(name).parent.is_dir() else []
    absent = f"{name} is no file or folder here.{did_you_mean(name, beside)}"
    datasets = _datasets(f"{absent} A set on the Hub")
    hub = library("dataset")

    def here() -> str:
        return f"{name}{f' ({subset})' if subset else ''} is not in the cache {datasets.config.HF_DATASETS_CACHE}."

    with _quiet(datasets, bars=sys.stderr.isatty()):
        if (found := _in_cache(datasets, repo, revision, subset or DEFAULT)) is not None:
            return found
        try:
            with talking(name, "dataset", here, bars=True):
                commit = hub.HfApi().dataset_info(repo, revision=revision).sha
        except LitfreezeError as error:  # nobody says which subsets it has, so that the only one here is the one
            if subset is None and (found := _in_cache(datasets, repo, revision, None)) is not None:
                return found
            raise type(error)(f"{absent} {error}") from None
        try:
            with talking(name, "dataset", here, bars=True):
                place = datasets.config.HF_DATASETS_CACHE
                print(f"Download  {repo} ({commit[:7]}), into the cache of datasets, {place}", file=sys.stderr)
                return _downloaded(datasets, repo, commit, subset)
        except LitfreezeError as error:
            raise type(error)(f"{absent} {error}") from None


def _in_cache(
    datasets: ModuleType, repo: str, revision: Optional[str], subset: Optional[str]
) -> Optional["datasets.DatasetDict"]:
    """What the cache has of the commit `revision` or, without one, of the newest there; of the only subset there, if
    `subset` is None. None where that is nothing."""
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    if revision is not None and not COMMIT.fullmatch(revision):  # a branch goes on
        return None
    *org, name = repo.split("/")
    name, cache_dir = camelcase_to_snakecase(name), Path(datasets.config.HF_DATASETS_CACHE)
    place = cache_dir / "___".join([*org, name])
    there = [file.parent for file in place.glob(f"*/*/{revision or '*'}/dataset_info.json")]
    there = [folder for folder in there if not folder.suffix and _subset(folder) == folder.parts[-3]]  # .incomplete
    there = [folder for folder in there if subset in (None, _subset(folder))]
    if not there or len({_subset(folder) for folder in there}) > 1:
        return None
    subset, version, commit = max(there, key=lambda folder: folder.stat().st_mtime).parts[-3:]
    kept = {"dataset_name": name, "repo_id": repo, "config_name": subset, "version": version, "hash": commit}
    try:
        return Cache(cache_dir=str(cache_dir), **kept).as_dataset()
    except (ValueError, OSError, datasets.exceptions.DatasetsError):  # not whole
        return None


def _subset(folder: Path) -> Any:
    """The name of the subset that the cache keeps in `folder`."""
    return read_json(folder / "dataset_info.json").get("config_name")


def _downloaded(datasets: ModuleType, repo: str, commit: str, subset: Optional[str]) -> "datasets.DatasetDict":
    try:
        return datasets.load_dataset(repo, subset, revision=commit)
    except library().errors.HfHubHTTPError:
        raise
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ValueError):
            names = datasets.get_dataset_config_names(repo, revision=commit)
            if subset not in names:
                near = did_you_mean(subset, names) if subset else ""
                told = f"has no subset {subset!r}; its subsets:" if subset else "has several subsets:"
                raise UsageError(f"{repo} {told} {', '.join(names)}. Say with --data.subset which.{near}") from None
        raise UsageError(f"`datasets` cannot read {repo}: {reason(error)}.") from None


def _commit(found: "datasets.DatasetDict") -> Optional[str]:
    """The commit that the cache keeps a set under."""
    files = [file["filename"] for split in found.values() for file in split.cache_files]
    return next((Path(file).parent.name for file in files if COMMIT.fullmatch(Path(file).parent.name)), None)


@contextmanager
def _quiet(datasets: ModuleType, bars: bool = False) -> Iterator[None]:
    """While it is entered `datasets` logs nothing, and shows its `bars` only if it is to."""
    level, hide = datasets.logging.get_verbosity(), not bars and not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if hide:
            datasets.enable_progress_bars()


def _datasets(what: Path | str) -> ModuleType:
    """The library, for `what` needs it. Raises UsageError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UsageError(MISSING.format(what, "datasets")) from None
    return datasets
