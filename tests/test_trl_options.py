"""The options of DILTrainer on TRL's DPOTrainer: which of TRL's are refused, and how launchers give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl_runs import make_trainer, trl

from dil_kernels.integrations.trl import DILConfig
from dil_kernels.integrations.trl_config import UNUSED_OPTIONS

OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
    "use_weighting": True,
    "ld_alpha": 0.5,
    "loss_weights": [2.0],
    "discopop_tau": 0.1,
}


@pytest.mark.parametrize("name", UNUSED_OPTIONS)
def test_an_option_of_trl_that_no_loss_uses_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        DILConfig(str(tmp_path), bf16=False, use_cpu=True, **{name: OTHER_VALUES[name]})


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"power": 0.1}, "power=0.1 was given, but loss_type='lsif' has no power"),
        ({"loss_type": "dpo", "alpha": 0.5}, "not separable"),
        ({"loss_type": "kl"}, "unknown loss_type 'kl'; available: lsif"),
        ({"loss_type": "aot"}, "loss_type='aot' of TRL sorts log ratios over a batch"),
        ({"loss_type": "sigmoid_norm"}, "is here loss_type='dpo' with average_log_prob=True"),
        ({"loss_type": None}, "loss_type must be one loss, got None"),
        ({"loss_type": "hinge"}, "loss_type='hinge' is taken of summed log ratios by TRL: give average_log_prob=False"),
        (
            {"f_divergence_type": "forward_kl"},
            "sigmoid loss with it is loss_type='is', link='f_dpo', with average_log_prob=False",
        ),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 was given, but loss_type='lsif' has no label_smoothing"),
        ({"loss_type": "sigmoid"}, "loss_type='dpo' with average_log_prob=False"),
        ({"loss_type": "nca_pair"}, "loss_type='bce', alpha=0.5 and TRL's beta=0.1 with average_log_prob=False"),
        ({"loss_type": "bco_pair"}, "loss_type='bce' and TRL's beta=0.1 with average_log_prob=False"),
        ({"loss_type": ["lsif", "bce"]}, "one loss"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DILConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


@pytest.mark.parametrize("name", ["average_log_prob", "fused_head", "prefix_sharing"])
@pytest.mark.parametrize("value", [0, "no"])
def test_what_is_true_or_false_is_so(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be true or false, got {value!r}"):
        DILConfig(str(tmp_path), bf16=False, use_cpu=True, **{name: value})


@pytest.mark.parametrize("options", [{"bf16_full_eval": True}, {"include_for_metrics": ["inputs"]}])
def test_evaluation_changes_no_weights_and_loses_no_responses(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DILConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_the_options_of_a_launcher_are_taken_over(tmp_path: Path) -> None:
    theirs = trl.DPOConfig(str(tmp_path), beta=0.3, max_length=77, bf16=False, use_cpu=True, seed=5)
    config = DILConfig.from_dpo_config(theirs, loss_type="dpo", beta=0.2, average_log_prob=False)
    assert (config.loss_type, config.beta, config.average_log_prob) == (["dpo"], 0.2, False)
    assert (config.max_length, config.seed, config.device) == (77, 5, theirs.device)
    assert (theirs.loss_type, theirs.beta) == (["sigmoid"], 0.3)
    with pytest.raises(TypeError, match="max_length"):
        DILConfig.from_dpo_config(theirs, max_length=5)
    with pytest.raises(ValueError, match=r"power=0.2 was given, but loss_type='lsif' has no power"):
        DILConfig.from_dpo_config(theirs, power=0.2)
    assert config.label_smoothing == 0.0
    theirs.label_smoothing = 0.1
    assert DILConfig.from_dpo_config(theirs, loss_type="dpo").label_smoothing == 0.1
    with pytest.raises(ValueError, match=r"label_smoothing=0.1 was given, but loss_type='lsif' has no label_smoothing"):
        DILConfig.from_dpo_config(theirs)
    theirs.label_smoothing = 0.0
    assert DILConfig.from_dpo_config(theirs).label_smoothing is None
    theirs.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1"):
        DILConfig.from_dpo_config(theirs)


def test_arguments_of_dpo_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got DPOConfig"):
        make_trainer(tmp_path, config_class=trl.DPOConfig)


def test_the_command_line_of_trl_takes_the_options(tmp_path: Path) -> None:
    parser = trl.TrlParser((DILConfig,))
    line = ["--output_dir", str(tmp_path), "--loss_type", "dpo", "--beta", "0.3", "--average_log_prob", "False"]
    (args,) = parser.parse_args_and_config([*line, "--bf16", "False", "--use_cpu", "True"])
    assert (args.loss_type, args.beta, args.average_log_prob, args.alpha) == (["dpo"], 0.3, False, 0.0)
