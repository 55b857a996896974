"""Pairs, and responses that come without one: data have one form, and nothing is taken for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from refusals import CHAT, LENGTHS, PLAIN, refusal, said, tokenising_refusal
from tiny_model import make_pairs, make_tokenizer, write_lines
from tiny_trainer import make_trainer, tokenized

from dil_kernels.data import load_preference_pairs
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.tokenization import tokenize_dataset

pytestmark = pytest.mark.usefixtures("datasets_cache")

RESPONSE = {"prompt": "w1 w2 ", "completion": "w3 w4", "label": True}


@pytest.mark.parametrize("kind", ["lines", "parquet", "data set"])
@pytest.mark.parametrize(
    ("row", "others", "kept"),
    [
        (PLAIN, {"completion": "w7", "label": True, "ref_logps": -1.0}, PLAIN),
        (RESPONSE, {"rejected": "w7", "ref_chosen_logps": -1.0}, RESPONSE),
    ],
    ids=["pairs", "responses"],
)
def test_columns_of_the_other_form_are_named(
    kind: str, row: Any, others: Any, kept: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, rows = tmp_path / "pairs.jsonl", [{**row, **others}] * 2
    if kind == "lines":
        loaded = load_preference_pairs(write_lines(source, *rows))
    elif kind == "parquet":
        source = tmp_path / "pairs.parquet"
        datasets.Dataset.from_list(rows).to_parquet(source)
        loaded = load_preference_pairs(source)
    else:
        loaded = datasets.Dataset.from_list(rows)
    columns = tokenize_dataset(loaded, make_tokenizer(), **LENGTHS).column_names
    assert not {*others} & {*columns} - {"label"}
    assert ("chosen_ids" in columns) == (row is PLAIN) != ("label" in columns)
    name = "the data" if kind == "data set" else source
    assert caplog.messages == [f"{name}: not used: columns {', '.join(map(repr, others))}"]
    if kind != "data set":
        assert loaded.to_list() == [kept] * 2


def test_a_table_may_have_room_for_the_form_that_it_does_not_have(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([{**RESPONSE, "chosen": None, "rejected": None}] * 2).cast_column(
        "chosen", datasets.Value("string")
    )
    columns = tokenize_dataset(table, make_tokenizer(), **LENGTHS).column_names
    assert {"completion_ids", "label"} <= {*columns}
    for options in ({"loss_type": "dpo"}, {"link": "ratio"}):
        with pytest.raises(ValueError, match="couples the chosen and the rejected response of a pair"):
            make_trainer(tmp_path, train_dataset=table, **options)


@pytest.mark.parametrize("form", ["lines", "data set"])
def test_a_missing_prompt_among_others_is_not_made_up(form: str, tmp_path: Path) -> None:
    """An empty cell of a table, say: what chosen and rejected share would be taken for it."""
    bare = {"prompt": None, "chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}
    for rows, problem in (
        ([PLAIN, bare], "this pair has no prompt, but those before it have a prompt"),
        ([bare, PLAIN], "this pair has a prompt, but those before it have no prompt"),
    ):
        if form == "lines":
            message = refusal(write_lines(tmp_path / "pairs.jsonl", *rows)).removeprefix(f"{tmp_path}/pairs.jsonl, ")
        else:
            message = tokenising_refusal(datasets.Dataset.from_list(rows))
        assert message.replace("line 2", "row 2") == (
            f"row 2: {problem}: what chosen and rejected share is taken for the prompt only where no pair has one of "
            "its own"
        )


def test_whole_conversations_may_stand_beside_those_with_a_prompt(tmp_path: Path) -> None:
    """Which messages they share is plain."""
    whole = {name: [*CHAT["prompt"], *CHAT[name]] for name in ("chosen", "rejected")}
    assert load_preference_pairs(write_lines(tmp_path / "a.jsonl", CHAT, whole)).to_list() == [CHAT, CHAT]


def with_labels() -> datasets.Dataset:
    rows = tokenized(make_pairs(4)).to_list()
    return datasets.Dataset.from_list([{**row, "label": True, "completion_ids": [9, 9]} for row in rows])


@pytest.mark.parametrize("options", [{}, {"loss_type": "dpo"}, {"precompute_ref_log_probs": True}], ids=str)
def test_tokenised_pairs_with_a_label_are_pairs(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs = []
    for data in (tokenized(make_pairs(4)), with_labels()):
        trainer = make_trainer(tmp_path, train_dataset=data, eval_dataset=data, max_steps=2, **options)
        trainer.train()
        rounds = [trainer.evaluate()["eval_loss"], *(entry.get("loss") for entry in trainer.state.log_history)]
        logs.append(rounds)
    assert logs[0] == logs[1]
    for name in ("train", "eval"):
        assert f"the {name} data set: not used beside chosen_ids: completion_ids, label" in caplog.messages


def test_the_collator_takes_rows_with_a_label_for_pairs() -> None:
    batches = [PreferenceCollator(0)(rows.to_list()) for rows in (tokenized(make_pairs(4)), with_labels())]
    assert batches[0].keys() == batches[1].keys()
    assert all((batches[0][name] == batches[1][name]).all() for name in ("input_ids", "labels"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chosen_ids": [4.0, 5.7]}, "column 'chosen_ids': expected lists of token ids, integers, got List"),
        ({"rejected_ids": ["4"]}, "column 'rejected_ids': expected lists of token ids, integers, got List"),
        ({"prompt_ids": [True]}, "column 'prompt_ids': expected lists of token ids, integers, got List"),
        ({"prompt_ids": 3}, "column 'prompt_ids': expected lists of token ids, integers, got Value"),
        ({"chosen_ids": [4, -100]}, "has the token id -100: token ids are at least 0"),
        ({"ref_rejected_logps": "x"}, "column 'ref_rejected_logps': expected numbers, got string"),
        (
            {"ref_chosen_logps": 3.0},
            "row 1, column 'ref_chosen_logps': expected a sum of log-probs, which is at most 0, got 3",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tokenised_columns_that_cannot_be_are_named(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4], "ref_chosen_logps": 0.0, **change}
    data = datasets.Dataset.from_list([{"ref_rejected_logps": -1.0, **row}] * 2)
    with pytest.raises(ValueError, match="the train data set") as caught:
        make_trainer(tmp_path, train_dataset=data, precompute_ref_log_probs=True)
    assert problem in str(caught.value)


def test_a_positive_sum_of_log_probs_is_refused(tmp_path: Path) -> None:
    """A negative log-likelihood, most likely."""
    rows = [{**PLAIN, "ref_chosen_logps": 0.0, "ref_rejected_logps": 12.5}]
    path = write_lines(tmp_path / "pairs.jsonl", *rows)
    assert refusal(path) == f"{path}, line 1, column 'ref_rejected_logps': a sum of log-probs is at most 0, got 12.5"
    message = {**CHAT, "ref_chosen_logps": 1.0, "chosen": [said("assistant", "w3")]}
    assert "at most 0, got 1.0" in tokenising_refusal(datasets.Dataset.from_list([message]))
