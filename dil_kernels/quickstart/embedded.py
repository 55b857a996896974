"""The preference pairs that ship with the package; `preference_pairs.md` describes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "test")


def embedded_pairs_path(split: str) -> Path:
    """The JSON Lines file of a split.

    Args:
        split: "train" (300 pairs) or "test" (60 pairs, held out).

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return Path(__file__).with_name(f"preference_pairs_{split}.jsonl")


def load_embedded_pairs(split: str) -> datasets.Dataset:
    """Short questions with a direct answer (chosen) and a polite dodge (rejected).

    Args:
        split: "train" (300 pairs) or "test" (60 pairs, held out).

    Returns:
        A data set with the conversational columns prompt, chosen and rejected.

    Raises:
        ValueError: no such split.
    """
    path = embedded_pairs_path(split)
    from dil_kernels.data.loading import load_preference_pairs

    return load_preference_pairs(path)
