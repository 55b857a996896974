"""The recipes that come with the package, for ``dil-train --config NAME``, and configs for ``accelerate launch``."""

from __future__ import annotations

from pathlib import Path


def packaged_recipes() -> dict[str, Path]:
    """Each recipe's file, by its name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def accelerate_configs() -> dict[str, Path]:
    """The files for ``accelerate launch --config_file``, by name: ddp, fsdp2, deepspeed_zero3."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "accelerate").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file that ``--config`` names: a path, or the name of a packaged recipe.

    Raises:
        FileNotFoundError: there is none; lists the packaged ones.
    """
    packaged = packaged_recipes()
    if Path(name).is_file():
        return Path(name)
    if name not in packaged:
        raise FileNotFoundError(f"no such file, and none of the package's recipes: {', '.join(packaged)}")
    return packaged[name]
