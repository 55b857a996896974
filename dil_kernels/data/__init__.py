"""Preference pairs to checked rows, rows to token ids, and token ids to batches."""

from dil_kernels.data.loading import PreferenceDataError, check_pair, load_preference_pairs

__all__ = ["PreferenceDataError", "check_pair", "load_preference_pairs"]
