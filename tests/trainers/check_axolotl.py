"""axolotl's own command, stock and with the plugin: see common.py."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from common import PAIRS, STEPS, Run, check, make_model, make_pairs, run, temporary_folder, verifying

PLUGIN = "dil_kernels.integrations.axolotl.DILPlugin"


def main() -> None:
    """Run every variant; print the line of the table in docs/trainers.md."""
    folder = temporary_folder()
    model = make_model(folder / "model")
    lines = map(json.dumps, make_pairs(40))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    fields = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
    config = {
        "base_model": str(model),
        "rl": "dpo",
        "datasets": [{"path": str(folder / "pairs.jsonl"), "ds_type": "json", "type": fields}],
        "val_set_size": 0.1,
        "sequence_len": 256,
        "micro_batch_size": PAIRS,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "logging_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "dataset_num_proc": 1,
    }

    def train(name: str, options: dict[str, Any], processes: int = 1, **environment: str) -> Run:
        file = folder / f"{name}.yaml"
        paths = {"output_dir": str(folder / name), "dataset_prepared_path": str(folder / "prepared")}
        file.write_text(json.dumps(config | paths | options))
        launch = [Path(sys.executable).with_name("axolotl"), "train", file, "--launcher"]
        given = ["--", "--nproc-per-node", 2] if processes > 1 else []
        launcher = "torchrun" if processes > 1 else "python"
        return run([*launch, launcher, *given], folder, **environment)

    # Those from 0.20 on find the plugin by themselves.
    plugin = {"plugins": [PLUGIN]} if importlib.metadata.version("axolotl") < "0.20" else {}
    cpu = {"ACCELERATE_USE_CPU": "true"}
    stock = train("stock", {}, **cpu)
    ours = train("ours", {"dil": {"loss_type": "lsif"}, **plugin}, **cpu)
    assert ours.found(r"'loss': '?(-?[\d.]+)")[0] == -0.5, "LSIF is -1/2 where the policy is the reference"
    assert ours.found(r"'eval_rewards/margins': '?(-?[\d.e-]+)")
    assert list((folder / "ours").glob("**/model.safetensors"))
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    verified = [
        train("ukl", {"dil": {"loss_type": "ukl", "alpha": 0.5}, "plugins": [PLUGIN]}, **cpu, **verifying("trl")),
        train(
            "lora",
            {"dil": {"loss_type": "lsif"}, "dpo_padding_free": True, **plugin, **lora},
            **cpu,
            **verifying("trl"),
        ),
        train(
            "two",
            {"dil": {"loss_type": "lsif"}, **plugin},
            processes=2,
            DIL_CPU_FOR_CUDA="1",
            **cpu,
            **verifying("trl"),
        ),
    ]
    check("axolotl", stock, ours, verified)


if __name__ == "__main__":
    main()
