"""Text to token ids: a prompt as generation has it, and a response that is exactly what follows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dil_kernels.data.messages import PreferenceDataError

# Texts that a response is encoded behind, so that it gets no dummy space; the first that stays apart from it is taken.
ANCHORS = ("\n", "0", "a", ".")
NEAR = 32  # tokens on each side of a boundary
BLANKS = " \t\r\n"  # what templates write behind an end of sequence; anything else is text


class TextEncoder:
    """Token ids of prompts and responses.

    A prompt has the ids that it has alone, as the model is given it. Those of a response follow them in the ids of the
    joint text; where tokens merge across the boundary, so that the joint text begins otherwise, they are an encoding of
    the response that decodes, behind the prompt, to what the joint text decodes to.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token_id
        bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        self._start = full[:at]  # what the tokenizer puts before a text, its BOS
        self._blank: dict[tuple[int, ...], bool] = {}  # of one or two ids, which end most responses

    def encode(self, text: str) -> list[int]:
        """The ids of a text, and nothing before or behind them."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def started(self, prompt_ids: list[int]) -> list[int]:
        """The ids of a prompt behind what the tokenizer begins a text with, unless they themselves begin so."""
        return prompt_ids if prompt_ids[: len(self._start)] == self._start else [*self._start, *prompt_ids]

    def response(self, prompt_ids: list[int], joint: list[int], prompt: str, text: str, where: str) -> list[int]:
        """The ids of what follows the prompt in a text.

        Args:
            prompt_ids: of the prompt, as `encode` has them.
            joint: of the joint text, likewise.
            prompt: the text's beginning.
            text: the joint text.
            where: its place, for the message.

        Raises:
            PreferenceDataError: the tokenizer has no ids for the response that decode to it behind this prompt.
        """
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        response = text[len(prompt) :]
        found = []
        for ids in self._continuations(response):
            if self._follows(prompt_ids, ids, response):
                return ids
            found.append(ids)
        right = {text, self._decode(joint)}  # which differ where the tokenizer changes texts or knows no token for one
        for ids in found:
            if self._decode(prompt_ids + ids) in right:
                return ids
        alone = found[0]
        if self._drops_blanks() and _squeezed(self._decode(prompt_ids + alone)) in map(_squeezed, right):
            return alone
        raise PreferenceDataError(
            f"{where}: the tokenizer has no token ids for {response[:20]!r} that decode to it behind {prompt[-20:]!r}, "
            "where a token of the joint text spans the end of the prompt; end the prompt where a token ends"
        )

    def ended(self, ids: list[int], *, append: bool) -> list[int]:
        """The ids of a response with one end-of-sequence token at its end, however often it stands there.

        Blanks between two of them go with the first.

        Args:
            ids: of the response.
            append: add the token where it is missing; blanks may follow one that is there.
        """
        if self._end in ids:
            last = len(ids) - 1 - ids[::-1].index(self._end)
            if self._is_blank(ids[last + 1 :]):
                first = last
                for at in range(last - 1, -1, -1):
                    if ids[at] == self._end:
                        first = at
                    elif not self._is_blank([ids[at]]):
                        break
                return ids[:first] + ids[last:]
        return [*ids, self._end] if append else ids

    def start_of(self, prompt_ids: list[int]) -> list[int]:
        """The BOS that a prompt begins with, which truncation keeps; nothing where the token only opens messages."""
        if self._start:
            return self._start if prompt_ids[: len(self._start)] == self._start else []
        start = prompt_ids[:1]
        return start if start == [self._tokenizer.bos_token_id] and prompt_ids.count(start[0]) == 1 else []

    def _continuations(self, response: str) -> Iterator[list[int]]:
        """Encodings of the response that may decode to it in the middle of a text."""
        yield self.encode(response)
        for anchor in ANCHORS:
            ids, both = self.encode(anchor), self.encode(anchor + response)
            if both[: len(ids)] == ids:
                yield both[len(ids) :]

    def _follows(self, prompt_ids: list[int], ids: list[int], response: str) -> bool:
        """Whether ids decode to the response behind the prompt, by the tokens next to the boundary.

        Those further on are in any case what the tokenizer makes of the text.
        """
        before, after = prompt_ids[-NEAR:], ids[:NEAR]
        expected, decoded = self._decode(before) + response, self._decode(before + after)
        return expected.startswith(decoded) and (len(ids) > NEAR or decoded == expected)

    def _drops_blanks(self) -> bool:
        """Whether the ids do not tell blanks apart, so that no decoded text can be expected to have those given."""
        return self.encode("a  b") == self.encode("a b")

    def _is_blank(self, ids: list[int]) -> bool:
        """Whether ids decode to blanks, or nothing."""
        key = tuple(ids)
        if key in self._blank:
            return self._blank[key]
        blank = not self._decode(ids).strip(BLANKS)
        if len(ids) <= 2:
            self._blank[key] = blank
        return blank

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _squeezed(text: str) -> str:
    return "".join(text.split())
