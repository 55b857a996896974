"""What the adapters to other trainers are made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapter_case import OPTIONS, Case, make_case
from test_batch_composition import make_family

from dil_kernels import fused_dil_loss
from dil_kernels.integrations.hooks import Hook, HookOptions, check_trainer, refuse
from dil_kernels.models.fused_head import UnsupportedHeadError


@pytest.fixture
def case() -> Case:
    return make_case()


def test_options_are_checked() -> None:
    assert HookOptions.of(None, "dil") == HookOptions()
    for values, message in (
        ({"los_type": "lsif"}, "unknown option 'los_type' in dil; available: loss_type, "),
        ({"loss_type": "lsiff"}, "unknown loss_type 'lsiff'"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\]"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"stash_bytes": -1}, "stash_bytes must be >= 0, got -1"),
        ({"stash_bytes": 8, "fused_head": False}, "stash_bytes=8 was given, but fused_head=False keeps none"),
        ("lsif", "dil must map the names of options to their values, got 'lsif'"),
    ):
        with pytest.raises(ValueError, match=message):
            HookOptions.of(values, "dil")
    for name in ("average_log_prob", "fused_head", "padding_free"):
        with pytest.raises(TypeError, match=f"{name} must be true or false, got 'no'"):
            HookOptions.of({name: "no"}, "dil")
    for value in (True, "1", 1.5):
        with pytest.raises(TypeError, match=f"stash_bytes must be an integer, got {value!r}"):
            HookOptions.of({"stash_bytes": value}, "dil")
    with pytest.raises(TypeError, match="alpha must be a number"):
        HookOptions.of({"alpha": "0.5"}, "dil")
    assert str(HookOptions(loss_type="bce", beta=0.1, average_log_prob=False)) == (
        "bce (beta=0.1) of log ratios summed over tokens"
    )


def test_a_trainer_is_known_by_its_functions(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_ins"))

    def hooked(batch: int, model: int) -> None: ...

    assert check_trainer("openrlhf", ("0.11.2",), {hooked: ("batch", "model")}) == "openrlhf 0.11.2"
    assert not caplog.records
    check_trainer("openrlhf", ("0.12.0",), {})
    assert "openrlhf 0.11.2 is not among the versions that this adapter knows: 0.12.0" in caplog.text
    with pytest.raises(ImportError, match=r"openrlhf 0.11.2 has \S*hooked\(batch, model\), but .* 0.11.2: \(model\)"):
        check_trainer("openrlhf", ("0.11.2",), {hooked: ("model",)})


def test_options_without_effect_are_refused() -> None:
    given = {"beta": 0.3, "alpha": 1}
    refuse(given, {"gamma": 2}, "leave it out")
    for values in (given, SimpleNamespace(**given)):
        with pytest.raises(ValueError, match=r"beta=0.3 was given, but the loss of dil_kernels does not use it; leave"):
            refuse(values, {"alpha": 1, "beta": 0.1}, "leave it out")


def test_a_loss_of_sums(case: Case) -> None:
    options = {"loss_type": "bce", "nll_weight": 2.0, "average_log_prob": False}
    hook = Hook("X 1", HookOptions(**options))
    hook.install(case.policy, case.ref)
    inputs = {"input_ids": case.ids, "attention_mask": case.mask}
    policy, ref = (hook.score(model, inputs, case.labels) for model in (case.policy, case.ref))
    losses, *_ = hook.losses(*policy.logps.chunk(2), *ref.logps.chunk(2), *policy.lengths.chunk(2))
    case.assert_is(losses.mean(), options)


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("fused_head", [False, True])
def test_the_loss_is_the_fused_one(
    case: Case, fused_head: bool, padding_free: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = Hook("X 1", HookOptions(**OPTIONS, fused_head=fused_head, padding_free=padding_free))
    hook.install(case.policy, case.ref)
    how = "the fused head" if fused_head else "logits, since fused_head=False was given"
    assert capsys.readouterr().out == (
        "dil_kernels in X 1: loss ukl (alpha=0.5, nll_weight=2.0) of log ratios averaged over tokens, "
        f"log-probs from {how}{', without padding' if padding_free else ''}\n"
    )
    inputs = {name: value for name, value in case.batch.items() if name != "labels"}
    policy = hook.score(case.policy, inputs, case.labels, return_mean_logits=True)
    ref = hook.score(case.ref, inputs, case.labels)
    sides = (*policy.logps.chunk(2), *ref.logps.chunk(2))
    losses, chosen_rewards, _ = hook.losses(*sides, *policy.lengths.chunk(2))
    logits, ref_logits = case.logits()
    truth = fused_dil_loss(logits, case.labels, ref_logits=ref_logits, **OPTIONS)
    torch.testing.assert_close(losses, truth.losses * 3 / 2)
    torch.testing.assert_close(chosen_rewards[:2].float(), truth.chosen_rewards[:2])
    scored = case.labels[:, 1:] != -100
    means = (logits.mean(-1)[:, :-1] * scored).sum(1) / scored.sum(1).clamp(min=1)
    torch.testing.assert_close(policy.mean_logits.float(), means.detach(), rtol=1e-4, atol=1e-5)
    assert ref.mean_logits is None
    case.assert_is(losses.mean(), OPTIONS)


def test_a_pair_without_a_token_has_no_gradient(case: Case) -> None:
    hook = Hook("X 1", HookOptions(loss_type="lsif", average_log_prob=False))
    logps = torch.zeros(2, 3, dtype=torch.float64)
    logps[0, 2] = 1e4  # its exponential is infinite
    logps.requires_grad_()
    losses, *_ = hook.losses(*logps, *torch.zeros(2, 3), torch.tensor([4, 4, 4]), torch.tensor([4, 4, 0]))
    losses.mean().backward()
    assert losses.tolist() == [-0.75, -0.75, 0.0]
    assert logps.grad is not None
    assert logps.grad[:, 2].tolist() == [0.0, 0.0]
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("rows", [3, 1])
def test_responses_that_are_no_pairs_are_refused(rows: int) -> None:
    """As in the loop of docs/trainers.md, where a batch has an odd number of rows."""
    logps, lengths = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.int64)
    sides = [*logps.chunk(2), torch.zeros(1)][:2] * 2
    lengths_of = [*lengths.chunk(2), torch.ones(2, dtype=torch.int64)][:2]
    for of_hook in (Hook("X 1", HookOptions()).losses, Hook("X 1", HookOptions()).pair_losses):
        with pytest.raises(
            ValueError, match=r"^log-probs and lengths must be \[B\] of chosen and of rejected responses"
        ):
            of_hook(*sides, *lengths_of)


@pytest.mark.parametrize("name", ["llama dynamic", "phi3 longrope"])
def test_a_response_is_scored_alike_beside_long_ones(name: str) -> None:
    model = make_family(name)
    Hook("X 1", HookOptions()).install(model, None)
    ids = torch.randint(2, 160, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    hook = Hook("X 1", HookOptions())
    beside = hook.score(model, {"input_ids": ids, "attention_mask": mask}, labels).logps[1]
    alone = {"input_ids": ids[1:, :8], "attention_mask": mask[1:, :8]}
    torch.testing.assert_close(beside, hook.score(model, alone, labels[1:, :8]).logps[0])


def test_a_model_without_its_weights_is_refused_where_lengths_matter() -> None:
    """As in processes that get them from the first one."""
    with torch.device("meta"):
        models = [make_family(name) for name in ("llama", "llama dynamic")]
    Hook("X 1", HookOptions()).install(models[0])
    with pytest.raises(NotImplementedError, match="is on the meta device, so that it could not be checked"):
        Hook("X 1", HookOptions()).install(models[1])


def test_a_model_without_a_fused_head(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.ref.lm_head.forward = lambda x: x
    Hook("X 1", HookOptions()).install(case.policy, case.ref)
    assert "log-probs from logits, since LlamaForCausalLM: the forward of its output" in capsys.readouterr().out
    assert not hasattr(case.policy, "_fused_head")
    with pytest.raises(UnsupportedHeadError, match="fused_head=True was given, but LlamaForCausalLM"):
        Hook("X 1", HookOptions(fused_head=True)).install(case.policy, case.ref)


def test_rows_without_padding_hold_text_only(case: Case) -> None:
    hook = Hook("X 1", HookOptions(padding_free=True))
    hook.install(case.policy)
    inputs = {"input_ids": case.ids, "attention_mask": case.mask, "pixel_values": torch.zeros(1)}
    with pytest.raises(NotImplementedError, match="takes batches of text only, but this one has pixel_values"):
        hook.score(case.policy, inputs, case.labels)
    for mask, found in ((None, "none"), (case.mask[:, None, None], r"\[6, 1, 1, 9\]")):
        inputs = {"input_ids": case.ids, **({} if mask is None else {"attention_mask": mask})}
        with pytest.raises(ValueError, match=rf"needs an attention_mask \[6, 9\] as the labels, got {found}"):
            hook.score(case.policy, inputs, case.labels)
