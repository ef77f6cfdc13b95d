"""ARCHITECTURE.md's map is of what is there, and imports go down in it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAP = re.search(r"```\nlitfreeze/\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.S)[1]
UNITS = re.findall(r"^  (\w+)(?:\.py|/)", MAP, re.M)  # from top to bottom
FILES = sorted((ROOT / "litfreeze").rglob("*.py"))


def unit(path: Path) -> str:
    return path.relative_to(ROOT / "litfreeze").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The units that a file of ours imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "litfreeze":
            names = [f"litfreeze.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("litfreeze.")}
    return found


def test_every_file_is_on_the_map():
    named = set(re.findall(r"(\w+)\.py", MAP))
    assert sorted(set(map(unit, FILES)) ^ set(UNITS)) == []
    assert [str(path) for path in FILES if path.stem not in named and path.name != "__init__.py"] == []


def test_imports_go_down():
    """But for the program that makes the demo model with the commands themselves."""
    height = {name: -i for i, name in enumerate(UNITS)}
    upward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        for name in imported(path)
        if height[name] > height[unit(path)] and path.name != "build.py"
    ]
    assert upward == []
