"""ms-swift's own command, stock and with the adapter: see common.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import PAIRS, STEPS, check, make_model, make_pairs, run, temporary_folder, verifying


def main() -> None:
    """Run every variant; print the line of the table in docs/trainers.md."""
    folder = temporary_folder()
    model = make_model(folder / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["chosen"]},
            ],
            "rejected_response": pair["rejected"],
        }
        for pair in make_pairs(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        *(Path(sys.executable).with_name("swift"), "rlhf", "--rlhf_type", "dpo", "--use_cpu", "true"),
        *("--model", model, "--model_type", "llama", "--template", "chatml", "--dataset", folder / "pairs.jsonl"),
        *("--torch_dtype", "float32", "--bf16", "false", "--fp16", "false", "--split_dataset_ratio", "0.1"),
        *("--max_steps", STEPS, "--eval_steps", STEPS, "--save_steps", STEPS, "--logging_steps", 1),
        *("--per_device_train_batch_size", PAIRS, "--per_device_eval_batch_size", PAIRS),
        *("--gradient_accumulation_steps", 1, "--learning_rate", 1e-3, "--report_to", "none", "--use_hf", "true"),
    ]
    where = [sys.executable, "-m", "dil_kernels.integrations.swift"]
    plugin = ["--external_plugins", subprocess.check_output(where, text=True).strip()]
    full, lora = ("--tuner_type", "full"), ("--tuner_type", "lora")
    stock = run([*command, *full, "--output_dir", folder / "stock"], folder)
    ours = run([*command, *full, *plugin, "--loss_type", "lsif", "--output_dir", folder / "ours"], folder)
    assert ours.found(r"'loss': '(-?[\d.]+)")[0] == -0.5, "LSIF is -1/2 where the policy is the reference"
    assert len(ours.found(r"'eval_rewards/margins': '(-?[\d.]+)")) >= 1
    assert list((folder / "ours").glob("*/checkpoint-2/model.safetensors"))
    command += ["--gradient_checkpointing", "false"]  # which does not let gradients be taken twice
    mixed = ["--loss_type", "lsif", "sft", "--loss_weights", 1, 0.5, "--output_dir", folder / "mixed"]
    verified = [
        run([*command, *full, *plugin, *mixed], folder, **verifying()),
        run(
            [*command, *lora, *plugin, "--loss_type", "ukl", "--output_dir", folder / "lora"],
            folder,
            DIL_OPTIONS='{"alpha": 0.5, "padding_free": true}',
            **verifying(),
        ),
        run(
            [*command, *full, *plugin, "--loss_type", "lsif", "--output_dir", folder / "two"],
            folder,
            NPROC_PER_NODE="2",
            **verifying(),
        ),
    ]
    check("ms-swift", stock, ours, verified)


if __name__ == "__main__":
    main()
