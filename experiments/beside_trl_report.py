"""Tables and figures of the experiment beside TRL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.comparisons import at_equal_margins, differences, same_loss
from experiments.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    finish_panel,
    new_figure,
    save,
)
from experiments.forced_choice import is_right
from experiments.tables import mean_and_sd, write_csv

LOOKS = {  # of an arm: its name and colour in figures
    "trl dpo": ("TRL: DPO", VERMILLION),
    "dil dpo": ("DILTrainer: DPO", GREEN),
    "dil lsif": ("DILTrainer: LSIF", BLUE),
    "dil bce": ("DILTrainer: BCE", PURPLE),
    "dil bce, alpha 1/2": ("DILTrainer: BCE, alpha 1/2", ORANGE),
    "dil ukl": ("DILTrainer: UKL", SKY),
}
PANELS = (
    ("margin", "Held-out margin", "log ratio a token, chosen - rejected"),
    ("chosen_logp", "Chosen responses", "log-prob a token, nats"),
    ("rejected_logp", "Rejected responses", "log-prob a token, nats"),
)
BY_MARGIN = ("Chosen responses by margin", "held-out margin, nats a token", "change of the log-prob a token")
LEARNED = ("accuracy", "response_accuracy", "margin", "chosen_logp_change", "rejected_logp_change")
BASELINE = "dil dpo"
SAME_LOSS = ("trl dpo", "dil dpo, padded")  # but for rounding
COST = ("pairs_at_a_time", "seconds_per_step", "cpu_seconds_per_step", "tokens_per_second", "peak_bytes")
Records = Sequence[Mapping[str, Any]]


def write_report(records: Records, output: Path) -> None:
    """Write the tables and figures of finished runs, and print the summary.

    Args:
        records: of the runs, with their kind, their arm, the arm without a learning rate that is not the chosen one
            (of) and their seed. What a step costs is taken from the runs that were made for that, if there are some of
            every arm; else from the runs themselves, whose memory is that of their evaluations, too.
        output: for timing.csv, tuning.csv, runs.csv, summary.csv, curves.csv, pairs.csv, differences.csv,
            same_loss.csv, equal_margins.csv, items.csv, environment.txt, accuracy.png, curves.png and, where there are
            runs at other learning rates, learning_rates.png.
    """
    timing = [
        {**_key(record), **{name: record[name] for name in COST}} for record in records if record["kind"] == "timing"
    ]
    if timing:
        write_csv(output / "timing.csv", timing)
    costs = {
        arm: {name: median(row[name] for row in timing if row["arm"] == arm) for name in COST}
        for arm in {row["arm"] for row in timing}
    }
    runs = [record for record in records if record["kind"] == "run"]
    if {record["of"] for record in runs} <= costs.keys():
        runs = [{**record, **costs[record["of"]]} for record in runs]
    tuning = [
        {"arm": record["arm"], "learning_rate": record["learning_rate"], **_means(record["validation"])}
        for record in records
        if record["kind"] == "tuning"
    ]
    if tuning:
        write_csv(output / "tuning.csv", tuning)
    rows = [of_run(record) for record in runs]
    write_csv(output / "runs.csv", rows)
    summary = summarise(rows)
    write_csv(output / "summary.csv", summary)
    curves = [{**_key(record), **_means(entry)} for record in runs for entry in record["held_out"]]
    write_csv(output / "curves.csv", curves)
    write_csv(output / "pairs.csv", [row for record in runs for row in _pairs(record)])
    comparisons = {
        "differences": differences(runs, BASELINE),
        "same_loss": same_loss(runs, BASELINE, SAME_LOSS),
        "equal_margins": at_equal_margins(runs, BASELINE),
    }
    for name, compared in comparisons.items():
        if compared:
            write_csv(output / f"{name}.csv", compared)
    items = _items(records)
    if items:
        write_csv(output / "items.csv", items)
    (output / "environment.txt").write_text(runs[0]["environment"].rstrip() + "\n")
    at_chosen = [record for record in runs if record["arm"] == record["of"] and record["of"] in LOOKS]
    if at_chosen:
        _draw_accuracy(at_chosen, output / "accuracy.png")
        _draw_curves(at_chosen, output / "curves.png")
    if any(record["arm"] != record["of"] for record in runs):
        _draw_rates(runs, output / "learning_rates.png")
    for row in summary:
        cells = (f"{name}={value:.4g}" for name, value in row.items() if name != "arm" and value != "")
        print(f"{row['arm']:<20}{'  '.join(cells)}")


def _key(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"arm": record["arm"], "seed": record["seed"]}


def _means(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "log_ratios"}


def _pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The held-out pairs at the end of a run: tokens of the responses and their log ratios, summed."""
    rows = zip(record["lengths"], record["held_out"][-1]["log_ratios"], strict=True)
    names = ("chosen_tokens", "rejected_tokens", "chosen_log_ratio", "rejected_log_ratio")
    return [
        {**_key(record), "pair": number, **dict(zip(names, (*lengths, *ratios), strict=True))}
        for number, (lengths, ratios) in enumerate(rows)
    ]


