"""What becomes of rows that are too long, and that every one of them is counted, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_model import make_pairs, make_tokenizer
from tiny_tokenizers import byte_level
from tiny_trainer import make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from two_processes import run_on_two_processes

from dil_kernels.data import PreferenceDataError
from dil_kernels.data.tokenization import tokenize_and_report, tokenize_dataset, tokenize_pair
from dil_kernels.data.truncation import DataReport
from dil_kernels.trainer import DILConfig


def words(count: int) -> str:
    return " ".join(f"w{index}" for index in range(count))


def row(prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """A pair of so many words; each response gets an end-of-sequence besides."""
    return {"prompt": words(prompt) + " ", "chosen": words(chosen), "rejected": words(rejected) + "x"}


ROWS = [
    row(4, 3, 2),  # fits into 10
    row(9, 1, 2),  # a long prompt
    row(4, 9, 2),  # a long response beside a prompt within its limit
    row(8, 8, 9),  # everything is long
    {**row(2, 2, 2), "rejected": words(2)},
]


def report_of(rows: list[dict[str, Any]], **options: Any) -> tuple[datasets.Dataset, DataReport]:
    settings = {"max_length": 10, "max_prompt_length": 5, "truncation_mode": "keep_end", **options}
    return tokenize_and_report(datasets.Dataset.from_list(rows), make_tokenizer(), **settings)


def test_every_cut_is_counted() -> None:
    dataset, report = report_of(ROWS)
    assert report == DataReport(
        rows=5,
        max_length=10,
        prompts_cut=2,
        prompt_tokens_cut=4 + 3,
        rows_with_responses_cut=2,
        responses_cut=1 + 2,
        response_tokens_cut=(10 - 6) + (9 - 5) + (10 - 5),
        identical=2,  # one of them since it was cut
    )
    end = make_tokenizer().eos_token_id
    ended = [row[name][-1] == end for row in dataset.to_list() for name in ("chosen_ids", "rejected_ids")]
    assert ended.count(False) == report.responses_cut
    whole, nothing = report_of(ROWS, max_length=None, max_prompt_length=None)
    lost = sum(len(row["prompt_ids"]) for row in whole) - sum(len(row["prompt_ids"]) for row in dataset)
    assert lost == report.prompt_tokens_cut
    assert nothing == DataReport(rows=5, max_length=None, identical=1)


def test_rows_that_are_too_long_can_be_left_out() -> None:
    dataset, report = report_of(ROWS, truncation_mode="drop", max_prompt_length=None)
    assert report == DataReport(rows=5, max_length=10, dropped=3, identical=1)
    assert dataset["row"][:] == [1, 5]
    whole = report_of(ROWS, max_length=None, max_prompt_length=None)[0]
    assert dataset.to_list() == [whole[0], whole[4]]
    exact, report = report_of([row(4, 3, 5)], truncation_mode="drop", max_prompt_length=None)
    assert (exact["length"][0], report.dropped) == (10, 0)
    with pytest.raises(PreferenceDataError, match="all 2 rows are longer than max_length=10 tokens"):
        report_of(ROWS[2:4], truncation_mode="drop", max_prompt_length=None)


def test_unpaired_rows_are_counted_alike() -> None:
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True} for pair in ROWS]
    _, report = report_of(rows)
    assert report == DataReport(5, 10, 0, 2, 4 + 3, 2, 2, (10 - 6) + (9 - 5), 0)


def test_a_report_is_one_line_of_what_there_is_to_say(caplog: pytest.LogCaptureFixture) -> None:
    assert str(report_of(ROWS[:1])[1]) == "1 rows; none truncated"
    assert str(report_of(ROWS)[1]) == (
        "5 rows; prompts cut to fit 10 tokens: 2 (by 7); responses cut and left without their end: 3 (by 13), in 2 "
        "rows; with the same chosen and rejected tokens: 2"
    )
    dropped = report_of(ROWS, truncation_mode="drop", max_prompt_length=None)[1]
    assert str(dropped) == ("5 rows; left out as longer than 10 tokens: 3; with the same chosen and rejected tokens: 1")
    options = {"max_length": 10, "max_prompt_length": None, "truncation_mode": "drop"}
    tokenize_dataset(datasets.Dataset.from_list(ROWS[:1]), make_tokenizer(), **options)
    assert caplog.messages == []
    tokenize_dataset(datasets.Dataset.from_list(ROWS), make_tokenizer(), **options)
    assert caplog.messages == [str(dropped)]


def test_a_trainer_has_a_report_of_each_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    evaluation = {"all": rows, "first": rows.select([0])}
    trainer = make_trainer(
        tmp_path, train_dataset=rows, eval_dataset=evaluation, truncation_mode="drop", max_length=10, max_steps=1
    )
    assert {name: report.dropped for name, report in trainer.data_report.items()} == {
        "train": 3,
        "eval_all": 3,
        "eval_first": 0,
    }
    printed = capsys.readouterr().out.splitlines()
    for name, report in trainer.data_report.items():
        assert printed.count(f"{name} data: {report}") == 1
    assert trainer.train_dataset["row"][:] == [1, 5]
    trainer.train()
    tokenized = make_trainer(tmp_path, train_dataset=trainer.train_dataset)
    assert tokenized.data_report == {}, "what was cut before is not known"


def test_references_of_rows_that_are_cut_are_questioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rows, messages in ((ROWS[:1], 0), (ROWS[:2], 1)):
        given = datasets.Dataset.from_list(
            [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows]
        )
        make_trainer(tmp_path, train_dataset=given, precompute_ref_log_probs=True, max_length=10)
        assert sum("must be those of the rows as they are cut" in message for message in caplog.messages) == messages


def test_dropping_needs_a_length_and_cuts_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length=None leaves nothing out"):
        DILConfig(str(tmp_path), truncation_mode="drop", max_length=None)
    with pytest.raises(ValueError, match="max_prompt_length=5 was given, but truncation_mode='drop' cuts no prompt"):
        DILConfig(str(tmp_path), truncation_mode="drop", max_prompt_length=5)
    with pytest.raises(ValueError, match="available: keep_end, keep_start, drop"):
        DILConfig(str(tmp_path), truncation_mode="keep_middle")


def test_streams_are_refused_with_the_reason(tmp_path: Path) -> None:
    stream = make_pairs(3).to_iterable_dataset()
    for options in ({"train_dataset": stream}, {"eval_dataset": {"a": stream}}):
        with pytest.raises(
            TypeError, match=r"the (train|eval_a) data set is streamed: .* Load it without streaming=True"
        ):
            make_trainer(tmp_path, **options)
    with pytest.raises(TypeError, match="the train data set is streamed"):
        make_trainer(tmp_path, train_dataset=datasets.IterableDatasetDict({"train": stream}))
    with pytest.raises(TypeError, match=r"must come as a datasets\.Dataset, got list"):
        make_trainer(tmp_path, train_dataset=make_pairs(3).to_list())


DISTRIBUTED = """
from test_truncation import ROWS, make_trainer
import datasets
rows = datasets.Dataset.from_list(ROWS)
trainer = make_trainer(Path(sys.argv[1]), train_dataset=rows, ddp_backend="gloo", max_length=10)
assert trainer.data_report["train"].responses_cut == 3
"""


def test_two_processes_report_once(tmp_path: Path) -> None:
    result = run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path)
    assert (result.stdout + result.stderr).count("responses cut and left without their end: 3 (by 13)") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_length": 6.5}, "max_length must be an integer, got 6.5"),
        ({"max_length": 1}, "max_length must be at least 2, a token of prompt and one of response; got 1"),
        ({"max_prompt_length": 10}, "max_prompt_length must be from 1 to max_length - 1 = 9, so that a token of each"),
        ({"max_prompt_length": 0}, "max_prompt_length must be from 1 to max_length - 1 = 9, so that a token of each"),
        ({"max_prompt_length": -1}, "max_prompt_length must be >= 0, got -1"),
        ({"truncation_mode": "bogus"}, "unknown truncation_mode 'bogus'; available: keep_end, keep_start, drop"),
        ({"truncation_mode": "drop"}, "max_prompt_length=5 was given, but truncation_mode='drop' cuts no prompt"),
        ({"max_length": None}, "max_prompt_length=5 was given, but max_length=None cuts nothing"),
    ],
    ids=str,
)
def test_lengths_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        report_of(ROWS, **options)
    assert str(caught.value).startswith(problem)


def test_half_of_the_length_is_the_prompts_by_default() -> None:
    assert report_of(ROWS, max_prompt_length=None)[0].to_list() == report_of(ROWS)[0].to_list()


def test_data_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^preference pairs must come as a datasets.Dataset, got list$"):
        tokenize_dataset(ROWS, make_tokenizer(), max_length=None, max_prompt_length=None, truncation_mode="keep_end")


def test_texts_without_a_token_of_their_own_are_counted() -> None:
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    words_only = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    rows = [
        {"prompt": "a b ", "chosen": "a", "rejected": "b"},
        {"prompt": "a c ", "chosen": "d a", "rejected": "b"},
        {"prompt": "a ", "chosen": "a", "rejected": "e"},
    ]
    options = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}
    _, report = tokenize_and_report(datasets.Dataset.from_list(rows), words_only, **options)
    assert (report.unknown, report.rows_with_unknown) == (3, 2)
    assert str(report).endswith(
        "texts that the tokenizer has no token for: 3, in 2 rows; what stood there is not learnt"
    )


def test_an_unknown_token_that_no_text_needs_is_not_counted() -> None:
    """It is a mark of the chat template of many tokenizers of bytes."""
    tokenizer = byte_level(False)
    tokenizer.add_special_tokens({"unk_token": "<|user|>"})
    rows = [{"prompt": "<|user|> a ", "chosen": "ü", "rejected": "b"}]
    tokenizer.eos_token = "<|im_end|>"
    options = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end"}
    dataset, report = tokenize_and_report(datasets.Dataset.from_list(rows), tokenizer, **options)
    assert tokenizer.unk_token_id in dataset[0]["prompt_ids"]
    assert report.unknown == 0


def test_a_response_of_which_no_token_is_left_is_refused() -> None:
    backend = Tokenizer(models.BPE({"</s>": 0, "a": 1, " ": 2}, []))  # which drops what it does not know
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(PreferenceDataError, match="column 'rejected': the response has no token"):
        tokenize_pair({"prompt": "a ", "chosen": "a", "rejected": "77"}, tokenizer, "row 1")
