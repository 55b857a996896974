"""Preference pairs to token ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import datasets

from dil_kernels.data.cache_key import code_key
from dil_kernels.data.chat_template import ChatRenderer
from dil_kernels.data.columns import response_columns, say_once, without_padding
from dil_kernels.data.encoding import TextEncoder
from dil_kernels.data.kept_rows import kept_rows
from dil_kernels.data.loading import open_pairs, place
from dil_kernels.data.messages import PreferenceDataError
from dil_kernels.data.pair_storage import source_of
from dil_kernels.data.pairs import Pair, check_pair, is_conversational
from dil_kernels.data.shared_beginnings import SharedBeginnings
from dil_kernels.data.token_columns import GIVEN_REFERENCE
from dil_kernels.data.truncation import DataReport, is_too_long, resolve_prompt_length, truncate

ROWS_PER_BATCH = 256
NO_TEXT = "\U0010fffd"  # for private use: no vocabulary has it

logger = logging.getLogger(__name__)


def tokenize_dataset(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    truncation_mode: str,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Token ids of every pair, checked and truncated; warns of how many pairs were truncated.

    Args:
        dataset: pairs in any form that `load_preference_pairs` accepts.
        tokenizer: a transformers tokenizer; conversations need its chat template, strings its end-of-sequence token.
        max_length, max_prompt_length, truncation_mode: as in `truncate`; "drop" leaves out what is too long. Without
            max_prompt_length it is half of max_length.
        num_proc: processes to tokenise with.

    Returns:
        One row a pair: prompt_ids, chosen_ids and rejected_ids (lists of token ids), row (its place in `dataset`,
        counted from 1) and length (tokens of the longer sequence). One row a response, where these come unpaired:
        completion_ids and label in place of chosen_ids and rejected_ids. Reference log-probs that the data set has
        stay.

    Raises:
        PreferenceDataError: a pair is broken, has a text that would be left out, or a response that cannot be told
            from its prompt exactly; or every pair is too long.
        TypeError, ValueError: it is no data set; or an option is out of range or of another type.
    """
    tokenized, report = tokenize_and_report(
        dataset,
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation_mode=truncation_mode,
        num_proc=num_proc,
    )
    if report.dropped or report.prompts_cut or report.responses_cut or report.identical or report.unknown:
        logger.warning("%s", report)
    return tokenized


