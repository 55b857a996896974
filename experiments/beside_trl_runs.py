"""The runs of the experiment beside TRL: one trainer, loss, learning rate and seed each."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dil_kernels.cli.environment import describe_environment
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.models.evaluation import evaluating
from experiments import forced_choice
from experiments.scorer import Scorer, Sequences
from experiments.tables import describe_options, write_record

if TYPE_CHECKING:
    from experiments.beside_trl import Run

SPLIT_SEED = 20250305
HELD_OUT = 0.2  # share of the pairs
TIMED_STEPS = 8
EARLY = (5, 10, 30)  # steps after which a run is evaluated, too: much happens at first
VALIDATION = 0.15  # share of the rest, on which learning rates are chosen
ANSWERED_PROMPT_TOKENS = 512  # longer held-out prompts are not answered
ANSWERED_TOGETHER = {"cpu": 8, "cuda": 64}  # prompts


@dataclass(frozen=True)
class Problem:
    """What is trained, and on what."""

    model: Any  # the policy in fp32, as it starts
    tokenizer: Any
    train: Any  # rows of text
    judged: Any  # held-out pairs; in a tuning run, pairs of the training side that it does not train on


class Evaluation:
    """Log-probs and log ratios of pairs, in nats.

    Args:
        scorer: of the policy, as it is now: the reference.
        pairs: token ids.
    """

    def __init__(self, scorer: Scorer, pairs: Sequence[dict[str, Any]]) -> None:
        self.scorer = scorer
        self.sequences: Sequences = [
            (pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")
        ]
        self.lengths = torch.tensor([len(response) for _, response in self.sequences]).view(-1, 2)
        self.reference = self._score()
        self.start = self._seen(self.reference)

    def _score(self) -> Tensor:  # of whole responses, [pairs, 2]
        return self.scorer(self.sequences).view(-1, 2)

    def __call__(self) -> dict[str, Any]:
        """Of the policy now: means a token over the pairs, and the log ratios of the responses."""
        return self._seen(self._score())

    def _seen(self, logps: Tensor) -> dict[str, Any]:
        ratios = logps - self.reference
        chosen, rejected = (logps / self.lengths).mean(0).tolist()
        margins = (ratios / self.lengths) @ torch.tensor([1.0, -1.0], dtype=ratios.dtype)
        return {
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            "margin": margins.mean().item(),
            "accuracy": (margins > 0).double().mean().item(),
            "response_accuracy": (ratios[:, 0] > ratios[:, 1]).double().mean().item(),
            "log_ratios": ratios.tolist(),
        }


class Watch(TrainerCallback):
    """Times the steps and evaluates between them; what it saw is kept beside each checkpoint."""

    def __init__(self, evaluation: Evaluation | None, every: int, path: Path) -> None:
        self.evaluation, self.every, self.path = evaluation, every, path
        self.seen: dict[str, list[Any]] = {"step_seconds": [], "step_cpu_seconds": [], "curve": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the model as it starts, or take what was seen before the checkpoint."""
        if state.global_step == 0:
            self._evaluate(0)
            return
        earlier = json.loads(self.path.read_text())
        steps = state.global_step
        self.seen = {name: earlier[name][:steps] for name in ("step_seconds", "step_cpu_seconds")}
        self.seen["curve"] = [entry for entry in earlier["curve"] if entry["step"] <= steps]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clocks."""
        _synchronize()
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop them; evaluate where it is time to."""
        _synchronize()
        self.seen["step_seconds"].append(time.perf_counter() - self.started[0])
        self.seen["step_cpu_seconds"].append(time.process_time() - self.started[1])
        step = state.global_step
        if step % self.every == 0 or step == state.max_steps or (state.max_steps > max(EARLY) and step in EARLY):
            self._evaluate(step)
            write_record(self.path, self.seen)  # before the checkpoint of this step

    def _evaluate(self, step: int) -> None:
        if self.evaluation is None:
            return
        entry = {"step": step, **self.evaluation()}
        self.seen["curve"].append(entry)
        print(" ".join(f"{name}={value:.4g}" for name, value in entry.items() if name != "log_ratios"), flush=True)


