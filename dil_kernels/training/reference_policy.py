"""The reference of the log ratios: the policy as it is when the trainer is made, or a model that the user gives.

It needs no second model where the policy's own weights hold it: with the adapter switched off, with a second adapter,
or with a frozen copy of an adapter that came trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from dil_kernels.models.evaluation import evaluating
from dil_kernels.training.adapters import (
    can_be_copied,
    changes_nothing,
    freeze_adapter,
    freeze_copy,
    has_adapters,
    switched,
    trained_adapter,
    trains_base_weights,
)
from dil_kernels.training.sharding import as_on_main_process, frozen_copy, is_wrapped_late, move, place_frozen


class ReferencePolicy:
    """What the log ratios are taken against. It never changes, and takes no gradients.

    Args:
        policy: the model that is trained, not wrapped yet.
        ref_model: the user's reference; None for the policy as it is now.
        adapter: the name of an adapter of the policy, with which it is the reference.
        accelerator: of the trainer.
        lasting: whether the policy will change while the reference is in use.

    Raises:
        NotImplementedError: an adapter of a kind that cannot be trained.
        ValueError: adapter is no other adapter of the policy, or is given beside ref_model; or training would
            change ref_model.
    """

    def __init__(
        self,
        policy: nn.Module,
        ref_model: nn.Module | None,
        adapter: str | None,
        accelerator: Any,
        lasting: bool = True,
    ) -> None:
        self._policy: Any = policy
        # Of the policy, the one that is no part of what is trained; to it, or with None to the base, it is switched.
        self.adapter, self._switches = adapter, adapter is not None
        self.model = ref_model  # with weights of its own; None where those of the policy serve
        if ref_model is not None:
            _refuse_shared_weights(policy, ref_model)
        trained = trained_adapter(policy) if has_adapters(policy) else None
        if adapter is not None:
            if ref_model is not None:
                raise ValueError(
                    f"ref_adapter_name={adapter!r} was given, and ref_model, too: only one is the reference"
                )
            if trained is None:
                raise ValueError(f"ref_adapter_name={adapter!r} was given, but model is not a PeftModel")
            freeze_adapter(policy, adapter, trained)
            if lasting and trains_base_weights(policy, trained):
                self._own_copy(accelerator)
        elif ref_model is None and lasting:
            self._keep_initial_policy(trained, accelerator)
        if self.model is None and not lasting and is_wrapped_late(accelerator):
            self._own_copy(accelerator)

    def _keep_initial_policy(self, trained: str | None, accelerator: Any) -> None:
        """Keep the policy as it is now, at the least cost in memory."""
        if trained is None or trains_base_weights(self._policy, trained):
            self._own_copy(accelerator)
        elif as_on_main_process(changes_nothing, self._policy, trained):
            self._switches = True
        elif can_be_copied(self._policy, trained):
            self._switches, self.adapter = True, freeze_copy(self._policy, trained)
        else:
            self._own_copy(accelerator)

    def _own_copy(self, accelerator: Any) -> None:
        self.model = frozen_copy(self._policy, accelerator)
        if self.adapter is not None:
            self.model.set_adapter(self.adapter)  # type: ignore[operator]
        self._switches = False

    def place(self, accelerator: Any) -> None:
        """Bring weights of its own to where they are computed with, sharded as those of the policy will be."""
        if self.model is not None:
            self.model = place_frozen(self.model, accelerator)
        elif not is_wrapped_late(accelerator):
            move(self._policy, accelerator.device)

    @contextlib.contextmanager
    def module(self, policy: nn.Module) -> Iterator[nn.Module]:
        """What to call for the reference, in evaluation mode.

        Args:
            policy: the policy as it is wrapped; it must be called where its weights serve, so that a wrapper that
                gathers them does.
        """
        if self.model is not None:
            yield self.model
            return
        switch = switched(self._policy, self.adapter) if self._switches else contextlib.nullcontext()
        with evaluating(self._policy), switch:  # the model itself; wrappers do not keep their modes
            yield policy

    def adapters_that_count(self) -> list[str]:
        """Those with which `model`, or the policy where it serves, is the reference now."""
        model: Any = self._policy if self.model is None else self.model
        names = list(model.active_adapters) if has_adapters(model) else []
        if self.model is None and self._switches:
            names = [] if self.adapter is None else [self.adapter]
        return [name for name in names if not changes_nothing(model, name)]


def _refuse_shared_weights(policy: nn.Module, ref_model: nn.Module) -> None:
    """Refuse a reference that would change with the policy, such as the model into which peft put the adapter."""
    own = {id(parameter) for parameter in ref_model.parameters()}
    shared = [name for name, value in policy.named_parameters() if id(value) in own and value.requires_grad]
    if shared:
        raise ValueError(
            f"ref_model shares weights with the model that training changes: {shared[0]}{', ...' * (len(shared) > 1)}; "
            "leave it out for the policy as it is now"
        )
