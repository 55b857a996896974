"""What a model must be to be trained here, and which token ids and positions it has room for."""

from __future__ import annotations

import re
from typing import Any

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dil_kernels.data.token_columns import TOKEN_COLUMNS, UNPAIRED_TOKEN_COLUMNS
from dil_kernels.models.evaluation import evaluating
from dil_kernels.models.head_operands import head_sizes
from dil_kernels.models.probes import difference, probe_ids
from dil_kernels.training.adapters import has_adapters, switched

Models = tuple[nn.Module, nn.Module | None]  # the policy and the reference

PROBE_TOKENS = 8
PROBE_TOLERANCE = 0.1  # relative, of half of the tokens: of an expert or an int8 feature chosen otherwise by rounding

_POSITION_TABLE = re.compile(r"(^|\.)(wpe|\w*position\w*)$")


def check_causal_lm(model: Any, name: str) -> None:
    """Refuse what is no causal language model.

    Args:
        model: what was given as such.
        name: of the argument.

    Raises:
        TypeError: an encoder-decoder, a masked language model, a classifier, or a model without a head.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a causal language model, got {type(model).__name__}")
    base = _base(model)
    if not isinstance(base, PreTrainedModel):
        return
    problem = None
    if getattr(base.config, "is_encoder_decoder", False):
        problem = "which has an encoder and a decoder"
    elif "ForMaskedLM" in type(base).__name__:
        problem = "a masked language model, which sees what it predicts"
    elif not base.can_generate() and base.get_output_embeddings() is None:
        problem = "which has no language-model head"
    if problem is not None:
        raise TypeError(
            f"{name} must be a causal language model, as AutoModelForCausalLM loads it, got {type(base).__name__}, "
            f"{problem}"
        )


def keep_gradients_of_4_bits(model: nn.Module, name: str) -> None:
    """Stop bitsandbytes from repacking weights in 4 bits, from which no gradient comes back.

    On CPUs with AVX512-BF16 it does so for good when a layer first runs in evaluation mode, as for the reference.

    Args:
        model: changed in place, where it has such layers.
        name: of the argument.

    Raises:
        NotImplementedError: it has run so already.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise NotImplementedError(
                f"{name} has run in evaluation mode, for which bitsandbytes repacked its weights in 4 bits on this "
                "CPU: no gradient would come back through them. Load it again, and make the trainer before it is called"
            )
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_rows(model: Any) -> None:
    """Refuse a model whose logits in a right-padded batch are not those of each row alone, or see later tokens.

    Measured on two short rows where the weights are whole.

    Args:
        model: as of `check_causal_lm`, not yet wrapped, and with its lengths kept apart.

    Raises:
        NotImplementedError: the padding of a row changes its logits.
        TypeError: tokens see later ones.
    """
    ids = _probe(model)
    if ids is None:
        return
    mask, T = torch.ones_like(ids), ids.shape[1]
    short = T // 2  # tokens of the first row, which is padded; of the second, one that goes on
    start = ids[:, :short], mask[:, :short]
    mask[0, short:] = 0
    try:
        with evaluating(model), torch.no_grad():
            alone, padded = (
                model(input_ids=x, attention_mask=m, use_cache=False).logits[:, :short].float()
                for x, m in (start, (ids, mask))
            )
    except Exception:  # whatever a model's own code may raise: training raises it, too
        return
    differences = ((padded - alone).norm(dim=-1) / alone.norm(dim=-1)).median(dim=1).values
    changed, sees_later = (differences > PROBE_TOLERANCE).tolist()
    if changed:
        raise NotImplementedError(
            f"{_class_name(model)} has other logits for a row that is padded on the right: it does not go by "
            "attention_mask, so that log-probs would depend on the batch"
        )
    if sees_later:
        raise TypeError(
            f"model must be a causal language model, got {_class_name(model)}, whose tokens see later ones; "
            "does its config want is_decoder=True?"
        )


def training_mode_difference(model: Any) -> float:
    """How far logits in training mode are from those in evaluation mode, as of `difference`.

    Measured on two short rows; 0 where the weights are not whole, or the model cannot take them.

    Args:
        model: as of `check_rows`.
    """
    ids = _probe(model)
    if ids is None:
        return 0.0
    devices = {part.device for part in model.parameters() if part.is_cuda}  # and of no other GPU is anything asked
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            evaluated, trained = (
                model.train(mode)(input_ids=ids, use_cache=False).logits.float() for mode in (False, True)
            )
    except Exception:  # whatever a model's own code may raise: training raises it, too
        return 0.0
    return difference(trained, evaluated)


