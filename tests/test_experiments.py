from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from csv_rows import read_csv

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import stability, tabular_consistency, training_dynamics
from experiments.dynamics_runs import ARMS, metrics
from experiments.tabular_problem import DIVERGENCES, Loss, make_table, sample, solve, total_variation
from experiments.upper_blocks import all_pair_logps, cache_hidden_states, take_upper_blocks

EXACT = 1e-6  # total variation
SOLVED = (*DIVERGENCES, "dpo")


@pytest.fixture(scope="module")
def tabular(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabular")
    assert tabular_consistency.main(["--quick", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def population(tabular):
    rows = read_csv(tabular / "tabular_consistency.csv")
    assert {row["loss"] for row in rows} == set(SOLVED)
    return rows


def test_every_divergence_recovers_the_chosen_distribution_where_rejected_samples_come_from_the_reference(population):
    rows = [row for row in population if row["setup"] == "y_l from pi_ref" and row["beta"] in ("", "1")]
    assert len(rows) == 2 * 2 * len(SOLVED)  # routes, seeds
    for row in rows:
        assert float(row["tv_to_chosen"]) < EXACT, row
    for row in rows:
        if row["beta"] == "":
            assert abs(float(row["normaliser"]) - 1) < EXACT, row


def test_dpo_recovers_another_distribution_unless_beta_is_1(population):
    rows = [row for row in population if row["beta"] not in ("", "1")]
    assert {row["beta"] for row in rows} == {"0.1", "0.5", "2"}
    for row in rows:
        assert float(row["tv_to_formula"]) < EXACT, row
        assert float(row["tv_to_chosen"]) > 0.02, row


def test_rejected_samples_bias_every_divergence_unless_half_of_the_reference_term_is_chosen(population):
    rows = [row for row in population if row["setup"] == "y_l rejected" and row["loss"] in DIVERGENCES]
    for row in rows:
        if row["alpha"] == "0.5":
            assert float(row["tv_to_chosen"]) < EXACT, row
        else:
            assert float(row["tv_to_chosen"]) > 0.01, row
    bias = {
        row["loss"]: float(row["tv_to_chosen"])
        for row in rows
        if (row["alpha"], row["route"], row["seed"]) == ("0", "one-stage", "0")
    }
    assert bias["bce"] < bias["ukl"] < bias["lsif"]


def test_two_stages_agree_with_one_only_where_the_ratio_is_normalised(population):
    biased = [row for row in population if row["alpha"] == "0" and row["setup"] == "y_l rejected"]
    for row in biased:
        if row["route"] == "two-stage":
            assert float(row["tv_to_formula"]) < EXACT, row
            assert float(row["normaliser"]) > 1.05, row
        else:
            assert float(row["tv_to_formula"]) > 1e-3, row


def test_the_links_of_pairs_fit_the_ratio_of_the_data_by_their_own_score(tabular):
    rows = read_csv(tabular / "tabular_links.csv")
    assert len(rows) == 2 * 2 * 2 * len(DIVERGENCES)  # set-ups, links, betas
    onto = ("ukl", "is", "bce")  # A reaches far enough on both sides for every policy of these tables
    for row in rows:
        if row["link"] == "ratio" or row["loss"] in onto:
            assert float(row["residual"]) < EXACT, row
        recovers = row["setup"] == "y_l from pi_ref" and row["beta"] == "1"
        recovers &= row["link"] == "ratio" or row["loss"] == "ukl"
        assert (float(row["tv_mean"]) < EXACT) == recovers, row


def test_the_solver_ends_in_a_minimum_of_the_loss_as_written_in_the_paper():
    table = make_table(3, prompts=4, responses=5)
    policy = solve(Loss("lsif"), table.chosen, table.rejected, table.reference).policy

    def lsif(pi):
        r = pi / table.reference
        return (-table.chosen * r + table.rejected * r**2 / 2).sum(1)

    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.3):
        for _ in range(50):
            noise = torch.randn(policy.shape, generator=generator, dtype=policy.dtype)
            other = (policy.log() + size * noise).softmax(-1)
            assert (lsif(other) >= lsif(policy)).all()
    assert (lsif(policy) < lsif(table.chosen) - 1e-3).all()


def test_the_error_of_fits_to_samples_falls_with_the_root_of_their_number(tabular):
    rows = read_csv(tabular / "tabular_consistency_sampled.csv")
    for name in SOLVED:
        of_loss = [row for row in rows if row["loss"] == name]
        assert of_loss
        error = {
            samples: sum(float(row["tv_to_chosen"]) for row in of_loss if row["samples"] == samples)
            for samples in ("1000", "100000")
        }
        assert 5 < error["1000"] / error["100000"] < 20, name


def test_samples_are_frequencies_of_their_distribution():
    distribution = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    drawn = sample(distribution, 200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.sum(1), torch.ones(2, dtype=torch.float64))
    assert (total_variation(drawn, distribution) < 0.005).all()


@pytest.fixture(scope="module")
def stability_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stability")
    assert stability.main(["--quick", "--output", str(folder)]) == 0
    assert (folder / "stability.png").stat().st_size > 10_000
    return read_csv(folder / "stability.csv")


def diverged(rows, loss, reduction, bound, tokens, learning_rate):
    (row,) = (
        row
        for row in rows
        if (row["loss"], row["reduction"], row["bound"]) == (loss, reduction, bound)
        and (row["tokens"], row["learning_rate"]) == (tokens, learning_rate)
    )
    return (int(row["non_finite"]) + int(row["unlearned"])) / int(row["runs"])


def test_lsif_on_sums_and_dpo_on_means_diverge_at_a_rate_that_averaged_lsif_survives(stability_rows):
    assert diverged(stability_rows, "lsif", "sum", "none", "512", "1") == 1
    assert diverged(stability_rows, "lsif", "mean", "none", "512", "1") == 0
    assert diverged(stability_rows, "dpo, beta 0.1", "mean", "none", "512", "1") == 1


def test_nothing_diverges_at_a_low_rate_and_the_chosen_responses_become_likelier(stability_rows):
    low = [row for row in stability_rows if row["learning_rate"] == "0.003" and row["tokens"] == "512"]
    assert len(low) == len(list(stability.arms()))
    for row in low:
        assert row["non_finite"] == row["unlearned"] == "0", row
    averaged = [float(row["chosen_logp_change_of_others"]) for row in low if row["reduction"] == "mean"]
    assert min(averaged) > 0


def test_a_training_loss_that_is_not_finite_is_counted_as_such():
    settings = stability.Settings(seeds=1, steps=3, lengths=(400,), learning_rates=(0.001, 3.0))
    data = stability.make_data(1, 3 * stability.BATCH_SIZE, 400)
    finite, _, _ = stability.train(data, settings, stability.Arm("is", "sum", "none"))
    assert finite.tolist() == [[True], [False]]


def test_bigram_counts_are_those_of_sequences_of_the_model():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(stability.VOCABULARY, stability.VOCABULARY, generator=generator)
    counts = stability.bigram_counts(logits, 40, 2000, generator)
    assert (counts.sum((1, 2)) == 2000).all()
    observed = counts.sum(0) / counts.sum((0, 2))[:, None]
    assert (0.5 * (observed - logits.softmax(-1)).abs().sum(1) < 0.05).all()
    # What is left with each token was arrived at as often, but for the two ends.
    assert ((counts.sum(1) - counts.sum(2)).abs() <= 1).all()


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamics")
    arguments = ["--quick", "--runs-dir", str(folder / "runs"), "--output", str(folder / "results")]
    assert training_dynamics.main(arguments) == 0
    return folder, arguments


def test_the_margin_grows_under_every_loss_from_the_same_gradient(dynamics):
    folder, _ = dynamics
    summary = read_csv(folder / "results" / "training_dynamics_summary.csv")
    assert [row["arm"] for row in summary] == [arm.name for arm in ARMS]
    for row in summary:
        assert float(row["margin"]) > 0, row
        assert float(row["margin"]) == pytest.approx(
            float(row["chosen_logratio"]) - float(row["rejected_logratio"]), abs=1e-5
        )
    norms = {row["arm"]: float(row["initial_gradient_norm"]) for row in _tuning(folder)}
    # |dL/du| at u = 0, of chosen and of rejected: the averaged losses start along one direction.
    coefficients = {"lsif": 1, "ukl": 1, "bce": 1 / 2, "lsif, alpha 1/2": 1 / 2, "bce, alpha 1/2": 1 / 4}
    for arm, coefficient in {**coefficients, "dpo, beta 1": 1 / 2}.items():
        assert norms[arm] == pytest.approx(coefficient * norms["lsif"], rel=1e-4), arm


def _tuning(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "results" / "training_dynamics_tuning.csv")


def test_every_loss_has_as_many_trials_and_is_reported_at_its_best_learning_rate(dynamics):
    folder, _ = dynamics
    summary = {row["arm"]: row for row in read_csv(folder / "results" / "training_dynamics_summary.csv")}
    for arm in ARMS:
        trials = [row for row in _tuning(folder) if row["arm"] == arm.name]
        accuracies = {float(row["learning_rate"]): float(row["validation_likelihood_accuracy"]) for row in trials}
        assert list(accuracies) == [1e-3, 4e-3, 1e-2]
        del accuracies[1e-2]  # is only shown
        best = [rate for rate, accuracy in accuracies.items() if accuracy == max(accuracies.values())]
        assert float(summary[arm.name]["learning_rate"]) == min(best)
        assert summary[arm.name]["seeds"] == "2"


def test_a_finished_run_is_not_repeated_and_a_lost_one_comes_out_the_same(dynamics):
    folder, arguments = dynamics
    before = (folder / "results" / "training_dynamics.csv").read_text()
    runs = sorted((folder / "runs").glob("run_*.json"))
    runs[0].unlink()
    times = [path.stat().st_mtime_ns for path in runs[1:]]
    assert training_dynamics.main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in runs[1:]] == times
    assert (folder / "results" / "training_dynamics.csv").read_text() == before


def test_runs_with_other_settings_are_refused(dynamics):
    folder, arguments = dynamics
    settings = folder / "runs" / "settings.json"
    kept = settings.read_text()
    settings.write_text(kept.replace('"steps": 12', '"steps": 13'))
    with pytest.raises(ValueError, match="other settings"):
        training_dynamics.main(arguments)
    settings.write_text(kept)


@pytest.mark.parametrize("trained_blocks", [1, 4])
def test_upper_blocks_on_cached_states_score_as_the_whole_model_does(trained_blocks):
    model, pad_token_id, (pairs, _, _) = training_dynamics._quick_problem()
    upper = take_upper_blocks(model, trained_blocks)
    logps = all_pair_logps(upper, cache_hidden_states(model, pairs[:6], trained_blocks, pad_token_id), batch_size=4)
    model.double()
    for index, pair in enumerate(pairs[:6]):
        for side, response in enumerate((pair["chosen_ids"], pair["rejected_ids"])):
            ids = torch.tensor([pair["prompt_ids"] + response])
            token_logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            expected = token_logps[-len(response) :].sum().item()
            assert logps[side, index].item() == pytest.approx(expected, rel=1e-5)


def test_upper_blocks_leave_embedding_and_head_frozen():
    model, _, _ = training_dynamics._quick_problem()
    trained = {name for name, value in take_upper_blocks(model, 2).named_parameters() if value.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"layers", "norm"}
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"0", "1"}


def test_metrics_of_two_pairs_by_hand():
    logps = torch.tensor([[-4.0, -6.0], [-2.0, -9.0]])
    ref_logps = torch.tensor([[-6.0, -6.0], [-2.0, -6.0]])
    lengths = torch.tensor([[2, 3], [1, 3]])
    values = metrics(logps.double(), ref_logps.double(), lengths)
    assert values == pytest.approx(
        {
            "chosen_logp": -2.0,
            "rejected_logp": -2.5,
            "chosen_logratio": 0.5,
            "rejected_logratio": -0.5,
            "margin": 1.0,
            "reward_accuracy": 1.0,
            "likelihood_accuracy": 0.5,
        }
    )
