"""The data sets of a trainer: refused, tokenised or taken as they are, and reported."""

from __future__ import annotations

import logging
import re
from typing import Any

import datasets
import numpy as np

from dil_kernels.data.columns import say_once
from dil_kernels.data.pairs import LARGEST_LOG_PROB
from dil_kernels.data.token_columns import (
    GIVEN_REFERENCE,
    REF_COLUMNS,
    TOKEN_COLUMNS,
    UNPAIRED_REF_COLUMNS,
    UNPAIRED_TOKEN_COLUMNS,
    is_tokenised,
    is_unpaired,
)
from dil_kernels.data.tokenization import tokenize_and_report
from dil_kernels.data.truncation import DataReport
from dil_kernels.losses import LossOptions
from dil_kernels.training.config import DILConfig
from dil_kernels.training.model_checks import Models, check_fits
from dil_kernels.training.precompute import has_reference
from dil_kernels.training.token_loader import refuse_long_rows

logger = logging.getLogger(__name__)

STREAMS = (datasets.IterableDataset, datasets.IterableDatasetDict)


def prepare_dataset(
    dataset: Any,
    tokenizer: Any,
    args: DILConfig,
    name: str,
    reports: dict[str, DataReport],
    models: Models,
) -> Any:
    """Token ids of a data set, of each of several, or of none.

    Args:
        dataset: a data set, tokenised or not; several by name; or None.
        tokenizer: of the model.
        args: of the trainer.
        name: of the data set, for its report; of several, the first part of their names.
        reports: gets the report of each data set that is tokenised here; the main process prints it.
        models: policy, and reference if it is another model; they must have room for the token ids and the lengths.

    Raises:
        TypeError: it is a stream, or no data set, or several to train on.
        ValueError: its responses are unpaired, and the loss needs pairs; or a model or a batch has no room for its
            tokens; or its own reference log-probs are not finite.
        PreferenceDataError: a broken pair.
    """
    if dataset is None:
        return None
    if isinstance(dataset, STREAMS):
        raise TypeError(
            f"the {name} data set is streamed: DILTrainer checks, tokenises and counts every row before the first "
            "step, names rows by their number and keeps reference log-probs by row. Load it without streaming=True, or "
            "take a part: Dataset.from_list(list(stream.take(n)))"
        )
    if isinstance(dataset, dict) and name == "train":
        raise TypeError(
            f"train_dataset must be one data set, got a {type(dataset).__name__} with {', '.join(map(repr, dataset))}: "
            "give one of its data sets, such as train_dataset=data['train']"
        )
    if isinstance(dataset, dict):
        return {
            key: prepare_dataset(part, tokenizer, args, f"{name}_{key}", reports, models)
            for key, part in dataset.items()
        }
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"preference pairs must come as a datasets.Dataset, got {type(dataset).__name__}")
    if "label" in dataset.column_names and not {"chosen", "chosen_ids"} & {*dataset.column_names}:
        _refuse_coupled(args)  # before all rows are tokenised
    tokenised = is_tokenised(dataset.column_names)
    dataset = _checked_columns(dataset, name) if tokenised else _tokenize(dataset, tokenizer, args, name, reports)
    if is_unpaired(dataset.column_names):
        _refuse_coupled(args)
    if args.max_tokens_per_batch is not None:
        refuse_long_rows(dataset, args, name)
    if tokenised and dataset.format["type"] == "custom":
        return dataset
    dataset = dataset.with_format(None)
    check_fits(dataset, name, models, tokenizer, args.pad_to_multiple_of)
    if tokenised:
        _check_given_reference(dataset, name)
    if args.process_index == 0 and (name == "train" or not tokenised):
        _warn_of_one_side(dataset, name)
        unused = [column for column in GIVEN_REFERENCE if column in dataset.column_names]
        if unused and not args.precompute_ref_log_probs:
            logger.warning(
                "the %s data set has reference log-probs (%s), which are not used: they would be with "
                "precompute_ref_log_probs=True",
                name,
                ", ".join(unused),
            )
    return dataset


def _refuse_coupled(args: DILConfig) -> None:
    if not LossOptions(**args.loss_options()).separable:
        link = "" if args.link == "imitation" else f" with link={args.link!r}"
        raise ValueError(
            f"loss_type={args.loss_type!r}{link} couples the chosen and the rejected response of a pair: it cannot be "
            "trained on unpaired responses (a data set with the column 'label')"
        )


def _tokenize(
    dataset: datasets.Dataset, tokenizer: Any, args: DILConfig, name: str, reports: dict[str, DataReport]
) -> datasets.Dataset:
    with args.main_process_first(desc="tokenisation"):
        dataset, reports[name] = tokenize_and_report(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
        )
    if args.process_index == 0:
        print(f"{name} data: {reports[name]}")
        if has_reference(dataset) and (reports[name].prompts_cut or reports[name].responses_cut):
            logger.warning(
                "the %s data set has reference log-probs of its own, and rows that are cut here: they must be those of "
                "the rows as they are cut",
                name,
            )
    return dataset


def _checked_columns(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """A tokenised data set without the columns of the other form, pairs or not; unchecked behind a transform."""
    if dataset.format["type"] == "custom":
        return dataset
    unpaired = is_unpaired(dataset.column_names)
    forms = (*TOKEN_COLUMNS, *REF_COLUMNS), (*UNPAIRED_TOKEN_COLUMNS, *UNPAIRED_REF_COLUMNS)
    form, other = forms[::-1] if unpaired else forms
    if unused := [column for column in other if column in dataset.column_names and column not in form]:
        say_once(f"the {name} data set: not used beside {form[1]}: {', '.join(unused)}")
        dataset = dataset.remove_columns(unused)
    for column in form:
        if column not in dataset.column_names:
            continue
        kind: Any = dataset.features[column]
        found = getattr(kind, "dtype", kind)
        if column.endswith("_ids") and not re.search("int|null", getattr(getattr(kind, "feature", None), "dtype", "")):
            raise ValueError(
                f"the {name} data set, column {column!r}: expected lists of token ids, integers, got {kind}"
            )
        if column == "label" and found != "bool":
            raise ValueError(f"the {name} data set, column 'label': expected true or false, got {found}")
    return dataset


def _check_given_reference(dataset: datasets.Dataset, name: str) -> None:
    for column in GIVEN_REFERENCE:
        if column in dataset.column_names:
            if not (dtype := getattr(dataset.features[column], "dtype", "")).startswith(
                ("float", "int", "uint", "decimal")
            ):
                raise ValueError(f"the {name} data set, column {column!r}: expected numbers, got {dtype}")
            with np.errstate(over="ignore"):
                values = np.asarray(dataset[column][:], dtype=np.float32)
            where = f"the {name} data set, row {{}}, column {column!r}: expected"
            if not (finite := np.isfinite(values)).all():
                raise ValueError(
                    f"{where.format(np.argmin(finite) + 1)} a finite number in the range of float32, the sum of "
                    "log-probs"
                )
            if (positive := values > LARGEST_LOG_PROB).any():
                raise ValueError(
                    f"{where.format(np.argmax(positive) + 1)} a sum of log-probs, which is at most 0, got "
                    f"{values[np.argmax(positive)]:g}"
                )


def _warn_of_one_side(dataset: datasets.Dataset, name: str) -> None:
    sides = {*dataset["label"][:]} if "label" in dataset.column_names else {True, False}
    if len(sides) == 1:
        side, other = ("chosen", "rejected") if sides.pop() else ("rejected", "chosen")
        logger.warning("the %s data set has %s responses only, and no %s one to tell them from", name, side, other)