def of_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """What one run came to at its end, and what a step cost."""
    start, end = record["held_out"][0], record["held_out"][-1]
    answers = _of_answers(record["answers"]) if "answers" in record else {}
    return {
        **_key(record),
        "learning_rate": record["learning_rate"],
        "steps": record["steps"],
        "accuracy": end["accuracy"],
        "response_accuracy": end["response_accuracy"],
        "margin": end["margin"],
        "chosen_logp_change": end["chosen_logp"] - start["chosen_logp"],
        "rejected_logp_change": end["rejected_logp"] - start["rejected_logp"],
        **answers,
        "pairs_at_a_time": record["pairs_at_a_time"],
        "seconds_per_step": record["seconds_per_step"],
        "cpu_seconds_per_step": record["cpu_seconds_per_step"],
        "tokens_per_second": record["tokens_per_second"],
        "peak_gb": record["peak_bytes"] / 1e9,
    }


def _of_answers(answers: Records) -> dict[str, float]:
    """KL from the reference, estimated on sampled answers, up to where these were cut; the error is over prompts."""
    of_prompts: defaultdict[int, list[float]] = defaultdict(list)
    for answer in answers:
        of_prompts[answer["prompt"]].append(answer["logp"] - answer["ref_logp"])
    total = sum(sum(ratios) for ratios in of_prompts.values())
    _, deviation = mean_and_sd([sum(ratios) / len(ratios) for ratios in of_prompts.values()])
    return {
        "kl_nats_a_token": total / sum(answer["tokens"] for answer in answers),
        "kl_nats_an_answer": total / len(answers),
        "kl_standard_error": deviation / len(of_prompts) ** 0.5,
        "answers_that_ended": sum(answer["ended"] for answer in answers) / len(answers),
    }


def summarise(rows: Records) -> list[dict[str, Any]]:
    """Means over the seeds of each arm, and the standard deviations of what was learned."""
    summary = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        line: dict[str, Any] = {"arm": arm, "seeds": len(of_arm)}
        for name in of_arm[0]:
            if name in ("arm", "seed", "kl_standard_error"):
                continue
            mean, deviation = mean_and_sd([row[name] for row in of_arm])
            line[name] = mean
            if name in LEARNED:
                line[f"{name}_sd"] = deviation if len(of_arm) > 1 else ""
        summary.append(line)
    return summary


def _items(records: Records) -> list[dict[str, Any]]:
    """Share of forced-choice items answered rightly before and after, and the difference with its standard error."""
    starts = [record for record in records if record["kind"] == "start"]
    if not starts:
        return []
    before, rows = [is_right(logps) for logps in starts[0]["items"]], []
    kinds = starts[0]["kinds"]
    for record in records:
        if record["kind"] != "run":
            continue
        for kind in (*dict.fromkeys(kinds), "all"):
            places = [place for place, of in enumerate(kinds) if kind in (of, "all")]
            after = [is_right(logps) for logps in record["items"]]
            changes = [float(after[place]) - float(before[place]) for place in places]
            change, deviation = mean_and_sd(changes)
            rows.append(
                {
                    **_key(record),
                    "kind": kind,
                    "items": len(places),
                    "before": sum(before[place] for place in places) / len(places),
                    "after": sum(after[place] for place in places) / len(places),
                    "change": change,
                    "standard_error": deviation / len(places) ** 0.5,
                }
            )
    return rows


