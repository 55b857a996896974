"""The upper blocks of a Llama model, trained on the cached hidden states of the frozen blocks below them.

The lower blocks are run once over the data; a training step then costs only the upper part. The embedding, which is
also the head, stays frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dil_kernels import token_logps
from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.data.collators import PreferenceCollator


@dataclass(frozen=True)
class CachedSequence:
    """One response in its context, as the first trained block sees it."""

    hidden_states: Tensor  # [T, D] fp32
    labels: Tensor  # [T] int64, IGNORE_INDEX on the prompt


@dataclass(frozen=True)
class CachedPair:
    """A preference pair, with the reference's log-probs once they are known."""

    chosen: CachedSequence
    rejected: CachedSequence
    ref_logps: tuple[float, float] | None = None  # sums over tokens, chosen and rejected

    @property
    def lengths(self) -> tuple[int, int]:
        """Scored tokens of chosen and rejected."""
        return tuple(int((side.labels[1:] != IGNORE_INDEX).sum()) for side in (self.chosen, self.rejected))


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of `size`, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def cache_hidden_states(
    model: nn.Module, pairs: Sequence[Mapping[str, Any]], trained_blocks: int, pad_token_id: int
) -> list[CachedPair]:
    """Run the frozen blocks over tokenised pairs.

    Args:
        model: a `LlamaForCausalLM`.
        pairs: mappings with prompt_ids, chosen_ids and rejected_ids.
        trained_blocks: how many of the last blocks are to be trained; all that the model has is allowed.
        pad_token_id: fills batches.
    """
    first_trained = model.config.num_hidden_layers - trained_blocks
    collator = PreferenceCollator(pad_token_id)
    cached: list[CachedPair] = []
    for piece in batches(pairs, 8):
        batch = collator(piece)
        outputs = model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )
        rows = [
            CachedSequence(states[mask].clone(), labels[mask])
            for states, labels, mask in zip(
                outputs.hidden_states[first_trained], batch["labels"], batch["attention_mask"].bool(), strict=True
            )
        ]
        cached += [CachedPair(*sides) for sides in zip(rows[: len(piece)], rows[len(piece) :], strict=True)]
    return cached


def take_upper_blocks(model: nn.Module, trained_blocks: int) -> nn.Module:
    """A copy of a `LlamaForCausalLM` with only its last blocks, which take hidden states as `inputs_embeds`.

    The blocks and the norm after them require gradients; embedding and head do not.
    """
    upper = copy.deepcopy(model)
    upper.model.layers = upper.model.layers[-trained_blocks:]
    upper.config.num_hidden_layers = trained_blocks
    upper.requires_grad_(False)
    upper.model.layers.requires_grad_(True)
    upper.model.norm.requires_grad_(True)
    return upper


def pair_logps(upper: nn.Module, pairs: Sequence[CachedPair]) -> Tensor:
    """Summed log-probs [2B] of the chosen, then the rejected responses of B pairs; the head sees scored tokens only."""
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    hidden = nn.utils.rnn.pad_sequence([side.hidden_states for side in sides], batch_first=True)
    labels = nn.utils.rnn.pad_sequence(
        [side.labels for side in sides], batch_first=True, padding_value=float(IGNORE_INDEX)
    )
    lengths = torch.tensor([len(side.labels) for side in sides])
    mask = torch.arange(hidden.shape[1]) < lengths[:, None]
    outputs = upper.model(inputs_embeds=hidden, attention_mask=mask.long(), use_cache=False).last_hidden_state
    scored = labels[:, 1:] != IGNORE_INDEX  # [2B, T-1]
    logps = token_logps(upper.lm_head(outputs[:, :-1][scored]), labels[:, 1:][scored], shift=False)
    rows = scored.nonzero()[:, 0]
    return torch.zeros(len(sides), dtype=logps.dtype).index_add(0, rows, logps)


@torch.no_grad()
def all_pair_logps(upper: nn.Module, pairs: Sequence[CachedPair], batch_size: int = 8) -> Tensor:
    """Summed log-probs [2, P] of chosen and rejected of any number of pairs, without gradients."""
    return torch.cat([pair_logps(upper, piece).view(2, -1) for piece in batches(pairs, batch_size)], dim=1)