def make(run: Run, learning_rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Make a run and say what was seen."""
    tuning = run.kind == "tuning"
    problem = load_problem(options, tuning)
    scorer, questions = Scorer(problem.model), forced_choice.items()[:: 16 if options.quick else 1]
    if run.kind == "start":
        return {
            "items": forced_choice.score(scorer, problem.tokenizer, questions),
            "kinds": [q.kind for q in questions],
        }
    evaluation = None
    if run.kind != "timing":
        evaluation = Evaluation(scorer, tokenized(problem.judged, problem.tokenizer, options.max_length))
    folder = run.folder(options)
    watch = Watch(evaluation, options.eval_steps, run.path(options, ".part"))
    steps = options.max_steps or options.epochs * (len(problem.train) // options.batch_size)
    if tuning:
        steps = max(1, len(problem.train) // options.batch_size // 3)
    if run.kind == "timing":
        steps = min(steps, TIMED_STEPS)
    config: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, steps // 10),
        "logging_steps": 1,
        "save_strategy": "steps" if run.kind == "run" and not options.no_checkpoints else "no",
        "save_steps": options.eval_steps,
        "save_total_limit": 1,
        "report_to": [],
        "bf16": options.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "max_length": options.max_length,
        "precompute_ref_log_probs": not options.random_llama,
        "seed": 42 + 1000 * run.seed,  # of the order; accelerate adds the epoch
        "disable_tqdm": True,
    }
    trainer = _make_trainer(run, problem, config, options, watch)
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():  # which is written last
            shutil.rmtree(checkpoint)
    checkpoints = list(folder.glob("checkpoint-*"))
    _reset_peak()
    try:
        trainer.train(resume_from_checkpoint=bool(checkpoints))
    except FloatingPointError:
        if not tuning:
            raise
        assert evaluation is not None
        lost = {"step": steps, **evaluation.start, "margin": -math.inf}
        return {"learning_rate": learning_rate, "validation": lost}
    peak, seconds = _peak_bytes(), watch.seen["step_seconds"]
    first = 2 if len(seconds) > 4 else 0  # compilation and warm-up
    tokens = _tokens(trainer, tokenized(problem.train, problem.tokenizer, options.max_length), len(seconds))
    record = {
        "learning_rate": learning_rate,
        "steps": len(seconds),
        "seconds_per_step": median(seconds[first:]),
        "cpu_seconds_per_step": median(watch.seen["step_cpu_seconds"][first:]),
        "tokens_per_second": sum(tokens[first:]) / sum(seconds[first:]),
        "pairs_at_a_time": config["per_device_train_batch_size"],
        "peak_bytes": peak,
        **watch.seen,
        "log": trainer.state.log_history,
        "options": describe_options(options),
        "environment": describe_environment(),
    }
    record["held_out"] = record.pop("curve")
    if run.kind == "timing":
        return record
    if tuning:
        (*_, validation) = record.pop("held_out")
        return {**record, "validation": validation}
    assert evaluation is not None
    record["lengths"] = evaluation.lengths.tolist()
    if not options.random_llama:
        record["items"] = forced_choice.score(scorer, problem.tokenizer, questions)
        if options.answers:
            record["answers"] = _answers(scorer, load_problem(options, tuning), options)
    return record


def _make_trainer(run: Run, problem: Problem, config: dict[str, Any], options: argparse.Namespace, watch: Watch) -> Any:
    """`DILTrainer`, each prompt once unless the arm says otherwise, or TRL's `DPOTrainer`."""
    what = {"model": problem.model, "train_dataset": problem.train, "processing_class": problem.tokenizer}
    what["callbacks"] = [watch]
    assert run.arm is not None
    config |= run.arm.options
    micro_batch = run.arm.pairs_at_a_time(options)
    config["per_device_train_batch_size"] = micro_batch
    config["gradient_accumulation_steps"] = options.batch_size // micro_batch
    if run.arm.trainer == "trl":
        from trl import DPOConfig, DPOTrainer

        config["precompute_ref_batch_size"] = micro_batch
        reference = None if config["precompute_ref_log_probs"] else copy.deepcopy(problem.model)
        return DPOTrainer(ref_model=reference, args=DPOConfig(**config), **what)
    from dil_kernels.trainer import DILConfig, DILTrainer

    return DILTrainer(args=DILConfig(**{"prefix_sharing": True, **config}), **what)


@torch.no_grad()
def _answers(scorer: Scorer, start: Problem, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Answers that the policy samples to held-out prompts, with their log-probs under policy and reference.

    They end after `options.answer_tokens` at the latest.
    """
    torch.manual_seed(0)
    pairs = tokenized(start.judged, start.tokenizer, options.max_length)
    prompts = [pair["prompt_ids"] for pair in pairs if len(pair["prompt_ids"]) <= ANSWERED_PROMPT_TOKENS]
    prompts.sort(key=len)
    end, sequences = start.tokenizer.eos_token_id, []
    together = ANSWERED_TOGETHER[scorer.model.device.type]
    for first in range(0, len(prompts), together):
        group = [prompt for prompt in prompts[first : first + together] for _ in range(options.answers)]
        longest = max(map(len, group))
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in group])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in group])
        with evaluating(scorer.model):
            answers = scorer.model.generate(
                input_ids=ids.to(scorer.model.device),
                attention_mask=mask.to(scorer.model.device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=options.answer_tokens,
                pad_token_id=end,
                eos_token_id=end,
            )
        for prompt, answer in zip(group, answers[:, longest:].tolist(), strict=True):
            sequences.append((prompt, answer[: answer.index(end) + 1] if end in answer else answer))
    logps, ref_logps = scorer(sequences).tolist(), Scorer(start.model)(sequences).tolist()
    return [
        {
            "prompt": number // options.answers,
            "tokens": len(answer),
            "ended": answer[-1] == end,
            "logp": logps[number],
            "ref_logp": ref_logps[number],
        }
        for number, (_, answer) in enumerate(sequences)
    ]


def load_problem(options: argparse.Namespace, tuning: bool) -> Problem:
    """What a run of the command line trains, and on what."""
    model, tokenizer = load_model(options.model, quick=options.quick, random_llama=options.random_llama)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return make_problem(model, tokenizer, options.pairs, options.max_length, tuning=tuning)


def make_problem(model: Any, tokenizer: Any, path: Path | None, max_length: int, *, tuning: bool = False) -> Problem:
    """Pairs of a file, none longer than the maximum; no prompt is both trained on and judged by."""
    from dil_kernels.data import load_preference_pairs
    from dil_kernels.quickstart.embedded import load_embedded_pairs

    pairs = load_embedded_pairs("train") if path is None else load_preference_pairs(path)
    lengths = tokenized(pairs, tokenizer, None)["length"]
    pairs = pairs.select([index for index, length in enumerate(lengths) if length <= max_length])
    train, held_out = _split(pairs.shuffle(seed=SPLIT_SEED), HELD_OUT)
    return Problem(model, tokenizer, *(_split(train, VALIDATION) if tuning else (train, held_out)))


def _split(pairs: Any, share: float) -> tuple[Any, Any]:
    """The rest, and this share of the pairs or a little more: all pairs of the first prompts."""
    of_prompts: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        of_prompts.setdefault(json.dumps(pair["prompt"]), []).append(index)
    rows: list[int] = []
    for of_prompt in of_prompts.values():
        if len(rows) >= max(1.0, share * len(pairs)):
            break
        rows += of_prompt
    return pairs.select(sorted({*range(len(pairs))} - {*rows})), pairs.select(rows)


def load_model(model: Path | None, *, quick: bool, random_llama: bool = False) -> tuple[Any, Any]:
    """The model of a directory (default: SmolLM2-135M), a tiny one or a random 1B-class one, in fp32; its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if quick:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        from shared import load_model as load_tiny

        return load_tiny(None)
    from dil_kernels.quickstart.smollm2 import prepare

    directory = model or prepare("runs/smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not random_llama:
        return AutoModelForCausalLM.from_pretrained(directory), tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def tokenized(pairs: Any, tokenizer: Any, max_length: int | None) -> Any:
    """Token ids of the pairs."""
    half = None if max_length is None else max_length // 2
    return tokenize_dataset(pairs, tokenizer, max_length=max_length, max_prompt_length=half, truncation_mode="keep_end")


def _tokens(trainer: Any, pairs: Any, steps: int) -> list[int]:
    """Tokens of prompts and responses in each step, padding not counted; epochs after the first count as it does."""
    of_pairs = [2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]
    batches = [sum(of_pairs[row] for row in rows) for rows in trainer.get_train_dataloader().batch_sampler]
    micro_batches = trainer.args.gradient_accumulation_steps
    epoch = [sum(batches[first : first + micro_batches]) for first in range(0, len(batches), micro_batches)]
    return [epoch[step % len(epoch)] for step in range(steps)]


def _reset_peak() -> None:
    """Let `_peak_bytes` be that of what follows."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # where that is not allowed it stays that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """On a GPU of what torch allocated; else of the process, evaluation included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().split()
        return 1024 * int(status[status.index("VmHWM:") + 1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
