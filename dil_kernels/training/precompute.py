"""The reference log-probs of whole data sets, before training: from the cache on disk, else computed and kept there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from dil_kernels.data.batches import Batch
from dil_kernels.data.token_batches import Shares
from dil_kernels.data.token_columns import REF_COLUMNS, UNPAIRED_REF_COLUMNS, is_unpaired
from dil_kernels.data.token_counts import response_id_columns, token_counts
from dil_kernels.models.probes import coarsest_rounding, matmul_precision
from dil_kernels.training.ref_cache import (
    ReferenceCache,
    default_ref_cache_dir,
    model_fingerprint,
    scored_lengths,
)
from dil_kernels.training.sharding import gather_batches, share_of_batches
from dil_kernels.training.token_loader import batches_in_order, in_order_of_rows, loader_of

NO_CACHE = "none"
SAMPLED_ROWS = 8  # of those that are filled by tokens
ROUNDINGS = 16.0  # of a log-prob of a token, which go through all layers


def ref_columns(dataset: datasets.Dataset) -> tuple[str, ...]:
    """The columns of reference log-probs that a tokenised data set has room for."""
    return UNPAIRED_REF_COLUMNS if is_unpaired(dataset.column_names) else REF_COLUMNS


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
    settings = {
        **how_taken(trainer, trainer.uses_fused_head),
        "adapter": args.ref_adapter_name,
        **({"lengths": "kept apart"} if trainer.lengths_kept_apart else {}),
    }
    try:
        identity = {"model": model_fingerprint(model), "settings": settings}
    except NotImplementedError as error:
        return str(error)
    directory = default_ref_cache_dir() if args.ref_cache_dir is None else Path(args.ref_cache_dir).expanduser()
    return ReferenceCache(directory, identity)


def how_taken(trainer: Any, fused_head: bool) -> dict[str, Any]:
    """What of a trainer's set-up changes log-probs by more than the last bits, as JSON has it."""
    device = trainer.args.device.type
    return {
        "autocast": trainer.accelerator.mixed_precision,
        "fused_head": fused_head,
        "device": device,
        "backend": trainer.args.backend,
        "matmul_precision": matmul_precision(device),
    }


def precompute_reference(trainer: Any, token_logps: Callable[[Batch], Tensor], cache: ReferenceCache | str) -> None:
    """Add the reference log-probs to the data sets of a `DILTrainer`; see `ReferencePass`."""
    args = trainer.args
    sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
    if args.precompute_ref_batch_size is not None:
        sizes = (args.precompute_ref_batch_size,) * 2
    elif args.max_tokens_per_batch is not None:
        sizes = None, None
    reference = ReferencePass(trainer, token_logps, cache)
    trainer.train_dataset = reference.add(trainer.train_dataset, sizes[0])
    trainer.eval_dataset = reference.add(trainer.eval_dataset, sizes[1])


@dataclass(frozen=True)
class ReferencePass:
    """Adds the log-probs of one reference to data sets.

    Attributes:
        trainer: a `DILTrainer`; every process takes a share of the rows.
        token_logps: those of a batch, as the kernels return them.
        cache: of the reference, on the main process; or why there is none.
    """

    trainer: Any
    token_logps: Callable[[Batch], Tensor]
    cache: ReferenceCache | str

    def add(self, dataset: Any, batch_size: int | None) -> Any:
        """The data set with ref_chosen_logps and ref_rejected_logps (unpaired, ref_logps), fp32 sums over tokens.

        One that has them is returned as it is; of several by name, each is added to.

        Args:
            dataset: tokenised; or several; or None.
            batch_size: rows of a batch; None to fill batches by tokens.
        """
        if isinstance(dataset, dict):
            return {name: self.add(part, batch_size) for name, part in dataset.items()}
        if dataset is None or has_reference(dataset):
            return dataset
        is_main = self.trainer.accelerator.is_main_process
        entry = self.cache.entry(dataset) if is_main and isinstance(self.cache, ReferenceCache) else None
        found = [None if entry is None else entry.load()]
        values = broadcast_object_list(found)[0]
        done = "" if entry is None else f"read from {entry.path}"
        again = ""
        if values is not None and not self._are_those_of_now(values, dataset, batch_size):
            values, again = None, " again, since those that were kept are not the model's"
        if values is None:
            values = self._compute(dataset, batch_size)
            problem = self.cache if entry is None else entry.store(values)
            kept = f" and not kept: {problem}" if problem or entry is None else f"; kept in {entry.path}"
            done = f"computed{again}{kept}"
        if is_main:
            print(f"Reference log-probs of {len(dataset)} rows {done}")
        for index, column in enumerate(ref_columns(dataset)):
            dataset = dataset.add_column(column, values[:, index])
        return dataset

    def _are_those_of_now(self, values: NDArray[np.float32], dataset: datasets.Dataset, batch_size: int | None) -> bool:
        """Whether log-probs that were kept are those of the model, by the first rows, which are computed anew.

        Hooks, changed attributes and other code are in no key. Rounding errors grow with the root of the tokens.
        """
        count = batch_size or SAMPLED_ROWS
        part = datasets.Dataset.from_dict(dataset[:count])  # which has a last row for fillers, unlike a selection
        now = self._compute(part, batch_size)
        with self.trainer.accelerator.autocast():
            rounding = coarsest_rounding(self.trainer.model)
        allowed = ROUNDINGS * (rounding * np.sqrt(scored_lengths(part)) + torch.finfo(torch.float32).eps * np.abs(now))
        return bool(broadcast_object_list([(np.abs(now - values[:count]) <= allowed).all()])[0])

    def _compute(self, dataset: datasets.Dataset, batch_size: int | None) -> NDArray[np.float32]:
        """The sums, [rows, responses of a row] fp32."""
        accelerator, responses = self.trainer.accelerator, len(ref_columns(dataset))
        if batch_size is None:
            batches = batches_in_order(dataset, self.trainer.args)
        else:
            batches = _longest_first(dataset, batch_size)
        number, own = share_of_batches(accelerator)
        shares = Shares(batches, number)
        sums = []
        with torch.random.fork_rng():  # training is the same where they are read
            loader = loader_of(self.trainer, dataset, shares.of(own))  # the last row is any filler
            for inputs in tqdm(loader, desc="Reference log-probs", disable=self.trainer.args.disable_tqdm):
                batch = Batch.of(inputs)
                sides = torch.stack(batch.sums(self.token_logps(batch)).chunk(responses), dim=1)
                sides = gather_batches(accelerator, accelerator.pad_across_processes(sides))
                sums.append(sides.float().cpu())
        return in_order_of_rows(torch.cat(sums).numpy(), shares)


def _longest_first(dataset: datasets.Dataset, batch_size: int) -> list[list[int]]:
    """Batches of like lengths, which waste no padding; memory that is short is so at once."""
    longest = np.max([token_counts(dataset, name) for name in response_id_columns(dataset)], axis=0)
    order = np.argsort(-(token_counts(dataset, "prompt_ids") + longest), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
