"""Preference pairs as token ids: masks, ends, chat templates, truncation, batches."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from refusals import CHAT, LENGTHS, PLAIN
from tiny_model import make_pairs, make_tokenizer

from dil_kernels.data import PreferenceDataError
from dil_kernels.data.batches import IGNORE_INDEX
from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.data.tokenization import tokenize_dataset, tokenize_pair
from dil_kernels.data.truncation import truncate

pytestmark = pytest.mark.usefixtures("datasets_cache")


def collate(record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    tokenized = tokenize_dataset(datasets.Dataset.from_list([record]), tokenizer, **LENGTHS)
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