def tokenize_and_report(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    truncation_mode: str,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """As `tokenize_dataset`, and what became of the rows in place of a warning."""
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"preference pairs must come as a datasets.Dataset, got {type(dataset).__name__}")
    max_prompt_length = resolve_prompt_length(max_length, max_prompt_length, truncation_mode)
    source = source_of(dataset)
    dataset, first = open_pairs(dataset, source)
    features = dataset.features
    to_ids = PairTokenizer(tokenizer)

    def checked(batch: Mapping[str, list[Any]], indices: list[int]) -> Iterator[tuple[Pair, str]]:
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            record, where = dict(zip(batch, values, strict=True)), place(source, index + 1)
            yield check_pair(without_padding(record, features), where, first), where

    def row(pair: Pair, whole: tuple[list[int], ...], index: int) -> dict[str, Any]:
        prompt_ids, *responses = to_ids.truncated(
            whole, max_length=max_length, max_prompt_length=max_prompt_length, truncation_mode=truncation_mode
        )
        columns = [f"{column}_ids" for column in response_columns(pair)]
        lost = [len(ids) - len(kept) for ids, kept in zip(whole[1:], responses, strict=True)]
        return {
            "prompt_ids": prompt_ids,
            **dict(zip(columns, responses, strict=True)),
            **({"label": pair["label"]} if "label" in pair else {}),
            "row": index + 1,
            "length": len(prompt_ids) + max(map(len, responses)),
            "dropped": is_too_long(prompt_ids, responses, max_length),
            "prompt_lost": len(whole[0]) - len(prompt_ids),
            "responses_lost": sum(lost),
            "responses_cut": sum(count > 0 for count in lost),
            "identical": len(responses) == 2 and responses[0] == responses[1],
            "unknown": to_ids.count_unknown(prompt_ids, *responses),
            "notes": "",
        }

    def tokenize(batch: Mapping[str, list[Any]], indices: list[int], code: str) -> dict[str, list[Any]]:
        found = to_ids.of_many(checked(dict(batch), indices))
        rows = [row(pair, ids, index) for (pair, ids), index in zip(found, indices, strict=True)]
        rows[0]["notes"] = json.dumps(to_ids.notes)
        return {name: [each[name] for each in rows] for name in rows[0]}

    tokenized = kept_rows(
        lambda **keeping: dataset.map(
            tokenize,
            with_indices=True,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            remove_columns=[name for name in dataset.column_names if name not in GIVEN_REFERENCE],
            num_proc=num_proc,
            # `datasets` keeps results by the arguments, not by the code that this calls.
            fn_kwargs={"code": code_key()},
            desc="Tokenizing preference pairs",
            **keeping,
        ),
        source,
    )
    notes: dict[str, str] = {}
    for text in filter(None, tokenized.data.column("notes").unique().to_pylist()):
        notes = json.loads(text) | notes
    for note in notes.values():
        say_once(note)
    names = ("dropped", "prompt_lost", "responses_lost", "responses_cut", "identical", "unknown")
    counts = {name: tokenized.with_format("numpy")[name][:] for name in names}
    tokenized, kept = tokenized.with_format(None).remove_columns([*names, "notes"]), ~counts["dropped"]
    report = DataReport(
        rows=len(dataset),
        max_length=max_length,
        dropped=int((~kept).sum()),
        prompts_cut=int((counts["prompt_lost"] > 0).sum()),
        prompt_tokens_cut=int(counts["prompt_lost"].sum()),
        rows_with_responses_cut=int((counts["responses_cut"] > 0).sum()),
        responses_cut=int(counts["responses_cut"].sum()),
        response_tokens_cut=int(counts["responses_lost"].sum()),
        identical=int(counts["identical"][kept].sum()),
        unknown=int(counts["unknown"][kept].sum()),
        rows_with_unknown=int((counts["unknown"][kept] > 0).sum()),
    )
    if report.dropped == report.rows:
        raise PreferenceDataError(f"all {report.rows} rows are longer than max_length={max_length} tokens")
    return (tokenized.select(kept.nonzero()[0]) if report.dropped else tokenized), report


class _Texts(NamedTuple):
    """A pair as text.

    Attributes:
        prompt: up to where a response begins.
        joint: prompt and response, by column.
        conversational: whether a chat template rendered them.
        where: the place of the pair.
    """

    prompt: str
    joint: dict[str, str]
    conversational: bool
    where: str


