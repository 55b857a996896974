"""Log-probs of responses under a model that is being trained: one function for every run, whatever trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dil_kernels import linear_sequence_logps
from dil_kernels.data import share_prefixes
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.prefix_sharing import install_prefix_sharing

MAX_TOKENS = 4096  # of a row

# The token ids of a prompt and of a response to it.
Sequences = Sequence[tuple[list[int], list[int]]]


class Scorer:
    """Scores responses by the weights that a model has at the time.

    It runs modules of its own around the parameters of the model, which stays as it is.

    Args:
        model: a causal language model that attends with "sdpa".
    """

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        install_prefix_sharing(self.model)

    @torch.no_grad()
    def __call__(self, sequences: Sequences) -> Tensor:
        """Log-probs [S] fp64 of the responses, summed over their tokens; neighbours with one prompt share it."""
        logps, model = [], self.model
        with evaluating(model):
            for group in _rows(sequences):
                row, labels = share_prefixes(group)
                row, labels = row.to(model.device), labels.to(model.device)
                hidden_states = model.model(**row.model_inputs()).last_hidden_state
                head = model.get_output_embeddings().weight
                logps.append(linear_sequence_logps(hidden_states, head, labels, cu_seqlens=row.cu_seqlens))
        return torch.cat(logps).double().cpu()


def _rows(sequences: Sequences) -> Iterator[Sequences]:
    """Neighbours that make at most MAX_TOKENS together, prompts counted for each."""
    row: list[tuple[list[int], list[int]]] = []
    tokens = 0
    for sequence in sequences:
        length = sum(map(len, sequence))
        if row and tokens + length > MAX_TOKENS:
            yield row
            row, tokens = [], 0
        row.append(sequence)
        tokens += length
    yield row
