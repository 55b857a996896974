"""The columns of tokenised preference data, in pairs and unpaired, and of the reference log-probs beside them."""

from __future__ import annotations

from collections.abc import Container, Iterable

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
UNPAIRED_TOKEN_COLUMNS = ("prompt_ids", "completion_ids", "label")
UNPAIRED_REF_COLUMNS = ("ref_logps",)
GIVEN_REFERENCE = (*REF_COLUMNS, *UNPAIRED_REF_COLUMNS)
# What a collator takes of a row; length is for samplers that group by it.
COLLATED_COLUMNS = (*TOKEN_COLUMNS, *UNPAIRED_TOKEN_COLUMNS[1:], *GIVEN_REFERENCE, "row", "length")


def is_unpaired(columns: Container[str]) -> bool:
    """Whether tokenised data, or a row of them, of these columns are responses that do not come in pairs."""
    return "completion_ids" in columns and "chosen_ids" not in columns


def is_tokenised(columns: Iterable[str]) -> bool:
    """Whether a data set of these columns is one of token ids."""
    return any({*expected} <= {*columns} for expected in (TOKEN_COLUMNS, UNPAIRED_TOKEN_COLUMNS))
