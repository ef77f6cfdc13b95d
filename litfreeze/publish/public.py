"""What everybody may know of a checkpoint's making: its base by the name it has on the Hub, and of a path on this
machine the last part."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import yaml

from litfreeze.checkpoint.checkpoint import Checkpoint
from litfreeze.checkpoint.convert.peft_config import PEFT_CONFIG
from litfreeze.checkpoint.hub import origin
from litfreeze.checkpoint.manifest import MANIFEST, TRAINED, read_manifest
from litfreeze.checkpoint.write import record_of
from litfreeze.cli import Yaml, options_of, write_yaml
from litfreeze.demo import MODEL_DIR
from litfreeze.finetune import full, lora
from litfreeze.hub import is_hub_name
from litfreeze.json_file import read_json

SCRIPTS = {"full": full.setup, "lora": lora.setup}  # by the kind of a run
# Where a model or its tokenizer lay: what looks like ORG/NAME may be a folder here
NOTED = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
MEANT = re.compile("chat_template|id2label|added_tokens_decoder|.*_tokens?")  # texts that are read, whatever they are
PLACE = re.compile(r"(~\w*|\.\.?)?[/\\].|[A-Za-z]:[/\\]|file:", re.IGNORECASE)
MOST_BASES = 20  # one under the other: more is a circle


def base_of(checkpoint: Checkpoint) -> Optional[str]:
    """ORG/NAME or ORG/NAME@COMMIT of the base on the Hub, as far as is on record: of an adapter or a delta the very
    model that it stands over, of a whole checkpoint the one that lies under all that was trained since."""
    known = (checkpoint.manifest or {}).get("base") or {}
    if checkpoint.base is not None:
        named = known.get("hub")
        if checkpoint.manifest is None:
            named = read_json(checkpoint.path / PEFT_CONFIG).get("base_model_name_or_path")
        return _own_name(checkpoint.base.path) or _hub_name(named)
    place = checkpoint.path
    for _ in range(MOST_BASES):
        if named := _hub_name(known.get("hub")) or _own_name(place):
            return named
        place = Path(known.get("path", ""))
        known = (read_manifest(place).get("base") or {}) if (place / MANIFEST).is_file() else {}
    return None


def _own_name(place: Path) -> Optional[str]:
    """The name on the Hub of the very weights that lie in `place`, converted or as they came."""
    if (named := origin(place)) is None and (place / MANIFEST).is_file():
        manifest = read_manifest(place)
        named = manifest.get("source") if manifest.get("kind") == "base" else None
    return _hub_name(named)


def _hub_name(value: Any) -> Optional[str]:
    return value if isinstance(value, str) and is_hub_name(value) and not Path(value).is_dir() else None


def public_manifest(manifest: Mapping[str, Any], base: Optional[str], directory: Path) -> dict[str, Any]:
    """`manifest` for everybody: of paths the last part is left, and of the base that an adapter or a delta stands over
    `base`, its name on the Hub. `directory` holds the files it lists."""
    public = {**manifest, "history": [public_run(run) for run in manifest.get("history", [])]}
    if isinstance(manifest.get("training"), dict):
        public["training"] = public_run({"kind": manifest.get("kind"), **manifest["training"]})
    if "source" in manifest:
        public["source"] = public_name(manifest["source"])
    if isinstance(manifest.get("merged"), list):
        public["merged"] = [{**part, "path": public_name(part["path"])} for part in manifest["merged"]]
    if known := manifest.get("base"):
        hub = base if manifest.get("holds") == TRAINED else known.get("hub")
        place = public_name(known["path"]).rpartition("/")[2].partition("@")[0]
        public["base"] = {"path": place, "from_here": f"../{place}", "weights_hash": known["weights_hash"]}
        public["base"] |= {"hub": hub} if hub else {}
    if "files" in manifest:
        public["files"] = {name: record_of(directory / name) for name in manifest["files"]}
    return public


def public_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What is on record of one run, for everybody."""
    public = dict(run)
    if "began_from" in run:
        public["began_from"] = public_name(run["began_from"])
    if "recipe" in run:
        public["recipe"] = public_recipe(run.get("kind"), run["recipe"])
    return public


def without_places(value: Any) -> Any:
    """`value`, of a model's or a tokenizer's JSON, without what says where on this machine something lay: `NOTED`, and
    every text that begins as a path does, at any depth."""
    if isinstance(value, list):
        return [without_places(item) for item in value if not _is_place(item)]
    if not isinstance(value, dict):
        return value
    return {
        key: inner if MEANT.fullmatch(key) else without_places(inner)
        for key, inner in value.items()
        if MEANT.fullmatch(key) or not (key in NOTED or _is_place(inner))
    }


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and PLACE.match(value) is not None


def public_name(path: str) -> str:
    """What everybody may know of a place on this machine: a model's name on the Hub, else the last part."""
    if Path(path) == MODEL_DIR.resolve():
        return "litfreeze-demo"
    # What looks like a name without a commit may be a relative path
    return origin(Path(path)) or (path if is_hub_name(path) and "@" in path else Path(path).name)


def public_recipe(kind: Optional[str], recipe: str) -> str:
    """`recipe`, the YAML of a run's options, with the last part of every path in it."""
    hints = options_of(SCRIPTS[kind]) if kind in SCRIPTS else {}

    def public(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            option = f"{before}{name}"
            if isinstance(value, dict) and option not in hints:
                found[name] = public(value, f"{option}.")
            else:
                is_path = isinstance(value, str) and "Path" in str(hints.get(option, "Path"))
                found[name] = public_name(value) if is_path else value
        return found

    return write_yaml(public(yaml.load(recipe, Loader=Yaml) or {}))
