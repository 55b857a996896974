"""Time reading and tokenising preference pairs beside stock `datasets` and TRL.

    python benchmarks/bench_data.py --pairs pairs.jsonl                     # 100,000 pairs read, 20,000 tokenised
    python benchmarks/bench_data.py --pairs pairs.jsonl --only read --no-peers --rows 1000000

The rows of the file are written again and again, each with a number before its prompt, which makes them distinct. Every
measurement is a process of its own; providers have caches of their own. Reading is timed first with nothing kept, then
with what that kept. Memory is sampled: `anon` is what the process holds, `resident` has the mapped files with it, which
the system takes back where memory is short; both begin at what the imports take. Ratios are to the first of the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MB = 1e6
COLUMNS = ("what", "provider", "rows", "megabytes", "seconds", "cpu_seconds", "anon_mb", "resident_mb", "of_first")
LENGTHS = {"max_length": 1024, "max_prompt_length": 512, "truncation_mode": "keep_end"}
REPEATS = {"read": 2, "tokenize": 1}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(name)), 0.0)


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, those of all cores together, and the most memory of the process, in MB."""
    peak = {"anon_mb": 0.0, "resident_mb": 0.0}
    done = threading.Event()

    def sample() -> None:
        is_done = False
        while not is_done:
            is_done = done.wait(0.05)  # and once more behind the end, of work that takes less
            for key, name in (("anon_mb", "RssAnon:"), ("resident_mb", "VmRSS:")):
                peak[key] = max(peak[key], _status(name))

    watch = threading.Thread(target=sample)
    watch.start()
    start, of_cpu = time.perf_counter(), time.process_time()
    try:
        work()
        seconds, of_cpu = time.perf_counter() - start, time.process_time() - of_cpu
    finally:
        done.set()
        watch.join()
    return {"seconds": seconds, "cpu_seconds": of_cpu, **peak}


def read_with_dil_kernels(path: str, tokenizer: str) -> dict[str, float]:
    from dil_kernels.data import load_preference_pairs

    return measured(lambda: load_preference_pairs(path))


def read_with_datasets(path: str, tokenizer: str) -> dict[str, float]:
    import datasets

    return measured(lambda: datasets.load_dataset("json", data_files=path, split="train"))


def tokenize_with_dil_kernels(path: str, tokenizer: str) -> dict[str, float]:
    from transformers import AutoTokenizer

    from dil_kernels.data import load_preference_pairs, tokenize_dataset

    pairs, to_ids = load_preference_pairs(path), AutoTokenizer.from_pretrained(tokenizer)
    return measured(lambda: tokenize_dataset(pairs, to_ids, **LENGTHS))


def tokenize_with_trl(path: str, tokenizer: str) -> dict[str, float]:
    """What TRL's trainer does with its data set when it is made, on a model that is small."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    found: dict[str, float] = {}

    class Timed(DPOTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            found.update(measured(lambda: results.append(super(Timed, self)._prepare_dataset(*args, **kwargs))))
            return results[0]

    to_ids = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(to_ids), **sizes)) for _ in range(2))
    pairs = datasets.load_dataset("json", data_files=path, split="train")
    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(output, use_cpu=True, report_to=[])
        Timed(model=model, ref_model=reference, args=args, train_dataset=pairs, processing_class=to_ids)
    return found


PROVIDERS: dict[str, Mapping[str, Callable[[str, str], dict[str, float]]]] = {
    "read": {"dil_kernels": read_with_dil_kernels, "datasets": read_with_datasets},
    "tokenize": {"dil_kernels": tokenize_with_dil_kernels, "TRL": tokenize_with_trl},
}


def write_rows(source: Path, target: Path, rows: int) -> None:
    """The rows of a file of conversations, with distinct prompts, as often as are wanted."""
    given = [json.loads(line) for line in source.read_text().splitlines()]
    with target.open("w") as file:
        for number in range(rows):
            row = given[number % len(given)]
            first, *others = row["prompt"]
            first = {**first, "content": f"({number}) {first['content']}"}
            file.write(json.dumps({**row, "prompt": [first, *others]}, ensure_ascii=False) + "\n")


def run(what: str, provider: str, path: Path, tokenizer: str, cache: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", what, provider, str(path), tokenizer]
    # Everything that could be kept is in the directory of this measurement.
    environment = {**os.environ, "HF_DATASETS_CACHE": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} with {provider}: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="JSON lines of conversations: prompt, chosen, rejected")
    parser.add_argument("--tokenizer", help="a directory with a tokenizer that has a chat template; else SmolLM2's")
    parser.add_argument("--rows", type=int, default=100_000, help="that are read")
    parser.add_argument("--tokenized-rows", type=int, default=20_000)
    parser.add_argument("--only", choices=PROVIDERS, help="of the two")
    parser.add_argument("--no-peers", action="store_true", help="dil_kernels alone")
    parser.add_argument("--csv", type=Path, help="to write")
    parser.add_argument("--scratch", help="where the files are; about twice their size and their token ids")
    parser.add_argument("--one", nargs=4, metavar=("WHAT", "PROVIDER", "FILE", "TOKENIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        what, provider, *given = options.one
        print(json.dumps(PROVIDERS[what][provider](*given)))
        return 0
    if options.pairs is None:
        parser.error("--pairs is needed")
    tokenizer = options.tokenizer
    if tokenizer is None and options.only != "read":
        from dil_kernels.quickstart.smollm2 import prepare

        tokenizer = str(prepare(Path(__file__).parents[1] / "runs" / "smollm2"))
    found: list[dict[str, Any]] = []
    print(" ".join(f"{name:>12}" for name in COLUMNS))
    for what, providers in PROVIDERS.items():
        if options.only not in (None, what):
            continue
        rows = options.rows if what == "read" else options.tokenized_rows
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            path = Path(scratch) / "pairs.jsonl"
            write_rows(options.pairs, path, rows)
            for provider in list(providers)[: 1 if options.no_peers else None]:
                for repeat in range(REPEATS[what]):
                    values = run(what, provider, path, tokenizer or "", f"{scratch}/cache-{provider}")
                    first = next((each for each in found if each["what"] == what), values)
                    row = {
                        "what": what,
                        "provider": provider + (" again" if repeat else ""),
                        "rows": rows,
                        "megabytes": round(path.stat().st_size / MB),
                        **{name: round(value, 2) for name, value in values.items()},
                        "of_first": round(values["seconds"] / first["seconds"], 2),
                    }
                    found.append(row)
                    print(" ".join(f"{row[name]!s:>12}" for name in COLUMNS), flush=True)
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
