"""OpenRLHF's own command, stock and with the adapter: see common.py.

DeepSpeed on a CPU takes the place of that on GPUs; weights are bf16, as OpenRLHF has them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import PAIRS, STEPS, Run, check, make_model, make_pairs, run, temporary_folder, verifying

STUBS = str(Path(__file__).parent / "stubs_openrlhf")


def main() -> None:
    """Run every variant; print the line of the table in docs/trainers.md."""
    folder = temporary_folder()
    model = make_model(folder / "model")
    for name, count in (("train", 2 * STEPS * PAIRS), ("test", PAIRS)):
        lines = map(json.dumps, make_pairs(count))
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    options = [
        *("--model.model_name_or_path", model, "--data.dataset", folder / "data", "--eval.dataset", folder / "data"),
        *("--data.prompt_key", "prompt", "--data.max_len", 256, "--ds.attn_implementation", "sdpa"),
        *("--train.micro_batch_size", PAIRS, "--adam.lr", 1e-3, "--logger.tensorboard_dir", folder / "board"),
        *("--ds.zero_stage", 2),
    ]

    def train(name: str, module: str, given: list[Any], processes: int = 1, **environment: str) -> Run:
        launch = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", processes, "--module", module]
        output = ["--ckpt.output_dir", folder / name, "--train.batch_size", PAIRS * processes]
        output += ["--data.max_samples", STEPS * PAIRS * processes]
        variables = {"DS_ACCELERATOR": "cpu", "DIL_CPU_FOR_CUDA": "1", "PYTHONPATH": STUBS, **environment}
        return run([*launch, *options, *output, *given], folder, **variables)

    ours_command = "dil_kernels.integrations.openrlhf"
    train("first", "openrlhf.cli.train_dpo", [])  # DeepSpeed compiles, which takes more memory than what is measured
    stock = train("stock", "openrlhf.cli.train_dpo", [])
    ours = train("ours", ours_command, ["--dil.loss_type", "lsif"])
    assert ours.found(r"\bloss=(-?[\d.]+)")[0] == -0.5, "LSIF is -1/2 where the policy is the reference"
    assert ours.found(r"eval_loss=(-?[\d.]+)")
    assert (folder / "ours" / "model.safetensors").exists()
    verified = [
        train("ukl", ours_command, ["--dil.loss_type", "ukl", "--model.nll_loss_coef", 0.1], **verifying()),
        train("lora", ours_command, ["--dil.padding_free", "--ds.lora.rank", 4], **verifying()),
        train("two", ours_command, ["--dil.loss_type", "lsif"], processes=2, **verifying()),
    ]
    check("openrlhf", stock, ours, verified)


if __name__ == "__main__":
    main()
