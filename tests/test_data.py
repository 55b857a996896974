"""Preference pairs: loading, every refusal with its place, token ids, masks, truncation, batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_model import make_pairs, make_tokenizer

from dil_kernels.data import PreferenceDataError, load_preference_pairs
from dil_kernels.data.files import FILE_SUFFIXES
from dil_kernels.data.tokenization import IGNORE_INDEX, PreferenceCollator, tokenize_dataset, tokenize_pair, truncate

PLAIN = {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


CHAT = {
    "prompt": [message("system", "w9"), message("user", "w1 w2")],
    "chosen": [message("assistant", "w3 w4")],
    "rejected": [message("assistant", "w5")],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
        return path
    if path.name.endswith("array.json"):
        path.write_text(json.dumps(records, indent=1))
        return path
    return write_lines(path, *records)


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(PreferenceDataError) as caught:
        load_preference_pairs(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "array.json", "pairs.parquet"])
@pytest.mark.parametrize("record", [PLAIN, CHAT], ids=["plain", "conversational"])
def test_every_local_format_gives_the_same_pairs(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    other = {**record, "chosen": record["rejected"], "rejected": record["chosen"]}
    loaded = load_preference_pairs(write(tmp_path / name, [{**record, "score": 1.0}, {**other, "score": 2.0}]))
    assert loaded.column_names == ["prompt", "chosen", "rejected"]
    assert loaded.to_list() == [record, other]


def test_more_rows_than_a_chunk_keep_their_order(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "many.jsonl", *({**PLAIN, "chosen": f"w{i}"} for i in range(2500)))
    assert load_preference_pairs(path)["chosen"][:] == [f"w{i}" for i in range(2500)]


def test_blank_lines_and_a_byte_order_mark_are_no_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode() + b"\n\n  \n" + json.dumps(PLAIN).encode())
    assert load_preference_pairs(path).to_list() == [PLAIN, PLAIN]


def test_a_directory_is_loaded_by_split(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    directory.mkdir()
    write_lines(directory / "train.jsonl", {**CHAT, "id": 7})
    write_lines(directory / "test.jsonl", CHAT, CHAT)
    assert load_preference_pairs(directory).to_list() == [CHAT]
    assert load_preference_pairs(directory, split="test").to_list() == [CHAT, CHAT]
    broken = {**CHAT, "rejected": [message("assistant", " ")]}
    write_lines(directory / "train.jsonl", CHAT, broken)
    assert refusal(directory) == f"{directory / 'train.jsonl'}, line 2, column 'rejected': the response is empty"


def test_whole_conversations_share_the_prompt(tmp_path: Path) -> None:
    whole = {column: CHAT["prompt"] + CHAT[column] for column in ("chosen", "rejected")}
    path = tmp_path / "pairs.jsonl"
    for prompt in ({}, {"prompt": "w1 w2"}, {"prompt": None}):
        assert load_preference_pairs(write_lines(path, {**prompt, **whole})).to_list() == [CHAT]
    answers = {column: CHAT[column] for column in ("chosen", "rejected")}
    loaded = load_preference_pairs(write_lines(path, {"prompt": "w1", **answers}))
    assert loaded.to_list() == [{"prompt": [message("user", "w1")], **answers}]


BROKEN = {
    "broken JSON": ('{"prompt": "w1", "chosen" "w2"}', ": broken JSON at character 27: Expecting ':' delimiter"),
    "cut line": ('{"prompt": "w1", "chosen": "w2', ": broken JSON at character 28: Unterminated string starting at"),
    "cut after a comma": (
        '{"prompt": "w1", ',
        ": broken JSON at character 18: Expecting property name enclosed in double quotes",
    ),
    "no object": ([1], ": expected an object with prompt, chosen, rejected, got list"),
    "missing chosen": (
        {"prompt": "w1", "rejected": "w2", "answer": "w3"},
        ": column 'chosen' is missing (columns with a value: prompt, rejected, answer)",
    ),
    "null rejected": (
        {**PLAIN, "rejected": None},
        ": column 'rejected' is missing (columns with a value: prompt, chosen)",
    ),
    "missing prompt": (
        {"chosen": "w1", "rejected": "w2"},
        ": column 'prompt' is missing, and chosen and rejected begin with no line or word in common",
    ),
    "number": ({**PLAIN, "rejected": 5}, ", column 'rejected': expected a string, got int"),
    "prompt of another kind": ({**PLAIN, "prompt": CHAT["prompt"]}, ", column 'prompt': expected a string, got list"),
    "responses of two kinds": ({**PLAIN, "chosen": CHAT["chosen"]}, ", column 'chosen': expected a string, got list"),
    "two numbers": (
        {"prompt": "w1", "chosen": 1, "rejected": 2},
        ", column 'chosen': expected a string or a list of {role, content} messages, got int",
    ),
    "empty response": ({**PLAIN, "chosen": ""}, ", column 'chosen': the response is empty"),
    "blank response": ({**PLAIN, "rejected": " \n"}, ", column 'rejected': the response is empty"),
    "surrogate": (
        '{"prompt": "w1", "chosen": "\\ud800", "rejected": "w2"}',
        ", column 'chosen': not valid Unicode: surrogates not allowed",
    ),
}
BROKEN_CHAT = {
    "empty list": ({**CHAT, "chosen": []}, ", column 'chosen': the list of messages is empty"),
    "empty prompt": ({**CHAT, "prompt": []}, ", column 'prompt': the list of messages is empty"),
    "number for prompt": (
        {**CHAT, "prompt": 3},
        ", column 'prompt': expected a string or a list of {role, content} messages, got int",
    ),
    "empty response": (
        {**CHAT, "rejected": [message("assistant", " ")]},
        ", column 'rejected': the response is empty",
    ),
    "no message": ({**CHAT, "chosen": ["w1"]}, ", column 'chosen', message 1: expected {role, content}, got 'w1'"),
    "no content": (
        {**CHAT, "prompt": [message("user", "w1"), {"role": "user"}]},
        ", column 'prompt', message 2: content must be a string, got NoneType",
    ),
    "role of another type": (
        {**CHAT, "rejected": [message(1, "w1")]},  # type: ignore[arg-type]
        ", column 'rejected', message 1: role must be a string, got int",
    ),
    "answer of the user": (
        {**CHAT, "chosen": [message("user", "w1")]},
        ", column 'chosen': the last message is not the assistant's, but 'user'",
    ),
    "prompt given twice": (
        {**CHAT, "chosen": CHAT["prompt"] + CHAT["chosen"]},
        ", column 'chosen': beside a prompt of messages, the response must begin with the assistant's message, not "
        "'system'; leave the prompt column out if the responses hold the whole conversation",
    ),
    "prompt nowhere": (
        {"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]},
        ": column 'prompt' is missing, and the responses hold only the answer",
    ),
    "two prompts": (
        {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"][1:] + CHAT["rejected"]},
        ": chosen and rejected share no message that could be the prompt",
    ),
    "another prompt": (
        {"prompt": "w7", **{column: CHAT["prompt"] + CHAT[column] for column in ("chosen", "rejected")}},
        ", column 'prompt': not a message of the conversation in chosen and rejected",
    ),
    "plain among conversations": (PLAIN, ": this pair is three strings, but those before it are lists of messages"),
}


@pytest.mark.parametrize(("broken", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, broken: Any, problem: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN, "", broken, PLAIN)
    assert refusal(path) == f"{path}, line 3{problem}"


@pytest.mark.parametrize(("broken", "problem"), BROKEN_CHAT.values(), ids=BROKEN_CHAT)
def test_a_broken_conversation_is_named(tmp_path: Path, broken: Any, problem: str) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", CHAT, broken)
    assert refusal(path) == f"{path}, line 2{problem}"


def test_rows_of_other_formats_are_named(tmp_path: Path) -> None:
    records = [PLAIN, PLAIN, {**PLAIN, "chosen": ""}]
    for name in ("pairs.parquet", "array.json"):
        path = write(tmp_path / name, records)
        assert refusal(path) == f"{path}, row 3, column 'chosen': the response is empty"
    path = tmp_path / "array.json"
    path.write_text('[\n{"prompt": "w1"},\n{"prompt" 2}]')
    assert refusal(path) == f"{path}, line 3: broken JSON at character 11: Expecting ':' delimiter"


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN)
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff\xfe"}\n')
    assert refusal(path) == f"{path}, line 2: not UTF-8: invalid start byte"


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    assert refusal(missing) == f"{missing}: no such file"
    other = write_lines(tmp_path / "pairs.txt", PLAIN)
    assert refusal(other) == f"{other}: unknown kind of file; expected {', '.join(FILE_SUFFIXES)}"
    empty = write_lines(tmp_path / "empty.jsonl", "")
    assert refusal(empty) == f"{empty}: holds no preference pair"
    table = tmp_path / "pairs.parquet"
    table.write_bytes(b"PAR1 and nothing more")
    assert refusal(table).startswith(f"{table}: broken Parquet file: ")
    path = write_lines(tmp_path / "pairs.jsonl", PLAIN)
    assert refusal(path, split="test") == f"{path}: a local file has only the split 'train', not 'test'"
    directory = tmp_path / "nothing"
    directory.mkdir()
    assert refusal(directory).startswith(f"{directory}: not a local file, and loading it as a data set failed: ")
    write_lines(directory / "train.jsonl", PLAIN, '{"prompt": ')
    assert refusal(directory) == f"{directory / 'train.jsonl'}, line 2: broken JSON at character 12: Expecting value"
    (directory / "README.md").write_text(
        "---\nconfigs:\n" + "".join(f"- config_name: {name}\n  data_files: train.jsonl\n" for name in "ab") + "---\n"
    )
    assert "Config name is missing. Please pick one among the available configs: ['a', 'b']" in refusal(directory)
    (directory / "README.md").unlink()
    (directory / "train.jsonl").rename(directory / "train.parquet")
    assert refusal(directory).startswith(f"{directory}: not a local file, and loading it as a data set failed: ")


def collate(record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    tokenized = tokenize_dataset(
        datasets.Dataset.from_list([record]),
        tokenizer,
        max_length=None,
        max_prompt_length=None,
        truncation_mode="keep_end",
    )
    return PreferenceCollator(tokenizer.pad_token_id)(tokenized.to_list())


@pytest.mark.parametrize(
    ("record", "sequences", "responses"),
    [
        (PLAIN, ["w1 w2 w3 w4 </s>", "w1 w2 w5 </s>"], ["w3 w4 </s>", "w5 </s>"]),
        (
            CHAT,
            [
                "<|system|> w9 <|end|> <|user|> w1 w2 <|end|> <|assistant|> w3 w4 <|end|>",
                "<|system|> w9 <|end|> <|user|> w1 w2 <|end|> <|assistant|> w5 <|end|>",
            ],
            ["w3 w4 <|end|>", "w5 <|end|>"],
        ),
    ],
    ids=["plain", "conversational"],
)
def test_labels_are_exactly_the_response(record: dict[str, Any], sequences: list[str], responses: list[str]) -> None:
    tokenizer = make_tokenizer()
    batch = collate(record, tokenizer)
    for row in range(2):
        real = batch["attention_mask"][row].bool()
        scored = batch["labels"][row] != IGNORE_INDEX
        assert tokenizer.convert_ids_to_tokens(batch["input_ids"][row][real]) == sequences[row].split()
        assert tokenizer.convert_ids_to_tokens(batch["labels"][row][scored]) == responses[row].split()
        assert batch["labels"][row][scored].tolist() == batch["input_ids"][row][scored].tolist()
        assert real.tolist() == sorted(real.tolist(), reverse=True), "padding must be on the right"
        assert batch["input_ids"][row][~real].eq(tokenizer.pad_token_id).all()


def test_an_end_of_sequence_that_is_there_is_not_doubled() -> None:
    tokenizer = make_tokenizer()
    _, chosen, rejected = tokenize_pair({**PLAIN, "chosen": "w3 </s>"}, tokenizer, "row 1")
    assert tokenizer.convert_ids_to_tokens(chosen) == ["w3", "</s>"]
    assert tokenizer.convert_ids_to_tokens(rejected) == ["w5", "</s>"]


def test_an_end_of_sequence_that_the_tokenizer_appends_does_not_end_the_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A </s>", special_tokens=[("<|system|>", 2), ("</s>", 1)]
    )
    prompt, chosen, _ = tokenize_pair(PLAIN, tokenizer, "row 1")
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<|system|>", "w1", "w2"]
    assert tokenizer.convert_ids_to_tokens(chosen) == ["w3", "w4", "</s>"]


def test_a_token_across_the_boundary_is_split_as_generation_has_it() -> None:
    tokenizer = make_tokenizer()
    pair = {"prompt": "w1 w2", "chosen": "3 w4", "rejected": "w5"}  # "w2" + "3" would be the word w23
    prompt, chosen, _ = tokenize_pair(pair, tokenizer, "row 1")
    assert tokenizer.convert_ids_to_tokens(prompt) == ["w1", "w2"]
    assert tokenizer.convert_ids_to_tokens(chosen) == ["3", "w4", "</s>"]


def test_a_template_that_renders_the_prompt_differently_is_refused() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}<|end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(PreferenceDataError, match=r"row 4, column 'chosen': the template renders the prompt alone"):
        tokenize_pair(
            CHAT, make_tokenizer(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}"), "row 4"
        )


def test_a_template_that_refuses_a_conversation_is_named() -> None:
    with pytest.raises(
        PreferenceDataError, match=r"row 4: the chat template refuses this conversation: no system here"
    ):
        tokenize_pair(CHAT, make_tokenizer("{{ raise_exception('no system here') }}"), "row 4")


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(PreferenceDataError, match=r"row 2, column 'prompt': the prompt has no token"):
        tokenize_pair({**PLAIN, "prompt": " "}, make_tokenizer(), "row 2")


def test_a_tokenizer_without_an_end_is_refused_for_strings() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(PreferenceDataError, match="no end-of-sequence token"):
        tokenize_pair(PLAIN, tokenizer, "row 1")


PROMPT, CHOSEN, REJECTED = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14], [21, 22]


@pytest.mark.parametrize(
    ("max_length", "max_prompt_length", "mode", "kept"),
    [
        (None, None, "keep_end", (PROMPT, CHOSEN, REJECTED)),
        (10, 2, "keep_end", (PROMPT, CHOSEN, REJECTED)),  # exactly fits: nothing is cut
        (9, 5, "keep_end", (PROMPT[1:], CHOSEN, REJECTED)),  # one too long: the prompt gives way
        (9, 5, "keep_start", (PROMPT[:5], CHOSEN, REJECTED)),
        (9, 6, "keep_end", (PROMPT, CHOSEN[:3], REJECTED)),  # the prompt is within its limit: the response gives way
        (9, 8, "keep_start", (PROMPT, CHOSEN[:3], REJECTED)),  # and takes what a short prompt leaves
        (8, 5, "keep_end", (PROMPT[1:], CHOSEN[:3], REJECTED)),
        (7, 6, "keep_start", (PROMPT, CHOSEN[:1], REJECTED[:1])),
        (2, 1, "keep_end", ([6], [11], [21])),
        (2, 1, "keep_start", ([1], [11], [21])),
    ],
)
def test_truncation(max_length: Any, max_prompt_length: Any, mode: str, kept: Any) -> None:
    result = truncate(
        PROMPT, CHOSEN, REJECTED, max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=mode
    )
    assert result == kept


def test_truncated_and_identical_pairs_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [PLAIN, {**PLAIN, "prompt": "w1 w2 w3 "}, {**PLAIN, "chosen": "w5"}, {**PLAIN, "chosen": "w5 w6 w7"}]
    tokenized = tokenize_dataset(
        datasets.Dataset.from_list(pairs),
        make_tokenizer(),
        max_length=5,
        max_prompt_length=2,
        truncation_mode="keep_end",
    )
    assert caplog.messages == [
        "4 rows; prompts cut to fit 5 tokens: 1 (by 1); responses cut and left without their end: 1 (by 1), in 1 rows; "
        "with the same chosen and rejected tokens: 1"
    ]
    assert tokenized["row"][:] == [1, 2, 3, 4]
    assert tokenized["length"][:] == [5, 5, 4, 5]
    assert sorted(tokenized.column_names) == sorted(["prompt_ids", "chosen_ids", "rejected_ids", "row", "length"])


def test_several_processes_tokenise_as_one() -> None:
    options = {"max_length": 5, "max_prompt_length": 2, "truncation_mode": "keep_end"}
    one, two = (tokenize_dataset(make_pairs(9), make_tokenizer(), num_proc=count, **options) for count in (None, 2))
    assert two.to_list() == one.to_list()


def test_a_broken_pair_of_a_given_data_set_is_named() -> None:
    pairs = datasets.Dataset.from_list([PLAIN, {**PLAIN, "rejected": " "}])
    with pytest.raises(PreferenceDataError, match=r"^row 2, column 'rejected': the response is empty"):
        tokenize_dataset(pairs, make_tokenizer(), max_length=8, max_prompt_length=4, truncation_mode="keep_end")


def test_a_batch_is_the_chosen_then_the_rejected() -> None:
    pairs = [
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "row": 8, "ref_chosen_logps": -1.5},
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "row": 3, "ref_chosen_logps": -2.5},
    ]
    batch = PreferenceCollator(0)(pairs)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [5, 6, 7, 0], [1, 4, 0, 0], [5, 6, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    ignored = IGNORE_INDEX
    assert batch["labels"].tolist() == [
        [ignored, 2, 3, ignored],
        [ignored, ignored, 7, ignored],
        [ignored, 4, ignored, ignored],
        [ignored, ignored, 8, 9],
    ]
    assert batch["rows"].tolist() == [8, 3]
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -2.5]
    assert "ref_rejected_logps" not in batch
