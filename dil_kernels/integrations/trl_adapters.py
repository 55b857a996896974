"""The reference of `DILTrainer` on TRL where the policy has an adapter, and no reference was given.

That of a new adapter is the model without it. Of one that came trained TRL adds a second one, and copies to it what has
"default" in the middle of its name; what else an adapter has, and whether both compute the same, is seen to here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dil_kernels.models.probes import is_rounding, weights_are_whole
from dil_kernels.training.adapters import AS_COPIED, copy_adapter, has_adapters, trains_base_weights
from dil_kernels.training.model_checks import adapter_difference

POLICY, REFERENCE = "default", "ref"  # adapters, as TRL names them
BASE_STAYS = ("gaussian", "orthogonal", "eva")  # ways by name to initialise LoRA; others change the base weights

HOW = "give ref_model=copy.deepcopy(model), or take dil_kernels.DILTrainer"


@contextlib.contextmanager
def copyable(model: Any, ref_model: Any) -> Iterator[None]:
    """Let TRL copy the adapter of a model that has one, without changing the model.

    Args:
        model: as the trainer is given it.
        ref_model: likewise; None where TRL will copy an adapter.

    Raises:
        NotImplementedError: TRL, or peft, cannot copy it.
    """
    if ref_model is not None or not has_adapters(model):
        yield
        return
    if list(model.active_adapters) != [POLICY]:
        raise NotImplementedError(
            f"TRL takes the adapter 'default' for the policy, but {list(model.active_adapters)} is active in model: "
            f"load it with adapter_name='default'; or {HOW}"
        )
    config = model.peft_config[POLICY]
    if getattr(config, "bias", "none") != "none":
        raise NotImplementedError(
            f"the adapter of model has bias={config.bias!r}, of which peft adds no second one for the reference: {HOW}"
        )
    before = {name: getattr(config, name) for name in AS_COPIED if hasattr(config, name)}
    vars(config).update({name: AS_COPIED[name] for name in before})
    try:
        yield
    finally:
        vars(config).update(before)
    if REFERENCE not in model.peft_config:  # TRL with target_parameters and peft before 0.20
        raise NotImplementedError(f"TRL took no copy of the adapter of model for the reference: {HOW}")


def settle_reference(model: Any) -> None:
    """Make TRL's copy of an adapter a whole one; refuse a reference that is not the policy as it was given.

    Args:
        model: the policy, with its adapters as TRL has made them, not yet wrapped.

    Raises:
        NotImplementedError: the message is the reason.
    """
    config = model.peft_config[POLICY]
    if config.is_prompt_learning:
        return
    if trains_base_weights(model, POLICY):
        raise NotImplementedError(f"training changes weights beside the adapter, with which the reference moves: {HOW}")
    if REFERENCE in model.peft_config:
        if weights_are_whole(model):
            _copy(model, config.peft_type.value)
        return
    how = getattr(config, "init_lora_weights", True)
    if isinstance(how, str) and how.lower() not in BASE_STAYS:
        raise NotImplementedError(
            f"init_lora_weights={how!r} moves a part of the weights into the adapter, so that the model without it is "
            "not the one that was given: make model=peft.get_peft_model(model, peft_config), and leave peft_config out"
        )


def _copy(model: Any, kind: str) -> None:
    copy_adapter(model, POLICY, REFERENCE)
    changed = adapter_difference(model, REFERENCE)
    if not is_rounding(changed, model):
        raise NotImplementedError(
            f"the copy that TRL took of the adapter of model, a {kind}, computes other logits (relative difference "
            f"{changed:.1e}): {HOW}"
        )
