"""Reference log-probs on disk: kept for a data set and a model, and checked in full before they are used again.

A file is found by everything that its numbers depend on: the token ids of every row, the model's weights, classes and
configuration, how the log-probs are taken, and the versions of the packages that take them. Whatever of this changes
leads to another file. What a file says is used only if its key, its checksum and the length of every response are as
expected; else it is reported, computed again and overwritten.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import xxhash
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

import dil_kernels
from dil_kernels.data.token_counts import response_id_columns, token_counts, token_ids
from dil_kernels.training.adapters import adapters_in_use
from dil_kernels.user_cache import make_private, remove_abandoned, scratch_beside

logger = logging.getLogger(__name__)

FORMAT = 1
VOLATILE_CONFIG = frozenset({"_name_or_path", "architectures", "transformers_version", "use_cache"})


def default_ref_cache_dir() -> Path:
    """The directory for all runs of a user: dil_kernels/reference_log_probs in the cache of Hugging Face (HF_HOME)."""
    return Path(HF_HOME) / "dil_kernels" / "reference_log_probs"


@dataclass(frozen=True)
class ReferenceCache:
    """Files of reference log-probs under one model.

    Attributes:
        directory: where they are; made when the first one is written.
        identity: what the log-probs depend on beside the data, as JSON has it.
    """

    directory: Path
    identity: Mapping[str, Any]

    def entry(self, dataset: datasets.Dataset) -> CacheEntry:
        """The place of a tokenised data set's log-probs, whether they are there or not."""
        key = {"format": FORMAT, "versions": versions(), **self.identity, "data": dataset_fingerprint(dataset)}
        text = json.dumps(key, sort_keys=True)
        path = self.directory / f"{xxhash.xxh3_128_hexdigest(text.encode())}.safetensors"
        return CacheEntry(path, text, scored_lengths(dataset))


@dataclass(frozen=True)
class CacheEntry:
    """One file of reference log-probs: `logps` fp32 and `lengths` int64, both [rows, responses of a row].

    Attributes:
        path: the file.
        key: what its numbers depend on, as JSON.
        lengths: scored tokens of every response of the data set.
    """

    path: Path
    key: str
    lengths: NDArray[np.int64]

    def load(self) -> NDArray[np.float32] | None:
        """The sums over the scored tokens; None where there is no file, or, with a warning, a damaged one."""
        try:
            return self._read()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s cannot be used (%s): the reference log-probs are computed again", self.path, error)
            return None

    def _read(self) -> NDArray[np.float32]:
        with safe_open(self.path, framework="np") as file:
            metadata = file.metadata() or {}
            if set(file.keys()) != {"logps", "lengths"} or metadata.keys() != {"key", "checksum"}:
                raise ValueError("it does not hold logps and lengths")
            logps, lengths = file.get_tensor("logps"), file.get_tensor("lengths")
        if metadata["key"] != self.key:
            raise ValueError("its key is another one")
        if logps.dtype != np.float32 or lengths.dtype != np.int64 or logps.shape != lengths.shape:
            raise ValueError(f"logps are {logps.dtype} {logps.shape}, lengths {lengths.dtype} {lengths.shape}")
        if metadata["checksum"] != _checksum(self.key, logps, lengths):
            raise ValueError("its checksum does not fit")
        if not np.array_equal(lengths, self.lengths):
            raise ValueError("its responses have other lengths than those of the data set")
        if not np.isfinite(logps).all():
            raise ValueError("it holds log-probs that are not finite")
        return logps

    def store(self, logps: NDArray[np.float32]) -> str | None:
        """Write the log-probs, in one step: no reader ever sees a part of them, and the last of several writers wins.

        Args:
            logps: sums over the scored tokens, shaped as `lengths`.

        Returns:
            Why they were not written; None if they were.
        """
        broken = np.flatnonzero(~np.isfinite(logps).all(axis=1))
        if broken.size:
            rows = ", ".join(str(row + 1) for row in broken[:8])
            return f"{broken.size} rows have log-probs that are not finite: {rows}{', ...' * (broken.size > 8)}"
        metadata = {"key": self.key, "checksum": _checksum(self.key, logps, self.lengths)}
        data = save({"logps": np.ascontiguousarray(logps), "lengths": self.lengths}, metadata)
        scratch = scratch_beside(self.path)
        try:
            make_private(self.path.parent)
            remove_abandoned(self.path.parent)
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            return str(error)
        return None


