"""Ids of prompt and response against the text, for every kind of tokenizer; one BOS and one end; BOS and truncation."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from tiny_model import make_tokenizer
from tiny_tokenizers import EXACT, adding, byte_level, llama2, word_piece
from tokenizers import Regex, normalizers

from dil_kernels.data import PreferenceDataError
from dil_kernels.data.tokenization import tokenize_dataset, tokenize_pair
from dil_kernels.data.truncation import truncate

TEXTS = [
    ("The cap", "ital of France"),
    ("Answer: ", "It is blue."),
    ("Answer:", " It is blue."),
    ("Answer:", "It is blue."),
    ("Question: Is it 0 or 1?\n", "\nAnswer: 1"),
    ("Question: yes or no? \n\n ", "yes"),
    ("the captai", "n"),
    ("Answer:  ", "  It is"),
    ("", "The capital"),
]


def ids_of(prompt: str, response: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt_ids, ids = tokenize_pair({"prompt": prompt, "completion": response, "label": True}, tokenizer, "row 1")
    return prompt_ids, ids


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_ids_of_prompt_and_response_decode_to_both(kind: str, prompt: str, response: str) -> None:
    tokenizer = adding(EXACT[kind](), "<s> $A")
    prompt_ids, ids = ids_of(prompt, response, tokenizer)
    assert prompt_ids == tokenizer(prompt)["input_ids"], "as generation has it"
    assert ids[-1] == tokenizer.eos_token_id
    decoded = tokenizer.decode(prompt_ids[1:] + ids[:-1])
    if kind == "bytes behind a space":  # which every text of this tokenizer begins with, unless it has one
        decoded = decoded.removeprefix(" ")
    assert decoded == prompt + response


@pytest.mark.parametrize("kind", EXACT)
def test_a_generation_prompt_may_end_in_a_space(kind: str) -> None:
    tokenizer = EXACT[kind]()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% endif %}"
    )
    pair = {
        "prompt": [{"role": "user", "content": "yes or no?"}],
        "completion": [{"role": "assistant", "content": "Answer"}],
        "label": True,
    }
    prompt_ids, ids = tokenize_pair(pair, tokenizer, "row 1")
    decoded = tokenizer.decode(prompt_ids + ids)
    if "\n" not in tokenizer.decode(tokenizer.encode("a\nb")):  # no token for it in these
        assert decoded.replace("<unk>", "\n").split("\n")[1].lstrip() == "assistant: Answer"
    else:
        assert decoded.lstrip() == "user: yes or no?\nassistant: Answer\n"


def test_a_tokenizer_that_drops_blanks_and_capitals_continues_words() -> None:
    tokenizer = word_piece()
    prompt_ids, ids = ids_of("The cap", "ital of France", tokenizer)
    assert tokenizer.decode(prompt_ids) == "the cap"
    assert tokenizer.decode(prompt_ids + ids[:-1]) == "the capital of france"
    prompt_ids, ids = ids_of("Answer: ", "It is blue.", tokenizer)
    assert prompt_ids + ids[:-1] == tokenizer("Answer: It is blue.")["input_ids"]


def test_a_response_that_has_no_ids_behind_its_prompt_is_refused() -> None:
    tokenizer = byte_level(False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("(?<!capi)tal"), "x tal")
    problem = (
        "^row 1, column 'completion': the tokenizer has no token ids for 'tal' that decode to it behind 'the capi'"
    )
    with pytest.raises(PreferenceDataError, match=problem):
        ids_of("the capi", "tal", tokenizer)


@pytest.mark.parametrize("form", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("kind", ["metaspace first", "llama 2", "bytes"])
@pytest.mark.parametrize("rendered", [False, True], ids=["bare", "with a BOS"])
@pytest.mark.parametrize("end", ["", "</s>", "</s></s>"])
def test_special_tokens_stand_once(form: str, kind: str, rendered: bool, end: str) -> None:
    tokenizer = adding(EXACT[kind](), form)
    prompt_ids, ids = ids_of("<s>" * rendered + "Answer:", " yes" + end, tokenizer)
    has_bos = rendered or form.startswith("<s>")
    assert prompt_ids.count(tokenizer.bos_token_id) == has_bos
    assert prompt_ids[0] == tokenizer.bos_token_id or not has_bos
    assert tokenizer.eos_token_id not in prompt_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "yes"


def test_a_rendered_turn_that_ends_with_the_end_and_a_line_gets_no_second_one() -> None:
    tokenizer = byte_level(False)
    tokenizer.eos_token = "<|im_end|>"
    _, ids = ids_of("<|user|>Is it 1?<|im_end|>\n<|assistant|>", "yes<|im_end|>\n", tokenizer)
    assert tokenizer.decode(ids) == "yes<|im_end|>\n"
    _, ids = ids_of("Is it 1?", "<|im_end|> is an end", tokenizer)
    assert tokenizer.decode(ids) == "<|im_end|> is an end<|im_end|>"


@pytest.mark.parametrize("text", ["\x1f", "\u00a0", "\u3000"])
def test_only_what_templates_write_goes_between_two_ends(text: str) -> None:
    tokenizer = byte_level(False)
    assert tokenizer.decode(ids_of("Is it 1?", f"</s>{text}</s>", tokenizer)[1]) == f"</s>{text}</s>"
    assert tokenizer.decode(ids_of("Is it 1?", f"yes</s>{text}", tokenizer)[1]) == f"yes</s>{text}</s>"
    assert tokenizer.decode(ids_of("Is it 1?", "yes</s>\r\n \t</s>", tokenizer)[1]) == "yes</s>"


@pytest.mark.parametrize("content", ["yes</s>", "yes</s>\n", "yes</s></s> \n"])
def test_an_end_in_a_content_that_the_template_ends_too_is_scored_once(content: str) -> None:
    tokenizer = byte_level(False)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    adding(tokenizer, "<s> $A")
    pair = {
        "prompt": [{"role": "user", "content": "Is it 1?"}],
        "chosen": [{"role": "assistant", "content": content}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    prompt_ids, chosen, rejected = tokenize_pair(pair, tokenizer, "row 1")
    assert tokenizer.decode(prompt_ids) == "<s><|user|>Is it 1?<|assistant|>"
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == ("yes</s>\n", "no</s>\n")


@pytest.mark.parametrize(
    ("prompt", "max_prompt_length", "start", "mode", "kept"),
    [
        ([1, 2, 3, 4, 5], 3, [1], "keep_end", [1, 4, 5]),
        ([1, 2, 3, 4, 5], 3, [1, 2], "keep_end", [1, 2, 5]),
        ([1, 2, 3, 4, 5], 1, [1], "keep_end", [1]),
        ([1, 2, 3, 4, 5], 1, [1, 2], "keep_end", [1]),
        ([1, 2, 3, 4, 5], 3, [1], "keep_start", [1, 2, 3]),
        ([1, 2, 3], 3, [1], "keep_end", [1, 2, 3]),
    ],
)
def test_a_cut_prompt_keeps_its_start(prompt: Any, max_prompt_length: int, start: Any, mode: str, kept: Any) -> None:
    lengths = {"max_length": max_prompt_length + 1, "max_prompt_length": max_prompt_length}
    assert truncate(prompt, [7, 8], truncation_mode=mode, start_ids=start, **lengths) == (kept, [7])


@pytest.mark.parametrize(
    ("form", "prompt", "first"),
    [
        ("<s> $A", "the cap the cap the captain", "<s>"),
        ("$A", "<s>the cap the cap the captain", "<s>"),
        ("$A", "the cap the cap the captain", None),
        ("$A", "<s>the cap<s>the cap<s>the captain", None),  # opens every message, as in SmolLM2's conversations
    ],
)
def test_keep_end_keeps_bos(form: str, prompt: str, first: str | None) -> None:
    tokenizer = adding(llama2(), form)
    rows = datasets.Dataset.from_list([{"prompt": prompt, "chosen": " yes", "rejected": " no"}])
    lengths = {"max_length": 6, "max_prompt_length": 5}
    whole = ids_of(prompt, " yes", tokenizer)[0]
    (row,) = tokenize_dataset(rows, tokenizer, truncation_mode="keep_end", **lengths)
    expected = whole[-5:] if first is None else [tokenizer.convert_tokens_to_ids(first), *whole[-4:]]
    assert row["prompt_ids"] == expected


def test_words_without_a_token_are_no_reason_to_refuse() -> None:
    tokenizer = make_tokenizer()
    prompt_ids, ids = ids_of("w1 w2", "w3", tokenizer)  # jointly the unknown word w2w3
    assert tokenizer.convert_ids_to_tokens(prompt_ids + ids) == ["w1", "w2", "w3", "</s>"]
