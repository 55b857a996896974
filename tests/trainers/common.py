"""What the checks of every trainer share: a tiny model, pairs, runs of commands, and the truth for a loss.

python tests/trainers/check_swift.py      in the environment of that trainer; `make trainers` builds and runs all
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))
V = 65_536
STEPS = 2
PAIRS = 4  # of a micro-batch
COMPARED = r"verified: loss (\S+)"


@dataclass
class Run:
    """What a command did."""

    output: str
    seconds: float
    peak_mb: float  # of the largest of its processes

    def found(self, pattern: str) -> list[float]:
        """The numbers that a pattern finds in the output."""
        return [float(value) for value in re.findall(pattern, self.output)]


def run(command: Iterable[str | Path], folder: Path, **environment: str) -> Run:
    """Run a command of a trainer to its end; its failure is the check's."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    path = [str(HERE / "startup"), environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "AXOLOTL_DO_NOT_TRACK": "1"}
    env = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, path)), **environment}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    log, start = folder / "log.txt", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    output = log.read_text()
    if status != 0:
        raise SystemExit(f"{output[-6000:]}\n{' '.join(words)}: status {os.waitstatus_to_exitcode(status)}")
    result = Run(output, time.monotonic() - start, usage.ru_maxrss / 1024)
    compared = len(result.found(COMPARED))
    print(f"  {result.seconds:.0f} s, {result.peak_mb:.0f} MB, {compared} losses compared", flush=True)
    return result


def check(trainer: str, stock: Run, ours: Run, verified: list[Run]) -> None:
    """What holds in every trainer, and the line of the table in docs/trainers.md.

    Args:
        trainer: its package.
        stock: a run of its own loss.
        ours: the same with the adapter.
        verified: further runs with the adapter in which every loss was compared with `fused_dil_loss`.
    """
    assert "dil_kernels in" not in stock.output
    for each in (ours, *verified):
        assert each.output.count("dil_kernels in") == 1, "the line is printed once, by the first process"
        assert "the fused head" in each.output
    for each in verified:
        assert each.found(COMPARED), "no loss was compared"
    assert ours.peak_mb < stock.peak_mb
    line = {
        "trainer": f"{trainer} {importlib.metadata.version(trainer)}",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "losses compared": [len(each.found(COMPARED)) for each in verified],
        "peak MB": [round(stock.peak_mb), round(ours.peak_mb)],
        "seconds": [round(stock.seconds), round(ours.seconds)],
    }
    print(json.dumps(line), flush=True)


def verifying(what: str = "hook") -> dict[str, str]:
    """The environment in which every process compares each loss with `fused_dil_loss`: see startup/verify_losses.py.

    Args:
        what: computes the losses, "hook" or "trl".
    """
    return {"DIL_VERIFY": what}


def temporary_folder() -> Path:
    """For the files of a check."""
    return Path(tempfile.mkdtemp(prefix="dil_trainers_"))


def make_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama with a head of V tokens, and a byte-pair tokenizer with a chat template."""
    from shared import load_model

    _, tokenizer = load_model(None)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of prompts and responses that all differ in length."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        words = ("the", "model", "answers", "every", "question", "with", "some", "care", "and", "a", "reason")
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [{"prompt": text(4, 12), "chosen": text(5, 45), "rejected": text(5, 45)} for _ in range(count)]