def _checksum(key: str, logps: NDArray[np.float32], lengths: NDArray[np.int64]) -> str:
    checksum = xxhash.xxh3_128(key.encode())
    checksum.update(_contiguous(logps))
    checksum.update(_contiguous(lengths))
    return checksum.hexdigest()


def _contiguous(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data


def versions() -> dict[str, str]:
    """Of the packages that take log-probs."""
    packages = {"dil_kernels": dil_kernels, "torch": torch, "transformers": transformers}
    return {name: str(package.__version__) for name, package in packages.items()}


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """A hash of the token ids of every row in order, however the rows are stored.

    Template, tokenizer and truncation are in the token ids; other columns do not matter.
    """
    digest = xxhash.xxh3_128()
    for name in ("prompt_ids", *response_id_columns(dataset)):
        lengths, values = xxhash.xxh3_128(), xxhash.xxh3_128()
        for counts, ids in token_ids(dataset, name):
            lengths.update(_contiguous(counts))
            values.update(_contiguous(ids))
        digest.update(f"{name} {lengths.hexdigest()} {values.hexdigest()}\n".encode())
    return digest.hexdigest()


def scored_lengths(dataset: datasets.Dataset) -> NDArray[np.int64]:
    """Scored tokens of every response, [rows, responses of a row]: all, if there is a prompt to predict them from."""
    prompts, *responses = (token_counts(dataset, name) for name in ("prompt_ids", *response_id_columns(dataset)))
    return np.stack([np.where(prompts > 0, counts, np.maximum(counts - 1, 0)) for counts in responses], axis=1)


def model_fingerprint(module: nn.Module) -> str:
    """A hash of all that a model's log-probs depend on: weights, buffers, modules, configuration, active adapters.

    Every byte of every weight is read, once where weights are tied: 0.02 s for 135M fp32 parameters in memory, and of
    the order of a second for 7B in bf16, beside the copy from their device.

    Args:
        module: a whole model, on any device. It must be in the state in which it computes the reference.

    Raises:
        NotImplementedError: the weights are not all here (FSDP, ZeRO-3, meta device), or their bytes cannot be read.
    """
    _refuse_absent_weights(module)
    digest = xxhash.xxh3_128(model_description(module).encode())
    hashed: dict[tuple[Any, ...], str] = {}
    for name, tensor in _state(module):
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if place not in hashed:
            hashed[place] = _hash_tensor(name, tensor)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {hashed[place]}\n".encode())
    return digest.hexdigest()


def model_description(module: nn.Module) -> str:
    """What a model's log-probs depend on beside its weights and buffers, as JSON."""
    config: Any = getattr(module, "config", None)
    description = {
        "classes": [(name, type(part).__module__, type(part).__qualname__) for name, part in module.named_modules()],
        "config": _lasting(config.to_dict()) if hasattr(config, "to_dict") else None,
        "attention": getattr(config, "_attn_implementation", None),
        "adapters": adapters_in_use(module),
    }
    return json.dumps(description, sort_keys=True, default=str)


def _refuse_absent_weights(module: nn.Module) -> None:
    sharded: tuple[type, ...] = ()
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        sharded = (DTensor,)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, sharded) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param"):
            raise NotImplementedError(f"{name} is sharded over processes: fingerprint the model before it is wrapped")
        if parameter.is_meta:
            raise NotImplementedError(f"{name} is on the meta device: its values are not known")


def _lasting(config: Any) -> Any:
    """A configuration without what says where a model came from."""
    if isinstance(config, Mapping):
        return {str(key): _lasting(value) for key, value in config.items() if key not in VOLATILE_CONFIG}
    return config


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint would hold, the states of quantised weights included, and the buffers that it leaves out."""
    state = module.state_dict()
    state.update((name, buffer) for name, buffer in module.named_buffers() if name not in state)
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):
            raise NotImplementedError(f"{name} in the state of the model is a {type(value).__name__}, not a tensor")
        yield name, value


def _hash_tensor(name: str, tensor: Tensor) -> str:
    try:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError) as error:
        raise NotImplementedError(f"the bytes of {name} ({type(tensor).__name__}) cannot be read: {error}") from error
    return xxhash.xxh3_128_hexdigest(_contiguous(data))
