"""The data loaders of a `DILTrainer`: batches filled by tokens (max_tokens_per_batch), or with rows of like lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from dil_kernels.data.token_batches import (
    FILLER,
    RowsOrFiller,
    RowTokens,
    Shares,
    TokenBatchSampler,
    fill_batches,
)
from dil_kernels.training.sharding import share_of_batches

LOADER_OPTIONS = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context", "in_order")


def refuse_long_rows(dataset: datasets.Dataset, args: Any, name: str) -> None:
    """Refuse rows that are longer than a batch.

    Args:
        dataset: tokenised.
        args: of the trainer.
        name: of the data set.

    Raises:
        ValueError: names the longest row; or the rows are transformed when they are read.
    """
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"max_tokens_per_batch={args.max_tokens_per_batch} was given, but the rows of the {name} data set are "
            "transformed when they are read (set_transform), so that nobody knows their tokens before"
        )
    RowTokens.of(dataset, shared=args.prefix_sharing).refuse_longer_than(args.max_tokens_per_batch, name)


def batches_in_order(dataset: datasets.Dataset, args: Any) -> list[list[int]]:
    """The rows of batches that are filled in the order of the data set."""
    tokens = RowTokens.of(dataset, shared=args.prefix_sharing)
    return fill_batches(np.arange(len(dataset)), tokens, args.max_tokens_per_batch)


def training_sampler(dataset: datasets.Dataset, args: Any, share: tuple[int, int]) -> TokenBatchSampler:
    """The batches of this process in training: shuffled by data_seed (else seed) and epoch, unless sequential.

    Args:
        dataset: tokenised.
        args: of the trainer.
        share: of `share_of_batches`.
    """
    tokens = RowTokens.of(dataset, shared=args.prefix_sharing)
    seed: int | None = seed_of_order(args)
    if getattr(args, "train_sampling_strategy", "random") == "sequential":
        seed = None

    def sampler(epochs: int) -> TokenBatchSampler:
        return TokenBatchSampler(tokens, args.max_tokens_per_batch, seed, epochs, *share)

    if args.max_steps <= 0:
        return sampler(math.ceil(args.num_train_epochs))
    return sampler(math.ceil(args.max_steps / math.ceil(len(sampler(1)) / args.gradient_accumulation_steps)))


def seed_of_order(args: Any) -> int:
    """By which rows are shuffled."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def loader_of(trainer: Any, rows: Any, batches: Any, **options: Any) -> Any:
    """The batches of this process, on its device.

    Args:
        trainer: a `DILTrainer`.
        rows: a tokenised data set, or `RowsOrFiller` of one.
        batches: the places of the rows in each batch of this process.
        options: of `DataLoader`.
    """
    args = trainer.args
    names = {name: f"dataloader_{name}" for name in LOADER_OPTIONS}
    options |= {name: getattr(args, given) for name, given in names.items() if hasattr(args, given)}
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=trainer.data_collator, **options)
    # The batches are those of this process already.
    device = trainer.accelerator.device
    return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)


def in_order_of_rows(values: Any, shares: Shares) -> NDArray[Any]:
    """Results [gathered rows, ...] of a data set, as they come from all processes, in the order of its rows."""
    rows = shares.gathered_rows()
    ordered = np.empty((rows.max(initial=-1) + 1, *values.shape[1:]), values.dtype)
    ordered[rows[rows != FILLER]] = values[rows != FILLER]
    return ordered


