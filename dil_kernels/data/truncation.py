"""Pairs that are too long: what is cut or left out, and how much of a data set it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dil_kernels.checks import check_choice, check_count

TRUNCATION_MODES = ("keep_end", "keep_start", "drop")


def resolve_prompt_length(max_length: int | None, max_prompt_length: int | None, truncation_mode: str) -> int | None:
    """Check what says how pairs are cut; the tokens of a prompt that are kept, by default half of `max_length`.

    Args:
        max_length, max_prompt_length, truncation_mode: as of `truncate`.

    Raises:
        TypeError, ValueError: names the argument.
    """
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if value is not None:
            check_count(name, value)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token of prompt and one of response; got {max_length}")
    if truncation_mode == "drop":
        if max_length is None:
            raise ValueError("truncation_mode='drop' was given, but max_length=None leaves nothing out")
        if max_prompt_length is not None:
            raise ValueError(
                f"max_prompt_length={max_prompt_length} was given, but truncation_mode='drop' cuts no prompt"
            )
        return None
    if max_length is None:
        if max_prompt_length is not None:
            raise ValueError(f"max_prompt_length={max_prompt_length} was given, but max_length=None cuts nothing")
        return None
    if max_prompt_length is None:
        return max_length // 2
    if not 1 <= max_prompt_length < max_length:
        raise ValueError(
            f"max_prompt_length must be from 1 to max_length - 1 = {max_length - 1}, so that a token of each response "
            f"is left; got {max_prompt_length}"
        )
    return max_prompt_length


def is_too_long(prompt_ids: Sequence[int], responses: Sequence[Sequence[int]], max_length: int | None) -> bool:
    """Whether the prompt with the longer response has more than `max_length` tokens; None is no limit."""
    return max_length is not None and len(prompt_ids) + max(map(len, responses)) > max_length


def truncate(
    prompt_ids: list[int],
    *responses: list[int],
    max_length: int | None,
    max_prompt_length: int | None,
    truncation_mode: str,
    start_ids: Sequence[int] = (),
) -> tuple[list[int], ...]:
    """Cut a pair that is longer than `max_length`: first its prompt, then the ends of its responses.

    A response is cut where the prompt leaves no room for it, and only then.

    Args:
        max_length: tokens of prompt and response; None cuts nothing.
        max_prompt_length: tokens of the prompt that a pair that is too long keeps; below `max_length`, so that each
            response keeps a token.
        truncation_mode: "keep_end" or "keep_start" of the prompt; "drop" cuts nothing.
        start_ids: what the prompt begins with and keeps in any case, its BOS.

    Returns:
        The ids that remain.
    """
    if truncation_mode == "drop" or not is_too_long(prompt_ids, responses, max_length):
        return prompt_ids, *responses
    assert max_length is not None
    assert max_prompt_length is not None
    if truncation_mode == "keep_start":
        prompt_ids = prompt_ids[:max_prompt_length]
    elif len(prompt_ids) > max_prompt_length:
        start = prompt_ids[: min(len(start_ids), max_prompt_length)]
        prompt_ids = start + prompt_ids[len(prompt_ids) - max_prompt_length + len(start) :]
    room = max_length - len(prompt_ids)
    return prompt_ids, *(ids[:room] for ids in responses)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of a data set; a row is a pair, or a response that comes without one."""

    rows: int  # that were read
    max_length: int | None
    dropped: int = 0  # rows left out as too long
    prompts_cut: int = 0
    prompt_tokens_cut: int = 0
    rows_with_responses_cut: int = 0
    responses_cut: int = 0  # each lost its end, and with it its end-of-sequence or end-of-turn token
    response_tokens_cut: int = 0
    identical: int = 0  # pairs with the same chosen and rejected tokens
    unknown: int = 0  # tokens that stand for texts which the tokenizer has none for
    rows_with_unknown: int = 0

    def __str__(self) -> str:
        """One line, of what there is to say."""
        parts = [f"{self.rows} rows"]
        if self.dropped:
            parts.append(f"left out as longer than {self.max_length} tokens: {self.dropped}")
        if self.prompts_cut:
            parts.append(
                f"prompts cut to fit {self.max_length} tokens: {self.prompts_cut} (by {self.prompt_tokens_cut})"
            )
        if self.responses_cut:
            parts.append(
                f"responses cut and left without their end: {self.responses_cut} (by {self.response_tokens_cut}), in "
                f"{self.rows_with_responses_cut} rows"
            )
        if len(parts) == 1:
            parts.append("none truncated")
        if self.identical:
            parts.append(f"with the same chosen and rejected tokens: {self.identical}")
        if self.unknown:
            parts.append(
                f"texts that the tokenizer has no token for: {self.unknown}, in {self.rows_with_unknown} rows; what "
                "stood there is not learnt"
            )
        return "; ".join(parts)
