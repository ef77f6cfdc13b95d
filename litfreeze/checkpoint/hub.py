"""Models on the Hugging Face Hub, by name: ORG/NAME, or ORG/NAME@REVISION.

    a name ─ in the cache, or downloaded into it ─ a directory that opens as any other

The cache is the one of transformers and its like (HF_HOME), and huggingface_hub does what goes over the network: it
takes a connection up again that breaks, and what came whole is not fetched twice. A model that is in the cache is taken
as it is there, without asking the Hub; `litfreeze download` asks it for a newer one. Tokens go from the option or the
environment to huggingface_hub, and nowhere else."""

import re
import shutil
import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Optional

from filelock import FileLock

from litfreeze import hub
from litfreeze.checkpoint.convert.hf import HF_WEIGHTS
from litfreeze.checkpoint.convert.peft import PEFT_WEIGHTS
from litfreeze.checkpoint.convert.peft_config import PEFT_CONFIG
from litfreeze.checkpoint.manifest import MANIFEST, STEMS
from litfreeze.checkpoint.tensors import read_index
from litfreeze.config import Config
from litfreeze.errors import LitfreezeError, UsageError
from litfreeze.hub import HINT, NAME, is_hub_name, library
from litfreeze.sizes import megabytes
from litfreeze.tokenizer import TOKENIZER_FILES
from litfreeze.whole import check_new_directory, fsync

SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")


# --- names -----------------------------------------------------------------------------------------------------------


def origin(path: Path) -> Optional[str]:
    """ORG/NAME@COMMIT of a directory in the Hub's cache; None of any other."""
    found = SNAPSHOT.fullmatch(path.resolve().as_posix())
    return found and f"{found[1]}/{found[2]}@{found[3]}"


def located(path: Path | str) -> Path:
    """The directory that `path` names: itself or, where it is no directory here but has the form of a name on the Hub,
    that model's in the cache, downloaded if need be. Any other path as it is.

    Processes that ask for the same model wait for the first one, which downloads it. Raises UsageError if there is no
    such model to be had, RunError if the network fails."""
    if _is_dir(path) or not is_hub_name(path) or Path(path).exists():
        return Path(path)
    try:
        if (found := _in_cache(str(path))) is not None:
            return found
        lock = Path(library().constants.HF_HUB_CACHE, ".locks", f"litfreeze--{str(path).replace('/', '--')}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            return _in_cache(str(path)) or download(str(path))
    except LitfreezeError as error:
        raise type(error)(f"{path} is no directory here. {error}") from None


def pinned(path: Optional[Path]) -> Optional[Path]:
    """`path` or, of a model on the Hub, its name with the commit that is in the cache: it means the same later on, and
    on another machine. Raises what `located` raises."""
    found = path and located(path)
    return path if path is None or found == Path(path) else Path(origin(found))


def seen_from(folder: Path, path: Path) -> Path:
    """What a relative `path` meant in `folder`. A model on the Hub has the same name everywhere."""
    return path if is_hub_name(path) and not _is_dir(folder / path) else folder / path


def _is_dir(path: Path | str) -> bool:
    with suppress(OSError):  # a name that is too long, say
        return Path(path).is_dir()
    return False


# --- which files -----------------------------------------------------------------------------------------------------


def _described_by(names: Collection[str]) -> list[str]:
    """Those of the files `names` that say what a checkpoint is: small ones."""
    return [name for name in ("config.json", MANIFEST, PEFT_CONFIG, *TOKENIZER_FILES) if name in names]


def _stem(names: Collection[str]) -> Optional[str]:
    """The file among `names` that a checkpoint's weights stand in, or the index of several: the one that
    `open_checkpoint` reads. None if there is none."""
    stems = HF_WEIGHTS
    if MANIFEST in names:
        stems = [f"{stem}.safetensors" for stem in STEMS.values()]
    elif PEFT_CONFIG in names:
        stems = PEFT_WEIGHTS
    found = (file for stem in stems for file in (stem, f"{stem}.index.json") if file in names)
    return next(found, None)


def _weights(folder: Path, stem: str) -> list[str]:
    """The files of tensors behind `stem`, which is in `folder` if it is an index."""
    return sorted(set(read_index(folder / stem).values())) if stem.endswith(".json") else [stem]


def needed_files(folder: Path) -> list[str]:
    """The names of the files in `folder` that make it a checkpoint, and of those that its index of weights lists.
    Weights are none of them if there are none."""
    names = {file.name for file in folder.iterdir() if file.exists()}  # in the cache they may be broken links
    stem = _stem(names)
    return list(dict.fromkeys([*_described_by(names), *([] if stem is None else [stem, *_weights(folder, stem)])]))


def _in_cache(name: str) -> Optional[Path]:
    """The directory of the model `name` in the cache, if all that a checkpoint needs is there."""
    repo, revision = NAME.fullmatch(name).groups()
    for file in ("config.json", PEFT_CONFIG):
        found = library().try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(found, str) and _is_complete(Path(found).parent):
            return Path(found).parent
    return None


def _is_complete(folder: Path) -> bool:
    """Weights come last in a download of ours. Other tools may have fetched them and no tokenizer."""
    needed = needed_files(folder)
    reads = PEFT_CONFIG in needed or {"tokenizer.json", "tokenizer.model"} & set(needed)
    has_weights = any(name.endswith((".safetensors", ".bin")) for name in needed)
    return bool(reads) and has_weights and all((folder / name).exists() for name in needed)


# --- over the network ------------------------------------------------------------------------------------------------


def download(name: str, out_dir: Optional[Path] = None) -> Path:
    """Downloads what a checkpoint needs of the model `name` into the cache or, whole or not at all, as the directory
    `out_dir`, and returns where it is. What is there already is not fetched again.

    Raises UsageError if there is no such model, its `config.json` asks for one that litfreeze does not know, the disk
    has no room or `out_dir` holds something; RunError if the network fails."""
    if not is_hub_name(name):
        raise UsageError(f"{name!r} is no name on the Hugging Face Hub. Write ORG/NAME, or ORG/NAME@REVISION.")
    if out_dir is not None:
        check_new_directory(out_dir)
    hub = library()
    repo, revision = NAME.fullmatch(name).groups()
    with talking(name):
        listed = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in listed.siblings}
    needed = _described_by(sizes)
    stem = _stem(sizes)
    if stem is None or not {"config.json", PEFT_CONFIG} & set(needed):
        others = ", ".join(sorted(sizes)[:6])
        raise UsageError(f"{name} holds no checkpoint that litfreeze reads; its files are {others or 'none'}.")
    needed += [stem] if stem.endswith(".json") else []
    # What came is kept there if a download is cut, and taken up by the next one of the same commit
    aside = out_dir and out_dir.resolve().with_name(f".{out_dir.resolve().name}.{listed.sha[:12]}")

    def fetch(files: Sequence[str], bars: bool) -> Path:
        with talking(name, bars):
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=files, local_dir=aside))

    folder = fetch(needed, bars=False)
    if PEFT_CONFIG not in needed or MANIFEST in needed:
        Config.from_file(folder / "config.json")  # a model that litfreeze does not know is told before gigabytes come
    needed += [file for file in _weights(folder, stem) if file not in needed]
    if absent := [file for file in needed if file not in sizes]:
        raise UsageError(f"{name} lacks {absent[0]}, which its {stem} names.")
    missing = [file for file in needed if not (folder / file).exists()]
    place = f"the Hub's cache, {hub.constants.HF_HUB_CACHE}" if out_dir is None else str(out_dir)
    if missing:
        size = sum(sizes[file] for file in missing)
        _check_room(folder, size, name)
        what = f"{missing[0] if len(missing) == 1 else f'{len(missing)} files'}, {megabytes(size)}"
        print(f"Download  {name} ({listed.sha[:7]}): {what}, into {place}", file=sys.stderr)
    folder = fetch(needed, bars=True)
    if aside is None:
        return folder
    shutil.rmtree(aside / ".cache", ignore_errors=True)  # what huggingface_hub notes of each file
    aside.rename(out_dir.resolve())
    fsync(out_dir.resolve().parent)
    return out_dir