def adapter_difference(model: Any, adapter: str) -> float:
    """How far logits with another adapter are from those with the active one, as of `difference`.

    Measured on two short rows; 0 where the weights are not whole.

    Args:
        model: as of `check_rows`.
        adapter: the other one.
    """
    ids = _probe(model)
    if ids is None:
        return 0.0
    with evaluating(model), torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        with switched(model, adapter):
            other = model(input_ids=ids, use_cache=False).logits
    return difference(other.float(), own.float())


def _probe(model: Any) -> Tensor | None:
    """Token ids of two short rows; None where the weights are not whole, or the model cannot take them."""
    parts = list(model.parameters())
    whole = all(type(part.data) is Tensor and not part.is_meta and not hasattr(part, "ds_id") for part in parts)
    V, T = vocabulary_size(model), min(PROBE_TOKENS, position_limit(model) or PROBE_TOKENS)
    if not isinstance(_base(model), PreTrainedModel) or not whole or V is None or T < 2:
        return None
    return torch.tensor(probe_ids(V, 2 * T), device=_base(model).device).view(2, T)


def _base(model: Any) -> Any:
    return model.get_base_model() if has_adapters(model) else model


def _class_name(model: Any) -> str:
    return type(_base(model)).__name__


def vocabulary_size(*models: nn.Module | None) -> int | None:
    """How many token ids all of some models have embeddings and logits for; None where that is not known."""
    sizes = []
    for model in models:
        embeddings, head = (
            getattr(model, getter)() if hasattr(model, getter) else None
            for getter in ("get_input_embeddings", "get_output_embeddings")
        )
        sizes += [getattr(embeddings, "num_embeddings", None), (head_sizes(head) or (None,))[0]]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def position_limit(model: Any) -> int | None:
    """How many positions a model has, if it looks them up in a table; None if any position can be computed."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tables = [
        (module.num_embeddings, 0 if module.padding_idx is None else module.padding_idx + 1)  # ids begin after that
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _POSITION_TABLE.search(path)
    ]
    tables += [(len(buffer), 0) for path, buffer in model.named_buffers() if _POSITION_TABLE.search(path)]
    return min((min(limit, rows - offset) for rows, offset in tables if rows >= limit), default=None)


def pad_token_id(tokenizer: Any, size: int | None) -> int:
    """A token id below `size`, if that is given: any serves, since padding is masked out of attention and labels."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if token is not None and (size is None or token < size)), 0)


def check_fits(
    dataset: datasets.Dataset, name: str, models: Models, tokenizer: Any, pad_to_multiple_of: int | None = None
) -> None:
    """Refuse token ids that a model has no embedding for, and sequences that are longer than its positions.

    Args:
        dataset: tokenised.
        name: of the data set.
        models: the policy, and the reference if it is another model.
        tokenizer: of the data set.
        pad_to_multiple_of: what sequences are padded to.

    Raises:
        ValueError: names both sizes.
    """
    smallest, largest, length = _ids_and_length(dataset)
    if smallest < 0:
        raise ValueError(f"the {name} data set has the token id {smallest}: token ids are at least 0")
    longest = length + -length % (pad_to_multiple_of or 1)
    for argument, model in zip(("model", "ref_model"), models, strict=True):
        if model is None:
            continue
        size, positions = vocabulary_size(model), position_limit(model)
        if size is not None and largest >= size:
            raise ValueError(
                f"the {name} data set has the token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but "
                f"{argument} has embeddings for {size} ids only (the tokenizer has {len(tokenizer)}): take the "
                f"tokenizer of that model, or resize it with resize_token_embeddings({len(tokenizer)})"
            )
        if positions is not None and longest > positions:
            raise ValueError(
                f"the {name} data set has a sequence of {length} tokens"
                + (f", padded to {longest} (pad_to_multiple_of={pad_to_multiple_of})" if longest > length else "")
                + f", but {argument} has only {positions} positions: set max_length={positions} or less"
            )


def _ids_and_length(dataset: datasets.Dataset) -> tuple[int, int, int]:
    """The smallest and the largest token id of a tokenised data set, and the tokens of its longest sequence."""
    names = [
        name for name in dict.fromkeys((*TOKEN_COLUMNS, *UNPAIRED_TOKEN_COLUMNS[:2])) if name in dataset.column_names
    ]
    smallest = largest = longest = 0
    for batch in dataset.with_format("arrow").select_columns(names).iter(batch_size=1000):
        lengths = {name: pc.list_value_length(batch.column(name)) for name in names}
        for name in names:
            ids = pc.min_max(pc.list_flatten(batch.column(name))).as_py()
            smallest, largest = min(smallest, ids["min"] or 0), max(largest, ids["max"] or 0)
            if name != "prompt_ids":
                longest = max(longest, pc.max(pc.add(lengths["prompt_ids"], lengths[name])).as_py() or 0)
    return smallest, largest, longest
