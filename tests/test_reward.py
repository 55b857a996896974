"""The two-stage route: the fit of log r by a reward head, the reward function, the second stage in closed form."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from test_batch_composition import FAMILIES, ORIGINAL
from tiny_model import make_pairs, make_tokenizer
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)

from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.losses import divergence_names, get_divergence
from dil_kernels.losses.tabular import tabular_policy
from dil_kernels.models.reward import DensityRatioReward, RewardTrainer, density_ratio_reward_loss, train_reward

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_stage_reward.py"
BREGMAN = [name for name in divergence_names() if get_divergence(name).separable and get_divergence(name).bregman]
PI_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
PI_CHOSEN = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def make_reward_model(seed: int = 0, **config: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    options = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_labels": 1, "initializer_range": 0.2, **config}
    return LlamaForSequenceClassification(LlamaConfig(**options))


@pytest.mark.parametrize("loss_type", BREGMAN)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("unpaired", [True, False])
def test_the_true_ratio_is_the_minimum(loss_type: str, alpha: float, unpaired: bool) -> None:
    reference = alpha * PI_CHOSEN + (1 - alpha) * PI_REF  # what chosen and rejected responses together stand for
    scores = (PI_CHOSEN / reference).log().repeat(2).requires_grad_()
    if unpaired:
        is_chosen = torch.tensor([True] * 4 + [False] * 4)
        losses = density_ratio_reward_loss(scores, is_chosen, loss_type=loss_type, alpha=alpha, reduction="none")
        expected = (losses * torch.cat([PI_CHOSEN, PI_REF])).sum()
    else:  # chosen and rejected responses are independent: every pair of them
        w, l = torch.cartesian_prod(torch.arange(4), torch.arange(4, 8)).T
        losses = density_ratio_reward_loss(
            scores[torch.cat([w, l])], loss_type=loss_type, alpha=alpha, reduction="none"
        )
        expected = (losses * PI_CHOSEN[w] * PI_REF[l - 4]).sum()
    (grad,) = torch.autograd.grad(expected, scores)
    assert grad[:4].abs().max() > 1e-3
    torch.testing.assert_close(grad[:4] + grad[4:], torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_the_closed_form() -> None:
    policy, log_Z = tabular_policy(PI_REF, (PI_CHOSEN / PI_REF).log())
    torch.testing.assert_close(policy, PI_CHOSEN)
    torch.testing.assert_close(log_Z, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15)
    batch = torch.stack([PI_REF, torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)])
    reward = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, log_Z = tabular_policy(batch, reward, beta=0.5)
    expected = batch * (2 * reward).exp()
    torch.testing.assert_close(log_Z, expected.sum(1).log())
    torch.testing.assert_close(policy, expected / expected.sum(1, keepdim=True))
    for arguments, problem in (
        ((PI_REF, reward), "log_ratios must be"),
        ((2 * PI_REF, reward[0]), "must be distributions"),
    ):
        with pytest.raises(ValueError, match=problem):
            tabular_policy(*arguments)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        tabular_policy(PI_REF, reward[0], beta=0.0)
    with pytest.raises(TypeError, match=r"ref_probs must be floating-point, got torch.int64"):
        tabular_policy(torch.tensor([0, 1]), torch.zeros(2))
    with pytest.raises(TypeError, match=r"log_ratios must be floating-point, got torch.int64"):
        tabular_policy(torch.tensor([0.0, 1.0]), torch.zeros(2).long())


def test_a_table_with_responses_that_the_reference_never_gives() -> None:
    ref = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0]])
    for dtype in (torch.float32, torch.float64):
        log_ratios = torch.tensor([[math.inf, 0.0, 0.0], [0.0, -math.inf, 1e300]], dtype=torch.float64).to(dtype)
        policy, log_Z = tabular_policy(ref, log_ratios)
        assert policy.dtype == log_Z.dtype == ref.dtype
        torch.testing.assert_close(policy, torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]))
        torch.testing.assert_close(log_Z, torch.tensor([0.0, math.log(0.5)]))
    assert tabular_policy(ref, torch.tensor([math.nan, 0.0, 0.0]).expand(2, 3))[0].isnan().all()


def test_scores_do_not_depend_on_the_batch() -> None:
    model, tokenizer = make_reward_model(), make_tokenizer()
    pairs = make_pairs(5).to_list()
    prompts, completions = [pair["prompt"] for pair in pairs], [pair["chosen"] for pair in pairs]
    reward = DensityRatioReward(model, tokenizer, batch_size=3, max_length=12)
    scores = reward(prompts=prompts, completions=completions, other_column=[1] * 5)
    assert model.training
    assert len(set(scores)) == 5
    assert all(isinstance(score, float) for score in scores)
    model.eval()
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        response = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        prompt_ids = tokenizer(prompt)["input_ids"]
        if len(prompt_ids) + len(response) > 12:
            prompt_ids = prompt_ids[-6:]
            response = response[: 12 - len(prompt_ids)]
        alone = model(input_ids=torch.tensor([prompt_ids + response])).logits
        assert score == pytest.approx(alone.item(), rel=1e-5, abs=1e-6)


def test_conversations_go_through_the_chat_template() -> None:
    model, tokenizer = make_reward_model(), make_tokenizer()
    prompt = [{"role": "user", "content": "w1 w2"}]
    completion = [{"role": "assistant", "content": "w3"}]
    (score,) = DensityRatioReward(model, tokenizer)([prompt], [completion])
    text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    model.eval()
    expected = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.item()
    assert score == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("unpaired", "tokenised"), [(True, False), (True, True), (False, False)])
def test_training_raises_chosen_over_rejected(tmp_path: Path, unpaired: bool, tokenised: bool) -> None:
    pairs = make_pairs(12).to_list()
    rows = pairs
    if unpaired:
        sides = (("chosen", True), ("rejected", False))
        rows = [{"prompt": pair["prompt"], "completion": pair[k], "label": v} for pair in pairs for k, v in sides]
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=8, per_device_train_batch_size=6, learning_rate=3e-3, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    if tokenised:
        lengths: dict[str, Any] = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}
        data = tokenize_dataset(data, make_tokenizer(), **lengths)
    reward = train_reward(make_reward_model(), make_tokenizer(), data, args, loss_type="brier", alpha=0.25)
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (reward(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    assert sum(w > l for w, l in zip(chosen, rejected, strict=True)) >= 11


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must have one output \(num_labels=1\), got 2"):
        DensityRatioReward(make_reward_model(num_labels=2), make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a padding token"):
        DensityRatioReward(make_reward_model(), tokenizer)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        DensityRatioReward(make_reward_model(), make_tokenizer(), max_length=1)
    with pytest.raises(ValueError, match="completions must be 2 as prompts, got 1"):
        DensityRatioReward(make_reward_model(), make_tokenizer())(["w1", "w2"], ["w3"])
    with pytest.raises(ValueError, match=r"scores must be \[2B\], chosen then rejected, got \[3\]"):
        density_ratio_reward_loss(torch.zeros(3))


def test_the_example_recovers_pi_chosen(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("two_stage_reward", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr("sys.argv", ["two_stage_reward.py", "--steps", "100"])
    example.main()
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert float(last.split()[-1]) < 0.05  # the total variation to pi_ref is 0.4


def score_of_eos(model: Any, tokenizer: Any, prompt: str, completion: str) -> float:
    ids = [*tokenizer(prompt)["input_ids"], *tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        hidden_states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden_states[0, -1]).item()


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_the_score_is_that_of_eos_where_padding_is_eos_too(architecture: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = make_reward_model()
    if architecture == "GPT2":
        config = GPT2Config(vocab_size=288, n_embd=32, n_layer=2, n_head=4, num_labels=1, initializer_range=0.2)
        model = GPT2ForSequenceClassification(config)
    model.eval()
    pairs = [("w1 w2", "w7 w1 w2", "w2"), ("w3", "w8", "w9 w9"), ("w4 w5 w6", "w9 w1", "w8 w7 w6 w5")]
    prompts, *sides = (list(column) for column in zip(*pairs, strict=True))
    chosen, rejected = ([score_of_eos(model, tokenizer, *xy) for xy in zip(prompts, ys, strict=True)] for ys in sides)
    assert DensityRatioReward(model, tokenizer)(prompts, sides[0]) == pytest.approx(chosen, rel=1e-5, abs=1e-6)

    columns = dict(zip(("prompt", "chosen", "rejected"), (prompts, *sides), strict=True))
    lengths = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}
    rows = tokenize_dataset(datasets.Dataset.from_dict(columns), tokenizer, **lengths)
    batch = PreferenceCollator(tokenizer.pad_token_id)(list(rows))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    loss = RewardTrainer(model=model, args=args, loss_options={"loss_type": "ukl"}).compute_loss(model, batch)
    expected = sum(math.exp(u_l) - u_w for u_w, u_l in zip(chosen, rejected, strict=True)) / len(pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["llama dynamic", "llama longrope"])
def test_the_score_is_the_same_beside_and_after_long_responses(name: str) -> None:
    def make_model() -> LlamaForSequenceClassification:
        return make_reward_model(**FAMILIES[name], head_dim=8).eval()

    tokenizer, prompt = make_tokenizer(), "w1 w2 "
    completions = [" ".join(f"w{n % 99}" for n in range(count)) for count in (60, 4, ORIGINAL, 2)]
    alone = [score_of_eos(make_model(), tokenizer, prompt, completion) for completion in completions]
    beside, after = (DensityRatioReward(make_model(), tokenizer, batch_size=size) for size in (4, 1))
    assert beside([prompt] * 4, completions) == pytest.approx(alone, rel=1e-4)
    assert after([prompt] * 4, completions) == pytest.approx(alone, rel=1e-4)


def test_a_row_whose_end_cannot_be_told_is_refused() -> None:
    tokenizer = make_tokenizer()
    model = make_reward_model(pad_token_id=tokenizer.eos_token_id)
    model.head = model.score
    del model.score
    object.__setattr__(model, "score", lambda hidden_states: model.head(hidden_states))  # under another name
    with pytest.raises(ValueError, match=rf"other than config.pad_token_id={tokenizer.eos_token_id}, which is not"):
        DensityRatioReward(model, tokenizer)(["w1"], ["w2 w3"])


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_mode(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_reward_model().train()
    model.model.layers[0].eval()  # a frozen part, say
    modes = {name: module.training for name, module in model.named_modules()}
    reward = DensityRatioReward(model, make_tokenizer())
    if fails:
        monkeypatch.setattr(model.model, "forward", None)
        with pytest.raises(TypeError):
            reward(["w1"], ["w2"])
    else:
        reward(["w1"], ["w2"])
    assert {name: module.training for name, module in model.named_modules()} == modes
