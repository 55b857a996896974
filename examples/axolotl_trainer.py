"""DIL in axolotl 0.19, which is built on TRL: a trainer class to name in its YAML file.

rl: dpo
trainer_cls: axolotl_trainer.LSIFTrainer  # this file, on the PYTHONPATH
"""

from __future__ import annotations

from typing import Any

from trl import DPOConfig

from dil_kernels.integrations.trl import DILConfig, DILTrainer


class LSIFTrainer(DILTrainer):
    """Takes the `DPOConfig` that axolotl makes of its YAML file; the loss is chosen here."""

    def __init__(self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **kwargs: Any) -> None:
        if args is None:
            raise ValueError("args must be the DPOConfig that axolotl makes, got None")
        super().__init__(model, ref_model, DILConfig.from_dpo_config(args, loss_type="lsif"), **kwargs)
