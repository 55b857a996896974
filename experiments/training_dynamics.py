"""How log-probs, margins and accuracies move in training, for density-ratio losses and for DPO.

    python -m experiments.training_dynamics                       # SmolLM2-135M-Instruct on the embedded pairs
    python -m experiments.training_dynamics --pairs pairs.jsonl   # on other pairs
    python -m experiments.training_dynamics --quick               # a tiny random model; seconds

Every loss gets the same batches, the same grid of learning rates and the same number of trials; its learning rate is
the one with the best validation accuracy, and the held-out pairs are only reported. Interrupted, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.dynamics_report import write_report
from experiments.dynamics_runs import ARMS, Runner, Settings, Splits, choose_learning_rate
from experiments.tables import RESULTS
from experiments.upper_blocks import cache_hidden_states, take_upper_blocks

FULL = Settings(
    tuning_steps=12,
    steps=24,
    eval_every=8,
    warmup_steps=4,
    batch_size=4,
    trained_blocks=8,
    learning_rates=(3e-5, 1e-4, 3e-4),
    higher_rates=(1e-3, 3e-3),
    seeds=(0, 1),
)
QUICK = Settings(
    tuning_steps=8,
    steps=12,
    eval_every=4,
    warmup_steps=2,
    batch_size=4,
    trained_blocks=2,
    learning_rates=(1e-3, 4e-3),
    higher_rates=(1e-2,),
    seeds=(0, 1),
)
SPLIT_SEED = 20250305

TokenisedPairs = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, choose the learning rates, write tables and figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.training_dynamics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model on made-up pairs, to see that it runs"
    )
    parser.add_argument("--pairs", type=Path, help="preference pairs instead of the embedded ones; a fifth is held out")
    parser.add_argument(
        "--max-length", type=int, default=128, help="tokens of prompt and response (default: %(default)s)"
    )
    parser.add_argument("--model-dir", type=Path, default=Path("runs/smollm2"), help="where the model is kept")
    parser.add_argument("--runs-dir", type=Path, help="where finished runs are kept (default: under runs/)")
    parser.add_argument("--report", action="store_true", help="only tables and figure, of the runs that are finished")
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: experiments/results for a full run)"
    )
    options = parser.parse_args(argv)

    kind = "quick" if options.quick else options.pairs.stem if options.pairs else "embedded"
    runs_dir = options.runs_dir or Path("runs/training_dynamics") / kind
    output = options.output or (RESULTS if kind == "embedded" else runs_dir / "results")
    settings = QUICK if options.quick else FULL
    if options.report:
        write_report(runs_dir, output, settings)
        return 0
    model, pad_token_id, tokenised = _quick_problem() if options.quick else _real_problem(options)
    cached = Splits(*(cache_hidden_states(model, pairs, settings.trained_blocks, pad_token_id) for pairs in tokenised))
    runner = Runner(take_upper_blocks(model, settings.trained_blocks), cached, settings, runs_dir)
    run_all(runner)
    write_report(runs_dir, output, settings)
    print(f"results in {output}")
    return 0


def run_all(runner: Runner) -> None:
    """Choose each loss's learning rate, train with it, then see what happens at higher ones."""
    settings = runner.settings
    first = settings.seeds[0]
    chosen = {
        arm: choose_learning_rate([runner.run(arm, rate, first, tuning=True) for rate in settings.learning_rates])
        for arm in ARMS
    }
    for seed in settings.seeds:
        for arm in ARMS:
            runner.run(arm, chosen[arm], seed)
    for rate in settings.higher_rates:
        for arm in ARMS:
            runner.run(arm, rate, first, tuning=True)


def _real_problem(options: argparse.Namespace) -> tuple[Any, int, tuple[TokenisedPairs, ...]]:
    """The model, its padding token, and the pairs for training, validation and reporting."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dil_kernels.data import load_preference_pairs
    from dil_kernels.data.tokenization import tokenize_dataset
    from dil_kernels.quickstart.embedded import load_embedded_pairs
    from dil_kernels.quickstart.smollm2 import prepare

    model_dir = prepare(options.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()

    def tokenise(dataset: Any) -> TokenisedPairs:
        return list(
            tokenize_dataset(
                dataset.map(_without_default_system_prompt),
                tokenizer,
                max_length=options.max_length,
                max_prompt_length=options.max_length // 2,
                truncation_mode="keep_end",
            )
        )

    if options.pairs is None:
        train, held_out = tokenise(load_embedded_pairs("train")), tokenise(load_embedded_pairs("test"))
        random.Random(SPLIT_SEED).shuffle(train)
    else:
        train = tokenise(load_preference_pairs(options.pairs))
        random.Random(SPLIT_SEED).shuffle(train)
        train, held_out = train[len(train) // 5 :], train[: len(train) // 5]
    validation = train[: len(held_out)]
    return model, tokenizer.pad_token_id, (train[len(held_out) :], validation, held_out)


def _without_default_system_prompt(pair: dict[str, Any]) -> dict[str, Any]:
    """Begin with an empty system message, lest the template put its own, longer than most prompts."""
    messages = pair["prompt"]
    if isinstance(messages, str) or messages[0]["role"] == "system":
        return pair
    return pair | {"prompt": [{"role": "system", "content": ""}, *messages]}


def _quick_problem() -> tuple[Any, int, tuple[TokenisedPairs, ...]]:
    """A random Llama of four blocks; chosen responses draw their tokens from one half of the vocabulary more often."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()
    rng = random.Random(0)

    def response(low_half: float) -> list[int]:
        return [
            rng.randrange(1, 32) if rng.random() < low_half else rng.randrange(32, 64) for _ in range(rng.randint(3, 9))
        ]

    def pairs(count: int) -> TokenisedPairs:
        return [
            {
                "prompt_ids": [rng.randrange(1, 64) for _ in range(rng.randint(2, 6))],
                "chosen_ids": response(0.8),
                "rejected_ids": response(0.2),
            }
            for _ in range(count)
        ]

    return model, 0, (pairs(48), pairs(16), pairs(16))


if __name__ == "__main__":
    raise SystemExit(main())
