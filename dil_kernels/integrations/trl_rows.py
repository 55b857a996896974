"""TRL's padded batches as ours: counted, and their sequences in one row where that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dil_kernels.data.batches import IGNORE_INDEX, Batch, Packed, Padded, SharedPrefixes
from dil_kernels.data.collators import pack_sequences, row_batch, share_prefixes
from dil_kernels.data.token_columns import REF_COLUMNS

OF_PADDED_ROWS = ("input_ids", "attention_mask", "completion_mask")


def refuse_unpaired(arguments: Mapping[str, Any]) -> None:
    """Refuse data sets of single responses, of which TRL would say that a column is missing.

    Args:
        arguments: of TRL's trainer.

    Raises:
        ValueError: names the argument.
    """
    for name in ("train_dataset", "eval_dataset"):
        given = arguments.get(name)
        for dataset in given.values() if isinstance(given, Mapping) else [given]:
            columns = getattr(dataset, "column_names", None) or ()
            if "completion" in columns and "chosen" not in columns:
                raise ValueError(
                    f"{name} has unpaired responses (the column 'completion'), but TRL's trainer takes pairs: take "
                    "dil_kernels.trainer.DILTrainer"
                )


class RowCollator:
    """Another collator, TRL's or the user's, whose batches say num_scored, and may be joined to one row.

    All other attributes are those of the other collator.

    Args:
        collate: makes batches as TRL's collators do.
        option: which puts the sequences of a batch into one row, padding_free or prefix_sharing; None for padded rows.
    """

    def __init__(self, collate: Any, option: str | None = None) -> None:
        self.__dict__.update(collate=collate, option=option)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of TRL, and num_scored: how many tokens of its responses are scored; or a row of its sequences.

        Raises:
            NotImplementedError: the batch to join has more than tokens.
        """
        batch: dict[str, Any] = self.collate(examples)
        if self.option is None:
            return {**batch, "num_scored": int(batch["completion_mask"][:, 1:].sum())}
        others = {name: values for name, values in batch.items() if name not in OF_PADDED_ROWS}
        if more := others.keys() - {*REF_COLUMNS}:
            raise NotImplementedError(
                f"{self.option}=True was given, but batches have {', '.join(sorted(more))}, which go by padded rows"
            )
        return {**row_batch(*_joined(batch, self.option)), **others}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collate, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.collate, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowCollator, (self.collate, self.option)


def _joined(batch: Mapping[str, Tensor], option: str) -> tuple[Packed | SharedPrefixes, Tensor]:
    """The sequences of a padded batch in one row, and its labels [1, N]."""
    sequences, scored = [], []
    for ids, mask, completion in zip(*(batch[name] for name in OF_PADDED_ROWS), strict=True):
        kept = mask.bool()
        tokens, of_response = ids[kept].tolist(), completion[kept].bool()
        start = int(of_response.int().argmax()) if of_response.any() else len(tokens)
        sequences.append((tokens[:start], tokens[start:]))
        scored.append(of_response[start:])
    row, labels = pack_sequences(sequences) if option == "padding_free" else share_prefixes(sequences)
    for end, of_response in zip(row.cu_seqlens[1:].tolist(), scored, strict=True):
        labels[0, end - len(of_response) : end].masked_fill_(~of_response, IGNORE_INDEX)
    return row, labels


def batch_of(inputs: Mapping[str, Any]) -> Batch:
    """The batch that a `RowCollator`, or a collator as TRL's, made."""
    if "cu_seqlens" in inputs:
        return Batch.of(inputs)
    return Batch(
        layout=Padded(inputs["input_ids"], inputs["attention_mask"]),
        row_labels=inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX),
        num_scored=inputs.get("num_scored"),
        rows=None,
        is_chosen=None,
        given_ref_logps={name: inputs[name] for name in REF_COLUMNS if name in inputs},
    )


def model_inputs(inputs: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """What the forward of a model takes of the batch; beside a layout's, what a collator has for images."""
    if batch.layout.cu_seqlens is not None:
        return batch.layout.model_inputs()
    not_for_the_model = {"completion_mask", "num_scored", *REF_COLUMNS}
    return {name: value for name, value in inputs.items() if name not in not_for_the_model} | {"use_cache": False}


def num_tokens(batch: Batch) -> Tensor | int:
    """How many tokens a model computes of the batch, padding aside; on the device where it would have to be asked."""
    layout = batch.layout
    return layout.attention_mask.sum() if isinstance(layout, Padded) else layout.input_ids.numel()
