"""`tanzaku train`: one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tanzaku.cli.flags import recipe_flags
from tanzaku.cli.run import run
from tanzaku.errors import TanzakuError, listed
from tanzaku.recipe import build_recipe


@recipe_flags
def train(file: Path | None, flags: dict[str, Any], overwrite: bool) -> None:
    """Train one adapter.

    Shows figures after each epoch and a confusion matrix; the adapter goes into the run's directory.
    """
    recipe = build_recipe(file, flags)
    if len(recipe.methods) != 1:
        found = listed(str(entry.name) for entry in recipe.methods) or "no method"
        raise TanzakuError(f"train takes one method, found {found}; name one with --method, or use tanzaku compare")
    run("train", recipe, overwrite)
