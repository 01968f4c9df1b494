"""`tanzaku compare`: several candidates, one ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tanzaku.cli.flags import recipe_flags
from tanzaku.cli.run import run
from tanzaku.recipe import build_recipe

DEFAULT = ("lora", "adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "llama_adapter", "head")


@recipe_flags
def compare(file: Path | None, flags: dict[str, Any], overwrite: bool) -> None:
    """Train many candidates, and rank them.

    All share one frozen model. Where no method is named, every one but full is a candidate.
    """
    run("compare", build_recipe(file, flags, default_methods=DEFAULT), overwrite)
