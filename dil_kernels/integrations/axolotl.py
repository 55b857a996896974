"""axolotl: a plugin, and a block `dil` in its YAML file.

    rl: dpo
    plugins:
      - dil_kernels.integrations.axolotl.DILPlugin
    dil:
      loss_type: lsif

The block has the fields of `HookOptions`, and prefix_sharing; padding_free is axolotl's dpo_padding_free. From
0.20 on axolotl finds the plugin by itself, and the block is all that is needed.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

__all__ = ["DILArgs", "DILPlugin"]

TRAINER = "dil_kernels.integrations.axolotl_trainer.DILTrainer"
# What axolotl's own loss uses.
UNUSED = (
    *("dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing", "dpo_ld_alpha", "dpo_use_weighting"),
    *("dpo_use_liger_kernel", "rl_beta"),
)


class DILArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    dil: dict[str, Any] | None = None


class DILPlugin(BasePlugin):
    """Makes `DILTrainer` the trainer of a run whose configuration has the block `dil`."""

    def get_input_args(self) -> str:
        """The name of the class of the added configuration."""
        return f"{__name__}.{DILArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """Choose the trainer.

        Args:
            cfg: axolotl's configuration as it was read, which is changed.

        Raises:
            ValueError: an option that is wrong, or would have no effect.
        """
        if cfg.get("dil") is None:
            if __name__ in " ".join(cfg.get("plugins") or []):
                raise ValueError(
                    "dil_kernels is among the plugins, but there is no block dil; give dil: {loss_type: lsif}"
                )
            return
        from dil_kernels.integrations.hooks import HookOptions, refuse

        options = {name: value for name, value in dict(cfg["dil"]).items() if name != "prefix_sharing"}
        if HookOptions.of(options, "dil").padding_free:
            raise ValueError("padding_free has no effect in the block dil; give axolotl's dpo_padding_free")
        if cfg.get("rl") != "dpo":
            raise ValueError(f"rl must be dpo with a block dil, got {cfg.get('rl')!r}")
        given = {name: cfg.get(name) for name in UNUSED} | {"trl.beta": (cfg.get("trl") or {}).get("beta")}
        refuse(given, dict.fromkeys(given), "leave it out, or see dil.loss_type and dil.beta")
        if cfg.get("trainer_cls") not in (None, TRAINER):
            raise ValueError(f"trainer_cls={cfg['trainer_cls']} was given, but the block dil takes {TRAINER}")
        cfg["trainer_cls"] = TRAINER
