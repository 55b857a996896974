"""LLaMA-Factory's own command, stock and with the adapter: see common.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import PAIRS, STEPS, Run, check, make_model, make_pairs, run, temporary_folder, verifying

STUBS = str(Path(__file__).parent / "stubs_llamafactory")
OURS = [sys.executable, "-m", "dil_kernels.integrations.llamafactory"]


def main() -> None:
    """Run every variant; print the line of the table in docs/trainers.md."""
    folder = temporary_folder()
    model = make_model(folder / "model")
    (folder / "pairs.json").write_text(json.dumps(make_pairs(40)))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    data = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(data))
    config = {
        "model_name_or_path": str(model),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "default",
        "val_size": 0.1,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": PAIRS,
        "per_device_eval_batch_size": PAIRS,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
    }

    def train(name: str, command: list[Any], options: dict[str, Any], **environment: str) -> Run:
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps(config | {"output_dir": str(folder / name)} | options))
        return run([*command, file], folder, PYTHONPATH=STUBS, **environment)

    stock = train("stock", [Path(sys.executable).with_name("llamafactory-cli"), "train"], {})
    ours = train("ours", OURS, {"dil": {"loss_type": "lsif"}})
    assert ours.found(r"'loss': '?(-?[\d.]+)")[0] == -0.5, "LSIF is -1/2 where the policy is the reference"
    assert ours.found(r"'eval_rewards/margins': '?(-?[\d.]+)")
    assert (folder / "ours" / "model.safetensors").exists()
    config["disable_gradient_checkpointing"] = True  # which does not let gradients be taken twice
    ukl = {"loss_type": "ukl", "alpha": 0.5, "padding_free": True}
    two = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    verified = [
        train("sft", OURS, {"dil": {"loss_type": "lsif"}, "pref_ftx": 0.5}, **verifying()),
        train("lora", OURS, {"dil": ukl, "finetuning_type": "lora"}, **verifying()),
        train("two", OURS, {"dil": {"loss_type": "lsif"}, "ddp_backend": "gloo"}, **two, **verifying()),
    ]
    check("llamafactory", stock, ours, verified)


if __name__ == "__main__":
    main()