class LengthsByEpoch(Sampler[int]):
    """The rows of a sampler that draws from torch's global generator, by seed and epoch instead: resumed, the same.

    Args:
        sampler: of transformers, that groups rows by length.
        seed: of the run.
        state: of the trainer; where batches are skipped on several processes, nothing else tells a sampler the epoch.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, state: Callable[[], TrainerState]) -> None:
        self.sampler, self.seed, self.state = sampler, seed, state

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        epoch = int((self.state().epoch or 0) + 1e-6)  # which counts fractions
        self.sampler.generator = torch.Generator()
        self.sampler.generator.manual_seed(self.seed + epoch)
        return iter(self.sampler)


class FilledByTokens(Trainer):
    """A `Trainer` whose batches are filled by tokens where its arguments have max_tokens_per_batch.

    Rows that are grouped by length come in the same order where a run is resumed.
    """

    args: Any
    _evaluated: tuple[str, int] | None = None  # the prefix of the metrics, and the batches of each process
    _rows_per_step = 0.0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The loader of the training set."""
        if self.args.max_tokens_per_batch is None or self.train_dataset is None:
            return super().get_train_dataloader()
        dataset: Any = self.train_dataset
        share = share_of_batches(self.accelerator)
        sampler = training_sampler(dataset, self.args, share)
        batches = self.args.gradient_accumulation_steps * share[0]
        self._rows_per_step = batches * len(dataset) / sampler.num_batches
        persistent = self.args.dataloader_persistent_workers
        return loader_of(self, RowsOrFiller(dataset, sampler), sampler, persistent_workers=persistent)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            return LengthsByEpoch(sampler, seed_of_order(self.args), lambda: self.state)
        return sampler

    def get_total_train_batch_size(self, args: Any) -> float:  # type: ignore[override]
        """The rows of an optimizer step; on average, where batches are filled by tokens."""
        if args.max_tokens_per_batch is None:
            return super().get_total_train_batch_size(args)
        return self._rows_per_step

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The loader of an evaluation set, which is that of the trainer if not given, or one of those by name."""
        if self.args.max_tokens_per_batch is None or (eval_dataset is None and self.eval_dataset is None):
            return super().get_eval_dataloader(eval_dataset)
        known: Any = self.eval_dataset
        if eval_dataset is None or isinstance(eval_dataset, str):
            eval_dataset = known if eval_dataset is None else known[eval_dataset]
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Likewise for `predict`."""
        if self.args.max_tokens_per_batch is None:
            return super().get_test_dataloader(test_dataset)
        number, own = share_of_batches(self.accelerator)
        shares = Shares(batches_in_order(test_dataset, self.args), number)
        loader = loader_of(self, RowsOrFiller(test_dataset), shares.of(own))
        loader.shares = shares
        return loader

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; predictions are in the order of the data set, whatever the batches."""
        evaluate, compute_metrics = super().evaluation_loop, self.compute_metrics
        given = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        shares = getattr(dataloader, "shares", None)
        if shares is None:
            return evaluate(*given)

        def in_order(found: Any) -> EvalPrediction:
            return EvalPrediction(*(in_order_of_rows(x, shares) for x in (found.predictions, found.label_ids)))

        if compute_metrics is not None:
            self.compute_metrics = lambda found: compute_metrics(in_order(found))
        try:
            output = evaluate(*given)
        finally:
            self.compute_metrics = compute_metrics
        self._evaluated = metric_key_prefix, len(dataloader)
        if output.predictions is None:
            return output
        ordered = in_order(output)
        return output._replace(predictions=ordered.predictions, label_ids=ordered.label_ids)

    def pad_rows(self, values: Tensor) -> Tensor:
        """Results [rows, ...] of an evaluated batch, with as many rows as those of the other processes."""
        by_tokens = self.args.max_tokens_per_batch is not None
        return self.accelerator.pad_across_processes(values) if by_tokens else values

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict; see `transformers.Trainer.predict`."""
        output = super().predict(*args, **kwargs)
        self._correct_speed(output.metrics or {})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; see `transformers.Trainer.log`."""
        self._correct_speed(logs)
        super().log(logs, *args, **kwargs)

    def _correct_speed(self, metrics: dict[str, float]) -> None:
        """`Trainer` reckons the batches of an evaluation from a fixed number of rows in each."""
        if self._evaluated is None:
            return
        prefix, batches = self._evaluated
        if f"{prefix}_runtime" in metrics:
            metrics[f"{prefix}_steps_per_second"] = round(batches / metrics[f"{prefix}_runtime"], 3)
            self._evaluated = None
