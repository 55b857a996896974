"""Token ids of texts that begin with the same prompt, of which the beginning is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

TEXTS_COMPARED = 64  # of the first ones, with their ids as the tokenizer gives them when it is called

Groups = list[list[list[int]]]  # the ids of each text of each prompt


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
    the prompt before it. Where this need not hold, texts are encoded whole: prompts without an added token, and added
    tokens that take the blanks before them, are looked for in normalised text or as whole words only, stand within the
    text of another, may begin in the text of one, or are what the tokenizer has for unknown text.

    The tokenizers of the package tokenizers encode a list of texts on all cores, here without offsets, which nothing
    needs. The first texts are also encoded by calling the tokenizer; where one differs, so are all.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_quick = bool(getattr(tokenizer, "is_fast", False)) and not tokenizer.split_special_tokens
        self._is_quick &= _encodes_by_its_backend(tokenizer)
        self._added: dict[int, Any] = dict(tokenizer.added_tokens_decoder) if self._is_quick else {}
        self._parting: dict[int, bool] = {}
        self._compared = 0

    def encode(self, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], Groups]:
        """The ids of prompts, and of the texts of each."""
        if self._is_quick and self._compared < TEXTS_COMPARED:
            some = prompts[:TEXTS_COMPARED], texts[:TEXTS_COMPARED]
            self._is_quick = self._quick(*some) == self._called(*some)
            self._compared += len(some[0])
        return self._quick(prompts, texts) if self._is_quick else self._called(prompts, texts)

    def _called(self, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], Groups]:
        def ids(parts: list[str]) -> list[list[int]]:
            found: list[list[int]] = self._tokenizer(parts, add_special_tokens=False)["input_ids"] if parts else []
            return found

        return ids([*prompts]), _grouped(ids([text for group in texts for text in group]), texts)

    def _quick(self, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], Groups]:
        self._tokenizer("", add_special_tokens=False)  # sets what the backend does: no truncation, no padding
        prompt_ids = self._ids(prompts)
        cuts = [self._cut(prompt, ids) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
        starts = [0 if cut is None else cut.characters for cut in cuts]
        ends = self._ids([text[start:] for start, group in zip(starts, texts, strict=True) for text in group])
        found: Groups = []
        for ids, cut, group, group_ends in zip(prompt_ids, cuts, texts, _grouped(ends, texts), strict=True):
            if cut is None:
                found.append(group_ends)
            elif all(end[:1] == [cut.token] for end in group_ends):
                found.append([ids[: cut.ids] + end for end in group_ends])
            else:
                found.append(self._ids(group))
        return prompt_ids, found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]

    def _cut(self, prompt: str, ids: list[int]) -> _Cut | None:
        at = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] in self._added), None)
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
                and token != self._tokenizer.unk_token_id
                and not any(added.content in other.content for key, other in self._added.items() if key != token)
                and not any(_may_overlap(other.content, added.content) for other in self._added.values())
            )
        return self._parting[token]


def _encodes_by_its_backend(tokenizer: Any) -> bool:
    """Whether its class adds no code of its own around what the package tokenizers does."""
    others = (cls for cls in type(tokenizer).__mro__ if cls.__module__.partition(".")[0] != "transformers")
    return not any({"__call__", "_encode_plus", "_batch_encode_plus"} & vars(cls).keys() for cls in others)


def _may_overlap(first: str, second: str) -> bool:
    """Whether a text may begin within another one that stands before it, and end behind that."""
    return any(first.endswith(second[:length]) for length in range(1, len(second)))


def _grouped(ids: Iterable[list[int]], groups: Sequence[Sequence[str]]) -> Groups:
    """Ids of the texts of groups, one after another, in these groups."""
    each: Iterator[list[int]] = iter(ids)
    return [[next(each) for _ in group] for group in groups]
