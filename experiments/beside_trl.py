"""Training to convergence beside TRL: the held-out margin, the step time and the memory of both trainers.

    python -m experiments.beside_trl --pairs pairs.jsonl            # SmolLM2-135M, on the GPU if there is one
    python -m experiments.beside_trl --model DIR --pairs pairs.jsonl
    python -m experiments.beside_trl --random-llama --max-steps 50  # a 1B-class Llama with random weights: speed only
    python -m experiments.beside_trl --quick                        # a tiny random model; seconds

The trainers get the same pairs in the same order (the same seed draws the same permutation), none of them truncated,
and the same optimizer, schedule and precision. Each arm runs in a process of its own. Held-out pairs are scored by one
function for all, outside of what is timed. An arm stops when its held-out margin has not grown for `--patience`
evaluations. Arms that are finished are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from dil_kernels import sequence_logps
from dil_kernels.cli.environment import describe_environment
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.models.evaluation import evaluating
from experiments.beside_trl_report import write_report
from experiments.tables import RESULTS

ARMS = ("dil lsif", "dil dpo", "trl dpo")
SPLIT_SEED = 20250305
HELD_OUT = 0.2  # share of the pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Run every arm that is not finished, then write table and figure."""
    options = parse_options(argv)
    if options.arm is not None:
        train_arm(options.arm, options)
        return 0
    options.runs_dir.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        if not record_path(options, arm).is_file():
            given = sys.argv[1:] if argv is None else list(argv)
            subprocess.run([sys.executable, "-m", "experiments.beside_trl", *given, "--arm", arm], check=True)
    records = [json.loads(record_path(options, arm).read_text()) for arm in ARMS]
    write_report(records, options.output)
    print(f"results in {options.output}")
    return 0


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.beside_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny random model on made-up pairs")
    parser.add_argument("--random-llama", action="store_true", help="Llama-3.2-1B's shape with random weights")
    parser.add_argument("--model", type=Path, help="a model directory (default: SmolLM2-135M, prepared under runs/)")
    parser.add_argument("--pairs", type=Path, help="preference pairs (default: the embedded ones)")
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are left out (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="constant after warm-up (%(default)s)")
    parser.add_argument("--max-steps", type=int, default=400, help="optimizer steps at most (default: %(default)s)")
    parser.add_argument("--eval-steps", type=int, default=10, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--patience", type=int, default=5, help="evaluations without a larger margin (%(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/beside_trl"), help="where finished arms are kept")
    parser.add_argument("--output", type=Path, default=RESULTS / "beside_trl", help="folder of table and figure")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.max_steps, options.eval_steps, options.patience, options.learning_rate = 12, 4, 3, 1e-3
    return options


def record_path(options: argparse.Namespace, arm: str) -> Path:
    """Where the record of a finished arm is kept."""
    return options.runs_dir / f"{arm.replace(' ', '_')}.json"


class Watch(TrainerCallback):
    """Times the steps, scores the held-out pairs between them, and ends the run when the margin stops growing."""

    def __init__(self, held_out: Sequence[dict[str, Any]], pad_token_id: int, options: argparse.Namespace) -> None:
        self.batches = [
            PreferenceCollator(pad_token_id)(held_out[start : start + options.batch_size])
            for start in range(0, len(held_out), options.batch_size)
        ]
        self.options = options
        self.step_seconds: list[float] = []
        self.held_out: list[dict[str, float]] = []
        self.peak_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Score the model as it starts."""
        self.reference = self.score(model)
        self.record(0, model)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stop the clock; evaluate where it is time to."""
        synchronize()
        self.step_seconds.append(time.perf_counter() - self.started)
        if torch.cuda.is_available():
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        if state.global_step % self.options.eval_steps:
            return
        self.record(state.global_step, model)
        margins = [entry["margin"] for entry in self.held_out]
        control.should_training_stop |= len(margins) - 1 - margins.index(max(margins)) >= self.options.patience
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def record(self, step: int, model: Any) -> None:
        """Means over the held-out pairs of log-probs and log ratios a token, in nats."""
        chosen, rejected = self.score(model)
        ratios = chosen - self.reference[0], rejected - self.reference[1]
        entry = {
            "chosen_logp": chosen.mean().item(),
            "rejected_logp": rejected.mean().item(),
            "margin": (ratios[0] - ratios[1]).mean().item(),
            "accuracy": (ratios[0] > ratios[1]).double().mean().item(),
        }
        self.held_out.append({"step": step, **entry})
        print(f"step {step}: " + " ".join(f"{name}={value:.4f}" for name, value in entry.items()), flush=True)

    @torch.no_grad()
    def score(self, model: Any) -> torch.Tensor:
        """Mean log-probs a token of the chosen and of the rejected responses, [2, pairs] fp64."""
        scores = []
        with evaluating(model):
            for batch in self.batches:
                tokens = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
                labels = tokens.pop("labels")
                with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                    logits = model(**tokens, use_cache=False).logits
                scores.append(sequence_logps(logits, labels, average_log_prob=True).double().cpu().view(2, -1))
        return torch.cat(scores, dim=1)


def train_arm(arm: str, options: argparse.Namespace) -> None:
    """Train with one trainer and one loss, and keep what was seen."""
    model, tokenizer, train, held_out = load_problem(options)
    watch = Watch(list(tokenized(held_out, tokenizer, options.max_length)), tokenizer.pad_token_id, options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainer = make_trainer(arm, model, tokenizer, train, watch, options)
    trainer.train()
    first = 2 if len(watch.step_seconds) > 4 else 0  # compilation and warm-up
    tokens = tokens_per_step(tokenized(train, tokenizer, options.max_length), options.batch_size)
    seconds = median(watch.step_seconds[first:])
    record = {
        "arm": arm,
        "parameters": parameters,
        "steps": len(watch.step_seconds),
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": watch.peak_bytes,
        "train_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "held_out": watch.held_out,
        "environment": describe_environment(),
    }
    path = record_path(options, arm)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.rename(path)


def make_trainer(arm: str, model: Any, tokenizer: Any, train: Any, watch: Watch, options: argparse.Namespace) -> Any:
    """`DILTrainer` or TRL's `DPOTrainer`, alike but for the loss; DPO is on sums with beta 0.1 in both."""
    name, loss = arm.split()
    common = {
        "output_dir": str(options.runs_dir / f"{name}_{loss}"),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, options.max_steps // 20),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "max_length": options.max_length,
        "seed": options.seed,
        "disable_tqdm": True,
    }
    what = {"model": model, "train_dataset": train, "processing_class": tokenizer, "callbacks": [watch]}
    if name == "trl":
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(**common, loss_type="sigmoid", beta=0.1)
        return DPOTrainer(ref_model=copy.deepcopy(model), args=config, **what)
    from dil_kernels.trainer import DILConfig, DILTrainer

    chosen = {"loss_type": "dpo", "beta": 0.1, "average_log_prob": False} if loss == "dpo" else {"loss_type": loss}
    return DILTrainer(args=DILConfig(**common, **chosen), **what)


def load_problem(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Model, tokenizer, and the pairs for training and for the held-out curves, none longer than the maximum."""
    from dil_kernels.data import load_preference_pairs
    from dil_kernels.quickstart.embedded import load_embedded_pairs

    model, tokenizer = load_model(options)
    pairs = load_embedded_pairs("train") if options.pairs is None else load_preference_pairs(options.pairs)
    lengths = tokenized(pairs, tokenizer, None)["length"]
    pairs = pairs.select([index for index, length in enumerate(lengths) if length <= options.max_length])
    pairs = pairs.shuffle(seed=SPLIT_SEED)
    count = max(1, int(HELD_OUT * len(pairs)))
    return model, tokenizer, pairs.select(range(count, len(pairs))), pairs.select(range(count))


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The policy in fp32, as it starts, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if options.quick:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from shared import load_model as load_tiny

        return load_tiny(None)
    from dil_kernels.quickstart.smollm2 import prepare

    directory = options.model or prepare("runs/smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not options.random_llama:
        return AutoModelForCausalLM.from_pretrained(directory), tokenizer
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def tokenized(pairs: Any, tokenizer: Any, max_length: int | None) -> Any:
    """Token ids of the pairs."""
    half = None if max_length is None else max_length // 2
    return tokenize_dataset(pairs, tokenizer, max_length=max_length, max_prompt_length=half, truncation_mode="keep_end")


def tokens_per_step(pairs: Any, batch_size: int) -> float:
    """Tokens of prompts and responses that a step's pairs have on average, padding not counted."""
    total = sum(2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    return batch_size * total / len(pairs)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
