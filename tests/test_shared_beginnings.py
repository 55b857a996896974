"""Token ids of many texts at once, the beginning they share encoded once, against those of each whole text alone."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from refusals import tokenising_refusal
from tiny_tokenizers import EXACT, byte_level, word_piece
from tokenizers import Tokenizer, models
from transformers import AddedToken, PreTrainedTokenizerFast

from dil_kernels.data import shared_beginnings
from dil_kernels.data.shared_beginnings import SharedBeginnings


def with_tokens(*tokens: AddedToken, special: bool = True) -> Any:
    tokenizer = byte_level(False)
    tokenizer.add_tokens([*tokens], special_tokens=special)
    return tokenizer


TOKENIZERS = {
    **EXACT,
    "word pieces": word_piece,
    "blanks on the left": lambda: with_tokens(AddedToken("<|turn|>", lstrip=True, special=True)),
    "blanks on the right": lambda: with_tokens(AddedToken("<|turn|>", rstrip=True, special=True)),
    "whole words": lambda: with_tokens(AddedToken("<|turn|>", single_word=True, special=True)),
    "normalised": lambda: with_tokens(AddedToken("<|turn|>", normalized=True, special=True)),
    "one in another": lambda: with_tokens(
        AddedToken("<|turn|>", special=True),
        AddedToken("<|turn|>is", special=True),
        AddedToken("a<|turn|>the", special=True),
    ),
    "not special": lambda: with_tokens(AddedToken("<|turn|>", normalized=False), special=False),
}
PIECES = [
    "<|user|>",
    "<|assistant|>",
    "<|turn|>",
    "<s>",
    "<|im_end|>",
    "the captain",
    "is",
    "a",
    " ",
    "  ",
    "\n",
    "é",
    "<|",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
ROWS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=2)), min_size=1, max_size=4)
BUILT: dict[str, Any] = {}


def alone(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


class Wrapped:
    """A tokenizer that counts the characters it encodes quickly, and may end texts with an id when it is called."""

    def __init__(self, tokenizer: Any, *, odd: bool = False) -> None:
        self.tokenizer, self.odd, self.characters = tokenizer, odd, 0
        self.backend_tokenizer = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        ids = self.tokenizer(texts, **options)["input_ids"]
        if self.odd:
            ids = [*ids, 7] if isinstance(texts, str) else [[*each, 7] for each in ids]
        return {"input_ids": ids}

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)


@pytest.mark.parametrize("kind", TOKENIZERS)
@example(rows=[("a<|turn|>", ["the captain"]), (" <|turn|>", ["is", " is"])])
@given(rows=ROWS)
def test_ids_are_those_of_each_whole_text(kind: str, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_beginnings, "TEXTS_COMPARED", 0)
    tokenizer = BUILT.setdefault(kind, TOKENIZERS[kind]())
    prompts = [prompt for prompt, _ in rows]
    texts = [[prompt + ending for ending in endings] for prompt, endings in rows]
    prompt_ids, ids = SharedBeginnings(tokenizer).encode(prompts, texts)
    assert prompt_ids == alone(prompts, tokenizer)
    assert ids == [alone(group, tokenizer) for group in texts]


@pytest.mark.parametrize("kind", ["metaspace first", "bytes", "blanks on the left"])
def test_a_prompt_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_beginnings, "TEXTS_COMPARED", 0)
    monkeypatch.setattr(shared_beginnings, "_encodes_by_its_backend", lambda tokenizer: True)
    tokenizer = Wrapped(TOKENIZERS[kind]())
    shared = kind in EXACT
    mark = "<|assistant|>" if shared else "<|turn|>"
    prompt = "the capital of France " * 50 + mark
    SharedBeginnings(tokenizer).encode([prompt], [[prompt + "yes", prompt + "no"]])
    assert tokenizer.characters == (len(prompt) + 2 * len(mark) + 5 if shared else 3 * len(prompt) + 5)


def test_the_first_texts_show_where_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_beginnings, "_encodes_by_its_backend", lambda tokenizer: True)
    tokenizer = Wrapped(byte_level(False), odd=True)
    encoder = SharedBeginnings(tokenizer)
    for start in ("yes", "no"):
        prompts = [start + "<|assistant|>"] * 40
        texts = [[prompt + "Paris.", prompt + "is"] for prompt in prompts]
        assert encoder.encode(prompts, texts) == (
            alone(prompts, tokenizer),
            [alone(group, tokenizer) for group in texts],
        )


@pytest.mark.parametrize("sound", [1, 300])
def test_the_first_broken_row_is_named_whatever_is_broken_in_it(sound: int) -> None:
    row = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}
    rows = [row] * sound + [{**row, "prompt": " "}, {**row, "chosen": ""}]
    assert tokenising_refusal(datasets.Dataset.from_list(rows)).startswith(f"row {sound + 1}, column 'prompt'")
    assert tokenising_refusal(datasets.Dataset.from_list(rows[:sound] + rows[:-3:-1])).startswith(
        f"row {sound + 1}, column 'chosen'"
    )


def characters(specials: list[str], unknown: str | None = None) -> PreTrainedTokenizerFast:
    """One id for each character of a small alphabet; no other text has one."""
    vocabulary = {text: number for number, text in enumerate([*filter(None, [unknown]), *"<>#unkabcp "])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "text"),
    [
        (characters(["###"]), "p ####", "p ####" + "#c"),
        (characters(["###"]), "p ####", "p ####c"),
        (characters(["<unk>", "<<"], unknown="<unk>"), "<<unk>é", "<<unk>éc"),
    ],
    ids=["overlaps itself", "ends within itself", "unknown text"],
)
def test_tokens_that_may_overlap_part_no_text(tokenizer: Any, prompt: str, text: str) -> None:
    encoder = SharedBeginnings(tokenizer)
    encoder.encode(["a"] * 80, [["ab"]] * 80)  # all that is compared
    assert encoder.encode([prompt], [[text]]) == (
        tokenizer([prompt], add_special_tokens=False)["input_ids"],
        [tokenizer([text], add_special_tokens=False)["input_ids"]],
    )


class WithCodeOfItsOwn(PreTrainedTokenizerFast):
    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        replaced = [each.replace("a", "b") for each in text] if isinstance(text, list) else text.replace("a", "b")
        return super()._encode_plus(replaced, *args, **kwargs)


def test_code_around_the_backend_is_not_passed_by() -> None:
    tokenizer = WithCodeOfItsOwn(tokenizer_object=characters([]).backend_tokenizer)
    encoder = SharedBeginnings(tokenizer)
    encoder.encode(["p"] * 80, [["pc"]] * 80)
    (prompt,), ((text,),) = encoder.encode(["a"], [["ac"]])
    assert (prompt, text) == (tokenizer("b")["input_ids"], tokenizer("bc")["input_ids"])
