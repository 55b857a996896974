"""Token ids of texts that begin with the same prompt, of which the beginning is encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

TEXTS_COMPARED = 64  # of the first ones, with their ids as of the whole text


class _Cut(NamedTuple):
    """Where the texts of a prompt are cut: before the last added token of the prompt."""

    token: int  # the added token
    ids: int  # of the prompt before it
    characters: int


class SharedBeginnings:
    """Encodes prompts, and the texts that begin with them, without special tokens before or behind.

    A tokenizer takes a text apart at its added tokens before all else, so that what stands before one and what begins
    with one have the ids that they have alone. So of the texts of a prompt only what begins with the last added token
    of the prompt, in most chat templates the mark of the turn that the response is in, is encoded behind the ids of
    the prompt before it. Where this need not hold, texts are encoded whole: prompts without an added token; tokens that
    take the blanks before them, are looked for in normalised text or as whole words only, or stand within the text of
    another added token; tokenizers that are not of the package tokenizers. The first texts are encoded both ways, and
    none is cut any more where one differs.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        cuts = getattr(tokenizer, "is_fast", False) and not getattr(tokenizer, "split_special_tokens", False)
        self._added: dict[int, Any] = dict(tokenizer.added_tokens_decoder) if cuts else {}
        self._parting: dict[int, bool] = {}
        self._compared = 0

    def encode(
        self, prompts: Sequence[str], texts: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """The ids of prompts, and of the texts of each."""
        prompt_ids = self._ids(prompts)
        cuts = [self._cut(prompt, ids) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
        starts = [0 if cut is None else cut.characters for cut in cuts]
        tails = self._by_prompt(
            [text[start:] for start, group in zip(starts, texts, strict=True) for text in group], texts
        )
        found = []
        for ids, cut, group, ends in zip(prompt_ids, cuts, texts, tails, strict=True):
            if cut is not None and any(end[:1] != [cut.token] for end in ends):
                found.append(self._ids(group))
            else:
                found.append(ends if cut is None else [ids[: cut.ids] + end for end in ends])
        return prompt_ids, found if self._compared >= TEXTS_COMPARED else self._compare(texts, found)

    def _compare(self, texts: Sequence[Sequence[str]], found: list[list[list[int]]]) -> list[list[list[int]]]:
        """The ids that were found, or those of the whole texts if these differ."""
        compared = texts[:TEXTS_COMPARED]
        self._compared += sum(map(len, compared))
        whole = self._by_prompt([text for group in compared for text in group], compared)
        if whole == found[: len(whole)]:
            return found
        self._added = {}
        return self._by_prompt([text for group in texts for text in group], texts)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _by_prompt(self, texts: list[str], groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The ids of texts, in groups of the sizes of some others."""
        ids: Iterator[list[int]] = iter(self._ids(texts))
        return [[next(ids) for _ in group] for group in groups]

    def _cut(self, prompt: str, ids: list[int]) -> _Cut | None:
        at = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] in self._added), None) if self._added else None
        if at is None or not self._parts(ids[at]):
            return None
        token, text = ids[at], self._added[ids[at]].content
        # Then every place where the text of the token stands is one of the token.
        return _Cut(token, at, prompt.rindex(text)) if prompt.count(text) == ids.count(token) else None

    def _parts(self, token: int) -> bool:
        """Whether a text may be cut before an added token."""
        if token not in self._parting:
            added = self._added[token]
            self._parting[token] = (
                added.special
                and not (added.lstrip or added.single_word or added.normalized)
                and not any(added.content in other.content for key, other in self._added.items() if key != token)
            )
        return self._parting[token]
