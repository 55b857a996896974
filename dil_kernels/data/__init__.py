"""Preference pairs to checked rows, rows to token ids, and token ids to batches."""

from dil_kernels.data.batches import SharedPrefixes
from dil_kernels.data.collators import PreferenceCollator, share_prefixes
from dil_kernels.data.loading import load_preference_pairs
from dil_kernels.data.messages import PreferenceDataError
from dil_kernels.data.pairs import check_pair
from dil_kernels.data.tokenization import tokenize_dataset

__all__ = [
    "PreferenceCollator",
    "PreferenceDataError",
    "SharedPrefixes",
    "check_pair",
    "load_preference_pairs",
    "share_prefixes",
    "tokenize_dataset",
]
