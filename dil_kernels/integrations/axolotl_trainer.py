"""The trainer that the plugin of axolotl.py names: axolotl's own, with the losses and the fused head of dil_kernels."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import PluginManager

from dil_kernels.integrations import trl
from dil_kernels.integrations.hooks import HookOptions, check_trainer, say

PACKAGE = check_trainer(
    "axolotl", ("0.19.0", "0.21.0"), {AxolotlDPOTrainer.__init__: ("self", "args", "dataset_tags", "kwargs")}
)


class DILTrainer(trl.DILTrainer, AxolotlDPOTrainer):
    """`dil_kernels.integrations.trl.DILTrainer` with axolotl's optimizers, schedulers and loaders.

    Takes the `AxolotlDPOConfig` that axolotl makes of its YAML file, and the options of the block `dil`.

    Raises:
        ValueError: an option that would have no effect.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        given = dict(PluginManager.get_instance().cfg["dil"])
        super().__init__(model, ref_model, trl.DILConfig.from_dpo_config(args, **given), **kwargs)
        given.pop("prefix_sharing", None)
        head = "the fused head" if self._models.has_fused_head(self.model) else "logits"
        say(f"dil_kernels in {PACKAGE}: loss {HookOptions.of(given, 'dil')}, log-probs from {head}")
