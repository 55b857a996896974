"""The two-stage route of DIL on a model small enough for a minute on a CPU.

    python examples/two_stage_reward.py

Stage 1 fits log r on a reward head from preference pairs (eq. 21). Stage 2 needs a policy optimiser; any that takes a
reward function does, with a KL weight of 1, for instance TRL's:

    GRPOTrainer(model, reward_funcs=reward, args=GRPOConfig(beta=1.0, ...), train_dataset=prompts)

Here, where the responses can be listed, the closed form (eq. 22) stands in for it.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainingArguments

from dil_kernels.losses.tabular import tabular_policy
from dil_kernels.models.reward import DensityRatioReward, train_reward

RESPONSES = ["red", "green", "blue", "grey"]
PI_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PI_CHOSEN = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "colour?", *RESPONSES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def sample_pairs(count: int, seed: int = 0) -> Dataset:
    """Chosen responses from pi_chosen; in the place of rejected ones, samples of the reference."""
    rng = random.Random(seed)
    chosen = rng.choices(RESPONSES, PI_CHOSEN.tolist(), k=count)
    sampled = rng.choices(RESPONSES, PI_REF.tolist(), k=count)
    return Dataset.from_list(
        [{"prompt": "colour? ", "chosen": w, "rejected": l} for w, l in zip(chosen, sampled, strict=True)]
    )


def fit(loss_type: str, steps: int, seed: int = 0) -> DensityRatioReward:
    """Stage 1."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    with tempfile.TemporaryDirectory() as output_dir:
        args = TrainingArguments(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=256,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        return train_reward(
            LlamaForSequenceClassification(config), tokenizer, sample_pairs(8192, seed), args, loss_type=loss_type
        )


def main() -> None:
    """Print the ratio of both stages beside the truth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss-type", default="bce")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    reward = fit(options.loss_type, options.steps)
    log_ratios = torch.tensor(reward(["colour? "] * len(RESPONSES), RESPONSES), dtype=torch.float64)
    policy, log_Z = tabular_policy(PI_REF, log_ratios)
    print(f"{'response':>10}{'pi_ref':>9}{'r fitted':>10}{'r true':>9}{'pi':>9}{'pi_chosen':>11}")
    columns = (PI_REF, log_ratios.exp(), PI_CHOSEN / PI_REF, policy, PI_CHOSEN)
    for response, *values in zip(RESPONSES, *(column.tolist() for column in columns), strict=True):
        print(f"{response:>10}{values[0]:9.3f}{values[1]:10.3f}{values[2]:9.3f}{values[3]:9.3f}{values[4]:11.3f}")
    print(f"Z = {log_Z.exp():.3f}; total variation to pi_chosen {(policy - PI_CHOSEN).abs().sum() / 2:.3f}")


if __name__ == "__main__":
    main()
