"""Every example of the README and of a page of the documentation runs, in its order, on tiny models and data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import make_model, make_pairs, make_tokenizer, write_lines

from dil_kernels import sequence_logps
from dil_kernels.cli.arguments import build_parser
from dil_kernels.losses.registry import _REGISTRY

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
# A block, and the reason why it is not run, where the line before it says so.
PYTHON = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = {page: list(PYTHON.finditer(page.read_text(encoding="utf-8"))) for page in PAGES}
EXAMPLES = {
    f"{page.relative_to(ROOT)} {number}": (page, number)
    for page, blocks in BLOCKS.items()
    for number, _ in enumerate(blocks)
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> Iterator[None]:
    """A directory with the files that examples read; what they register is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name, seed in (("pairs.jsonl", 0), ("held_out.jsonl", 1)):
        write_lines(tmp_path / name, *make_pairs(4, seed))
    registered = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(registered)


def names() -> dict[str, Any]:
    """What examples take as given: a model, its tokenizer and a batch of one pair, with all that is known of them."""
    tokenizer, model, ref = make_tokenizer(), make_model(), make_model(seed=1).requires_grad_(False)
    prompt, chosen, rejected = ([6, 7, 8, 9], [10, 11], [12, 13, 14])
    rows = [prompt + response for response in (chosen, rejected)]
    input_ids = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (8 - len(row)) for row in rows])
    labels = torch.where(attention_mask.bool() & (torch.arange(8) >= len(prompt)), input_ids, -100)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    logits, ref_logits = model(**batch).logits.detach().requires_grad_(), ref(**batch).logits
    hidden_states = model.model(**batch).last_hidden_state
    ref_chosen_logps, ref_rejected_logps = sequence_logps(ref_logits, labels).chunk(2)
    return {
        **{"tokenizer": tokenizer, "model": model, "ref": ref, "policy": model, "wrapped_policy": model},
        **{"prompt": prompt, "chosen": chosen, "rejected": rejected, "labels": labels, "train_dataset": make_pairs(4)},
        **{"input_ids": input_ids, "attention_mask": attention_mask, "ids": input_ids, "mask": attention_mask},
        **{"logits": logits, "ref_logits": ref_logits, "hidden_states": hidden_states},
        **{"my_logits": logits, "my_head": model.lm_head.weight, "lm_head": model.lm_head},
        **{"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps},
        **{"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([3])},
    }


@pytest.fixture
def group() -> Iterator[None]:
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("page", "number"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_runs(page: Path, number: int, request: pytest.FixtureRequest) -> None:
    """After those that stand before it on its page, whose names it may use."""
    *before, example = BLOCKS[page][: number + 1]
    if example["reason"]:
        pytest.skip(example["reason"])
    if "torch.distributed" in example["code"]:
        request.getfixturevalue("group")
    given = names()
    for block in (*before, example):
        if "dil_kernels.integrations.trl" in block["code"]:
            pytest.importorskip("trl", reason="needs the extra [trl]")
        if not block["reason"]:
            exec(compile(block["code"], f"{page.name}, example {number + 1}", "exec"), given)


COMMANDS = {
    command: page.name
    for page in (*PAGES, ROOT / "dil_kernels" / "recipes" / "README.md")
    for command in re.findall(r"^(?:.* )?dil-train\)? (--.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS.values())
def test_the_options_of_a_command_exist(command: str) -> None:
    given = {word for word in shlex.split(command, comments=True) if word.startswith("--")}
    assert given
    assert given <= set(build_parser()._option_string_actions)
