"""A task that does next to nothing, in a module that workers can import."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def small(args: dict[str, Any], folder: Path) -> None:
    """Writes its number."""
    (folder / "out.txt").write_text(str(args["n"]))