def _by_arm(runs: Records) -> dict[str, list[Mapping[str, Any]]]:
    grouped: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in runs:
        grouped[record["arm"]].append(record)
    return dict(grouped)


def _draw_accuracy(runs: Records, path: Path) -> None:
    """Held-out accuracy over the time of training, without the start: the mean of the seeds, each seed beside it.

    The legend says how fast each trainer is and what memory it takes at most.
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    for arm, of_arm in _by_arm(runs).items():
        label, colour = LOOKS[arm]
        minutes = [record["seconds_per_step"] / 60 for record in of_arm]
        curves = [[100 * entry["accuracy"] for entry in record["held_out"][1:]] for record in of_arm]
        steps = [entry["step"] for entry in of_arm[0]["held_out"][1:]]
        minute = sum(minutes) / len(minutes)
        at = [step * minute for step in steps]
        for curve in curves if len(curves) > 1 else ():
            axes.plot(at, curve, color=colour, linewidth=0.7, alpha=0.35)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        together, speed, peak = (
            sum(record[name] for record in of_arm) / len(of_arm)
            for name in ("pairs_at_a_time", "tokens_per_second", "peak_bytes")
        )
        parts = f", {together:.0f} pairs at a time" if len({record["pairs_at_a_time"] for record in runs}) > 1 else ""
        label = f"{label} ({speed:.0f} tokens/s, {peak / 1e9:.1f} GB{parts})"
        axes.plot(at, mean, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    pairs = len(runs[0]["lengths"])
    finish_panel(axes, "Held-out pairs won, over the time of training", "minutes of training", f"% of {pairs} pairs")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def _draw_curves(runs: Records, path: Path) -> None:
    """What becomes of margin and likelihoods: by optimizer step, and of the chosen responses by margin."""
    figure = new_figure(13, 3.6)
    *panels, at_margins = figure.subplots(1, len(PANELS) + 1)
    for arm, of_arm in _by_arm(runs).items():
        for number, record in enumerate(of_arm):
            curve = record["held_out"]
            label, colour = LOOKS[arm]
            look = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2}
            look["label"] = label if number == 0 else None
            for axes, (metric, *_) in zip(panels, PANELS, strict=True):
                axes.plot([entry["step"] for entry in curve], [entry[metric] for entry in curve], **look)
            _plot_by_margin(at_margins, curve, **look)
    for axes, (_, title, label) in zip(panels, PANELS, strict=True):
        finish_panel(axes, title, "optimizer step", label)
    finish_panel(at_margins, *BY_MARGIN)
    at_margins.locator_params(axis="x", nbins=5)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    save(figure, path)


def _draw_rates(runs: Records, path: Path) -> None:
    """Margin and likelihood of the chosen responses at several learning rates, of the losses that have them."""
    figure = new_figure(10, 4.2)
    margins, at_margins = figure.subplots(1, 2)
    compared = {record["of"] for record in runs if record["arm"] != record["of"]}
    at_rates = [record for record in runs if record["of"] in compared and record["seed"] == 0]
    rates = sorted({record["learning_rate"] for record in at_rates}, reverse=True)
    for record in sorted(at_rates, key=lambda record: (record["of"], -record["learning_rate"])):
        label, colour = LOOKS[record["of"]]
        look = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2}
        look["linestyle"] = ("-", "--", ":", "-.")[rates.index(record["learning_rate"]) % 4]
        look["label"] = f"{label}, {record['learning_rate']:g}{'' if record['arm'] != record['of'] else ' (chosen)'}"
        curve = record["held_out"]
        margins.plot([entry["step"] for entry in curve], [entry["margin"] for entry in curve], **look)
        _plot_by_margin(at_margins, curve, **look)
    (_, title, label), *_ = PANELS
    finish_panel(margins, title, "optimizer step", label)
    finish_panel(at_margins, *BY_MARGIN)
    at_margins.legend(frameon=False, fontsize=8)
    save(figure, path)


def _plot_by_margin(axes: Any, curve: Records, **look: Any) -> None:
    """The change of the chosen responses' log-prob, over the margin."""
    changes = [entry["chosen_logp"] - curve[0]["chosen_logp"] for entry in curve]
    axes.plot([entry["margin"] for entry in curve], changes, **look)