def check_token(repo: str) -> None:
    """Raises UsageError if there is no token, or the Hub does not know it."""
    if library().get_token() is None:
        raise UsageError(f"Uploading needs a token that may write to {repo}: {HINT}.")
    with talking(repo):
        library().HfApi().whoami()


def make_repository(repo: str, private: bool, revision: Optional[str]) -> None:
    """Makes the repository `repo`, if it is not there, and its branch `revision`. Raises UsageError if it is there and
    not private, as it was to be, or the token may not write."""
    hub = library().HfApi()
    with talking(repo):
        hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise UsageError(f"{repo} is there already and public. Choose another name, or leave --private out.")
        if revision is not None:
            hub.create_branch(repo, branch=revision, exist_ok=True)


def upload(repo: str, folder: Path, revision: Optional[str], message: str) -> str:
    """Uploads the files of `folder` and returns the address. Raises UsageError if the repository holds weights that
    would stand beside them."""
    hub = library().HfApi()
    own = {file.name for file in folder.iterdir()}
    with talking(repo, bars=True):
        there = [file.rfilename for file in hub.model_info(repo, revision=revision).siblings]
        others = [name for name in there if name not in own and name.endswith((".safetensors", ".bin"))]
        if others:
            raise UsageError(
                f"{repo} holds {others[0]}, which would stand beside what is uploaded. Choose another name."
            )
        hub.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    return f"{hub.endpoint}/{repo}{f'/tree/{revision}' if revision else ''}"


def _check_room(folder: Path, size: int, name: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UsageError(
            f"{name} needs {megabytes(size)} more, and {megabytes(free)} are free in {folder}. Make room, or choose "
            "another disk with HF_HOME or litfreeze download --out_dir."
        )


def talking(name: str, bars: bool = False) -> AbstractContextManager[None]:
    """As `litfreeze.hub.talking`, about the model `name`."""

    def here() -> str:
        if _in_cache(name) is not None:
            return f"{name} is in the cache already: --checkpoint_dir {name} takes it from there."
        return f"{name} is not in the cache {library().constants.HF_HUB_CACHE} (HF_HOME names another one)."

    return hub.talking(name, "model", here, bars)
