"""The reference log-probs of whole data sets, before training: from the cache on disk, else computed and kept there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers.utils.logging import tqdm

from dil_kernels.data.batches import Batch
from dil_kernels.data.token_columns import REF_COLUMNS, UNPAIRED_REF_COLUMNS
from dil_kernels.training.ref_cache import (
    ReferenceCache,
    default_ref_cache_dir,
    model_fingerprint,
    response_id_columns,
    token_counts,
)

NO_CACHE = "none"


def ref_columns(dataset: datasets.Dataset) -> tuple[str, ...]:
    """The columns of reference log-probs that a tokenised data set has room for."""
    return UNPAIRED_REF_COLUMNS if "label" in dataset.column_names else REF_COLUMNS


def has_reference(dataset: datasets.Dataset) -> bool:
    """Whether a data set has all its reference log-probs.

    Raises:
        ValueError: it has those of one side only.
    """
    columns = ref_columns(dataset)
    missing = [column for column in columns if column not in dataset.column_names]
    if 0 < len(missing) < len(columns):
        raise ValueError(f"the data set has {', '.join({*columns} - {*missing})}, but no {', '.join(missing)}")
    return not missing


def trainer_ref_cache(trainer: Any, model: nn.Module) -> ReferenceCache | str:
    """The cache of the log-probs of a `DILTrainer`'s reference, on the main process; or why there is none.

    Args:
        trainer: under construction.
        model: that the reference is, its weights whole.
    """
    args, collator = trainer.args, trainer.data_collator
    if not trainer.is_world_process_zero():
        return ""
    if args.ref_cache_dir == NO_CACHE:
        return f"ref_cache_dir is {NO_CACHE!r}"
    if not type(collator).__module__.startswith("dil_kernels."):
        return f"which tokens the data collator {type(collator).__name__} scores is not known"
    # How they are taken, where that changes them by more than the last bits.
    settings = {
        "autocast": trainer.accelerator.mixed_precision,
        "fused_head": trainer.uses_fused_head,
        "device": args.device.type,
        "backend": args.backend,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "adapter": args.ref_adapter_name,
        **({"lengths": "kept apart"} if trainer.lengths_kept_apart else {}),
    }
    try:
        identity = {"model": model_fingerprint(model), "settings": settings}
    except NotImplementedError as error:
        return str(error)
    directory = default_ref_cache_dir() if args.ref_cache_dir is None else Path(args.ref_cache_dir).expanduser()
    return ReferenceCache(directory, identity)


def precompute_reference(trainer: Any, token_logps: Callable[[Batch], Tensor], cache: ReferenceCache | str) -> None:
    """Add the reference log-probs to the data sets of a `DILTrainer`; see `ReferencePass`."""
    args = trainer.args
    collator, progress = trainer.data_collator, not args.disable_tqdm
    reference = ReferencePass(trainer.accelerator, collator, token_logps, cache, progress)
    rows = args.precompute_ref_batch_size
    trainer.train_dataset = reference.add(trainer.train_dataset, rows or args.per_device_train_batch_size)
    trainer.eval_dataset = reference.add(trainer.eval_dataset, rows or args.per_device_eval_batch_size)


@dataclass(frozen=True)
class ReferencePass:
    """Adds the log-probs of one reference to data sets.

    Attributes:
        accelerator: of the trainer; every process takes a share of the rows.
        data_collator: of the trainer.
        token_logps: those of a batch, as the kernels return them.
        cache: of the reference, on the main process; or why there is none.
        progress: show a bar.
    """

    accelerator: Accelerator
    data_collator: Any
    token_logps: Callable[[Batch], Tensor]
    cache: ReferenceCache | str
    progress: bool

    def add(self, dataset: Any, batch_size: int) -> Any:
        """The data set with ref_chosen_logps and ref_rejected_logps (unpaired, ref_logps), fp32 sums over tokens.

        One that has them is returned as it is; of several by name, each is added to.
        """
        if isinstance(dataset, dict):
            return {name: self.add(part, batch_size) for name, part in dataset.items()}
        if dataset is None or has_reference(dataset):
            return dataset
        is_main = self.accelerator.is_main_process
        entry = self.cache.entry(dataset) if is_main and isinstance(self.cache, ReferenceCache) else None
        found = [None if entry is None else entry.load()]
        values = broadcast_object_list(found)[0]
        done = "" if entry is None else f"read from {entry.path}"
        if values is None:
            values = self._compute(dataset, batch_size)
            problem = self.cache if entry is None else entry.store(values)
            done = (
                f"computed and not kept: {problem}" if problem or entry is None else f"computed; kept in {entry.path}"
            )
        if is_main:
            print(f"Reference log-probs of {len(dataset)} rows {done}")
        for index, column in enumerate(ref_columns(dataset)):
            dataset = dataset.add_column(column, values[:, index])
        return dataset

    def _compute(self, dataset: datasets.Dataset, batch_size: int) -> NDArray[np.float32]:
        """The sums, [rows, responses of a row] fp32.

        The longest rows come first: batches of like lengths waste no padding, and memory that is short is so at once.
        """
        responses = response_id_columns(dataset)
        longest = np.max([token_counts(dataset, name) for name in responses], axis=0)
        order = np.argsort(-(token_counts(dataset, "prompt_ids") + longest), kind="stable")
        rows: Any = Subset(dataset, order.tolist())
        loader = self.accelerator.prepare(DataLoader(rows, batch_size=batch_size, collate_fn=self.data_collator))
        sums = []
        for inputs in tqdm(loader, desc="Reference log-probs", disable=not self.progress):
            batch = Batch.of(inputs)
            sides = torch.stack(batch.sums(self.token_logps(batch)).chunk(len(responses)), dim=1)
            sums.append(self.accelerator.gather_for_metrics(sides).float().cpu())
        values = np.empty((len(dataset), len(responses)), np.float32)
        values[order] = torch.cat(sums).numpy()
        return values