class PairTokenizer:
    """Token ids of pairs, untruncated.

    A conversation goes through the chat template: its prompt ends where generation starts, and its response is all
    that follows: end-of-turn marks, and the messages of tools and users between the assistant's. A string begins with
    what the tokenizer begins a text with, and its response ends with the end-of-sequence token; neither stands twice.

    A prompt has the ids that it has alone, as generation has it, and those of a response follow it, see `TextEncoder`.

    Args:
        tokenizer: a transformers tokenizer; conversations need its chat template, strings its end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._encoder = TextEncoder(tokenizer)
        self._beginnings = SharedBeginnings(tokenizer)
        self._renderer = ChatRenderer(tokenizer)
        self._unknown = _unknown_id(tokenizer)
        self._said: set[str] = set()

    def __call__(self, pair: Pair, where: str) -> tuple[list[int], ...]:
        """The ids of the prompt and of each response: chosen and rejected, or the one completion.

        Raises:
            PreferenceDataError: the template leaves out a text, or renders the prompt differently within the
                conversation; the tokenizer cannot tell the response from the prompt; or one of them has no token.
        """
        [(_, ids)] = self.of_many([(pair, where)])
        for what, note in self.notes.items():
            if what not in self._said:
                say_once(note)
        self._said |= self.notes.keys()
        return ids

    @property
    def notes(self) -> dict[str, str]:
        """What is to be said of the rows so far, as of `ChatRenderer`."""
        return self._renderer.notes

    def count_unknown(self, *sequences: list[int]) -> int:
        """The token ids that stand for texts which the tokenizer has no token for."""
        return 0 if self._unknown is None else sum(ids.count(self._unknown) for ids in sequences)

    def of_many(self, rows: Iterable[tuple[Pair, str]]) -> list[tuple[Pair, tuple[list[int], ...]]]:
        """Pairs, each with its ids as when it is called for them one by one; their texts are encoded together.

        Args:
            rows: pairs, each with its place. Taking one may raise a `PreferenceDataError`, too.

        Raises:
            PreferenceDataError: as of a call; of several broken rows, the first one's.
        """
        pairs: list[Pair] = []
        texts: list[_Texts] = []
        problem: PreferenceDataError | None = None
        try:
            for pair, where in rows:
                texts.append(self._texts(pair, where))
                pairs.append(pair)
        except PreferenceDataError as error:  # a row before it may be broken in its ids
            problem = error
        prompts = [each.prompt for each in texts]
        encoded = self._beginnings.encode(prompts, [[*each.joint.values()] for each in texts])
        found = [self._ids(*of_row) for of_row in zip(texts, *encoded, strict=True)]
        if problem is not None:
            raise problem
        return list(zip(pairs, found, strict=True))

    def _texts(self, pair: Pair, where: str) -> _Texts:
        conversational = is_conversational(pair)
        prompt, joint = self._renderer.render(pair, where) if conversational else _join(pair)
        if not conversational and self._tokenizer.eos_token_id is None:
            raise PreferenceDataError(f"{where}: the tokenizer has no end-of-sequence token to end a response with")
        return _Texts(prompt, joint, conversational, where)

    def _ids(self, texts: _Texts, text_ids: list[int], joint_ids: list[list[int]]) -> tuple[list[int], ...]:
        """The ids of the prompt and of each response, from those of the texts."""
        prompt_ids = text_ids if texts.conversational else self._encoder.started(text_ids)
        if not prompt_ids:
            raise PreferenceDataError(
                f"{texts.where}, column 'prompt': the prompt has no token to predict the response from"
            )
        responses = []
        for (column, text), joint in zip(texts.joint.items(), joint_ids, strict=True):
            where = f"{texts.where}, column {column!r}"
            ids = self._encoder.response(text_ids, joint, texts.prompt, text, where)
            if not ids:
                raise PreferenceDataError(f"{where}: the response has no token")
            ids = self._encoder.ended(ids, append=not texts.conversational)
            responses.append(ids)
        return prompt_ids, *responses

    def truncated(self, ids: tuple[list[int], ...], **lengths: Any) -> tuple[list[int], ...]:
        """Ids cut as `truncate` cuts them; the prompt keeps its BOS."""
        return truncate(*ids, start_ids=self._encoder.start_of(ids[0]), **lengths)


def tokenize_pair(pair: Pair, tokenizer: Any, where: str) -> tuple[list[int], ...]:
    """Token ids of one pair, as of `PairTokenizer`."""
    return PairTokenizer(tokenizer)(pair, where)


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for texts without a token; None if every text has some, or if it is that of a BOS or EOS."""
    unknown: int | None = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return None
    return unknown if unknown in tokenizer(NO_TEXT, add_special_tokens=False)["input_ids"] else None


def _join(pair: Pair) -> tuple[str, dict[str, str]]:
    return pair["prompt"], {column: pair["prompt"] + pair[column] for column in response_columns(pair)}
