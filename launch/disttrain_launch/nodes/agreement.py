"""Whether machines run the same job: what each says of itself when it comes, compared before it gets a place."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import disttrain
import disttrain_launch
from disttrain.recipe import Recipe
from disttrain.runs.rundir import edits


def terms_of(recipe: Recipe) -> dict[str, Any]:
    """What has to be the same on all machines, but for what each may have for itself; for a message."""
    return {"version": disttrain.__version__, "sources": _sources(), "recipe": recipe.model_dump(mode="json")}


def why_not_together(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """In what another machine differs from this one, which leads, in words; None if they can run together.

    Raises AttributeError or TypeError for what are no terms.
    """
    version, its_version = ours["version"], theirs.get("version", "of an older version")
    if its_version != version:
        return f"it has disttrain {its_version}, and the leading one {version}"
    if theirs.get("restarts") or "recipe" not in theirs:
        return (
            "its recipe or its options (-n gpu) have all workers restart after a loss, and those of the leading one "
            "have the others continue (parallel.on_lost_worker)"
        )
    if theirs.get("sources") != ours["sources"]:
        return f"both have disttrain {version}, but not the same code of it"
    if differences := edits(ours["recipe"], theirs["recipe"], "{0} is {2} in place of {1}"):
        return f"its recipe is not that of the leading one: {'; '.join(differences)}"
    return None


def _sources() -> str:
    """A digest of the code of disttrain and its launchers, as it lies there."""
    digest = sha256()
    for package in (disttrain, disttrain_launch):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            with suppress(OSError):  # an editor's lock file is a link to nowhere
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
