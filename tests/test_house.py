"""The rooms of the house: which may import from which, and that none is without a word on what it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tanzaku.methods import METHODS

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent for path in (ROOT / "src/tanzaku").glob("*/__init__.py"))


def test_rooms_import_from_rooms_below_them_and_no_circle_is_anywhere() -> None:
    # In a process of its own: it sets up logging anew, and handlers that others made then close what pytest writes to.
    program = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], cache_dir=None))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "pyproject.toml")], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.name)
def test_every_room_says_what_it_is(room: Path) -> None:
    said = (room / "__init__.py").read_text(encoding="utf-8").split('"""')[1]
    assert len(said.split()) >= 8
    assert f"`{room.name}/" in (ROOT / "docs/design.md").read_text(encoding="utf-8")


def test_the_method_in_the_docs_is_the_one_that_runs() -> None:
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    method = (ROOT / "src" / "tanzaku" / "methods" / "ln_tuning.py").read_text(encoding="utf-8")
    assert f"```python\n{method}```" in page


@pytest.mark.parametrize(
    "room", ["storage", "merging", "export", "train", "compare", "cli", "engine", "tasks", "recipe", "models"]
)
def test_no_room_above_the_methods_knows_one_by_name(room: str) -> None:
    """What differs by method is the method's to say: adding one touches its own file and the registry."""
    names = "|".join([*METHODS, *(method.__name__ for method in METHODS.values())])
    for path in sorted((ROOT / "src/tanzaku" / room).rglob("*.py")):
        found = re.findall(rf"""["'](?:{names})["']|methods\.(?:{names})\b""", path.read_text(encoding="utf-8"))
        assert [each for each in found if each not in ALSO_WORDS.get(path.name, ())] == [], path


ALSO_WORDS = {"gguf.py": ('"lora"',)}  # what the format calls an adapter
