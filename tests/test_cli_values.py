"""Values that no option of dil-train can have: each is refused by name, before anything is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest
import torch

from dil_kernels import backends
from dil_kernels.cli import programs
from dil_kernels.cli.arguments import build_parser, parse_arguments
from dil_kernels.cli.option_names import as_on_command_line

OPTIONS = {action.dest: action for action in build_parser()._actions if action.dest != "help"}
NONSENSE = {
    "INT": ("", "x", "1.5", "nan", "inf", "-1", str(10**30)),
    "FLOAT": ("", "x", "nan", "inf", "-inf", "-1", "1e400"),
    "BOOL": ("", "maybe", "2"),
    "JSON": ("", "nonsense", "{", "[1]", "5"),
    "DIR": ("", "/dev/null/nowhere"),
}
MEANINGFUL = {("offset", "-1"), ("max_steps", "-1"), ("local_rank", "-1")}
CHECKED_LATER = {"config"}  # with a value, they are looked up


class LoadedError(BaseException):
    """Raised where data would be read."""


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and last line of a command; 0 where it would go on to load data."""

    def load(*args: object) -> None:
        raise LoadedError

    monkeypatch.setattr(programs, "_check_files", lambda options: None)
    monkeypatch.setattr(programs, "_load_tokenizer", load)
    monkeypatch.setattr(programs, "_load_data", load)
    try:
        status = programs.main(argv)
    except SystemExit as end:
        status = end.code
    except LoadedError:
        status = 0
    lines = capsys.readouterr().err.strip().splitlines()
    return status, lines[-1] if lines else ""


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    options = {"model": "m", "train-file": "t.jsonl", "eval-file": "e.jsonl", "output-dir": tmp_path / "out"}
    return [f"--{name}={value}" for name, value in options.items()] + ["--lora-rank=4", "--use-cpu"]


def values_of(action: argparse.Action) -> tuple[str, ...]:
    if action.choices is not None:
        return "", "nonsense"
    return NONSENSE.get(str(action.metavar), ("",))


@pytest.mark.parametrize("name", OPTIONS)
def test_nonsense_is_refused_by_name_before_anything_is_loaded(
    name: str, base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    action = OPTIONS[name]
    for value in values_of(action):
        status, line = run([*base, f"{action.option_strings[0]}={value}"], monkeypatch, capsys)
        if (name, value) in MEANINGFUL:
            assert status == 0, line
            continue
        assert status == 2, (value, line)
        assert line.startswith("dil-train: error: "), (value, line)
        assert action.option_strings[0] in line, (value, line)
    assert not os.path.exists(base[3].removeprefix("--output-dir="))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--learning-rate=-1e-6", "--learning-rate must be at least 0 and at most 10000, got -1e-06"),
        ("--max-steps=0", "--max-steps must be -1, or at least 1, got 0"),
        ("--num-train-epochs=0", "--num-train-epochs must be above 0 and at most 1000000000, got 0.0"),
        ("--gradient-accumulation-steps=0", "--gradient-accumulation-steps must be at least 1"),
        ("--adam-beta2=1", "--adam-beta2 must be at least 0 and below 1, got 1.0"),
        (
            "--save-total-limit=0",
            "--save-total-limit must be at least 1 (1 keeps the last checkpoint alone, --save-total-limit none all; "
            "--save-strategy no writes none), got 0",
        ),
        (
            "--backend=triton",
            "--backend triton was asked for but cannot run: Triton kernels take CUDA tensors, not cpu",
        ),
        ("--use-liger-kernel", "--use-liger-kernel true was given, but Liger's kernels need a GPU"),
        (
            "--metric-for-best-model=rewards/margin",
            "--metric-for-best-model rewards/margin: evaluation has no such metric",
        ),
        ('--lr-scheduler-kwargs={"a": 1}', "--lr-scheduler-type linear, --lr-scheduler-kwargs"),
        ("--optim-args=nonsense", "--optim adamw_torch"),
        ("--torch-compile-backend=nonsense", "--torch-compile-backend nonsense: unknown; available: "),
        ("--torch-compile-mode=nonsense", "--torch-compile-mode nonsense: unknown; available: default"),
        ("--deepspeed=nowhere.json", "argument --deepspeed: expected a JSON object, got 'nowhere.json'"),
        (
            "--max-prompt-length=8 --max-length=none",
            "--max-prompt-length 8 was given, but --max-length none cuts nothing",
        ),
        ("--alpha=nan", "--alpha must be in [0, 1], got nan"),
        ("--lora-dropout=0.1", "--lora-dropout 0.1 was given, but --disable-dropout true, the default, switches it"),
        ('--lora-kwargs={"lora_dropout": 2}', "--lora-dropout must be at least 0 and below 1, got 2"),
        (
            '--lora-kwargs={"use_dorra": true}',
            "--lora-kwargs: 'use_dorra' is no field of peft.LoraConfig; did you mean 'use_dora'?",
        ),
        ('--lora-kwargs={"r": 4}', "--lora-kwargs: 'r' is the option --lora-rank"),
        ('--lora-kwargs={"bias": "some"}', "'bias' must be Literal['none', 'all', 'lora_only'], got 'some'"),
        ('--lora-kwargs={"modules_to_save": ["a", 1]}', "'modules_to_save' must be Optional[list[str]], got ['a', 1]"),
        ("--lora-kwargs={'x'}", "argument --lora-kwargs: expected a JSON object"),
        ("--bnb-4bit-quant-type=nf4", "--bnb-4bit-quant-type needs --load-in-4bit"),
        ("--load-in-4bit --llm-int8-threshold=5", "--llm-int8-threshold needs --load-in-8bit"),
        ("--load-in-4bit --load-in-8bit", "--load-in-4bit true was given, and --load-in-8bit true, too: choose one"),
        (
            '--bnb-kwargs={"bnb_4bit_compute": "bfloat16"}',
            "no field of transformers.BitsAndBytesConfig; did you mean 'bnb_4bit_compute_dtype'?",
        ),
        ('--bnb-kwargs={"load_in_8bit": true}', "--bnb-kwargs: 'load_in_8bit' is the option --load-in-8bit"),
        ('--model-init-kwargs={"dtype": "auto"}', "--model-init-kwargs: 'dtype' is the option --dtype"),
        ("--model=. --model-revision=v1", "--model-revision v1 was given, but . is a local directory"),
        ("--chat-template-path=none.jinja", "--chat-template-path none.jinja: No such file or directory"),
        ("--dataset-config=en", "--dataset-config en was given, but t.jsonl, e.jsonl is no hub data set"),
        ("--test-split-size=0.1", "--test-split-size was given, and --eval-file, too: choose what is held out"),
        ('--datasets={"path": "a.jsonl"}', "--train-file was given, and --datasets, too"),
        ("--train-file=q.jsonl", "error: --train-file stands twice, and only one value would be read"),
        ("--lora_rank 8", "error: --lora-rank stands twice, and only one value would be read"),
        (
            "--report-to=none --report-to=tensorboard",
            "error: --report-to stands twice, and only one value would be read; several go behind one",
        ),
        ("--stash-bytes=8 --fused-head=no", "--stash-bytes 8 was given, but --fused-head false keeps none"),
        ('--lr-scheduler-kwargs={"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("--lr-scheduler-kwargs=" + "[" * 100_000 + "{", "(objects or lists are nested too deeply)"),
        ("--deepspeed=" + "x" * 5000 + "{", "argument --deepspeed: expected a JSON object, got 'xxx"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_loaded(
    options: str, message: str, base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "triton_interpreted", lambda: False)
    backends.triton_problem.cache_clear()
    monkeypatch.setattr(backends, "triton_problem", lambda: None)
    parts = [options] if "{" in options else options.split()
    given = [option for option in base if option != "--model=m"] if "--model=" in options else base
    status, line = run([*given, *parts], monkeypatch, capsys)
    assert status == 2
    assert message in line


def test_what_needs_peft_is_said_before_anything_is_loaded(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    (tmp_path / "recipe.yaml").write_text("use_dora: true\n")
    needs = "options of LoRA need peft: pip install peft"
    for options, message in (
        ([], "--lora-rank 4 needs peft: pip install peft"),
        (
            ["--lora-dropout=0.1"],
            f"unknown option --lora-dropout; {needs}",
        ),
        ([f"--config={tmp_path / 'recipe.yaml'}"], f"unknown option 'use_dora'; {needs}"),
    ):
        status, line = run([*base, *options], monkeypatch, capsys)
        assert status == 2
        assert message in line
    assert run([*base[:4], "--use-cpu"], monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("datasets: []", "option 'datasets': the list is empty"),
        ("datasets: [a.jsonl]", "argument --datasets: expected a JSON object, got 'a.jsonl'"),
        ("datasets: [{name: en}]", "entry 1 of datasets: path is missing"),
        ("datasets: [{path: a, spilt: test}]", "entry 1 of datasets: unknown key 'spilt'; did you mean 'split'?"),
        ("datasets: [{path: a, columns: [chosen]}]", "entry 1 of datasets: columns cannot be chosen"),
        ("datasets: [{path: a, fraction: 0}]", "entry 1 of datasets: fraction must be a number above 0, got 0"),
        ("datasets: [{path: a, fraction: 1}, {path: b}]", "entry 2 of datasets has no fraction"),
        ("datasets: [{path: 3}]", "entry 1 of datasets: path must be text, got 3"),
        ("datasets: [{path: a}]\ntest_split_size: 2.5", "--test-split-size must be a share below 1 or a whole number"),
        ("datasets: [{path: a}]\neval_strategy: epoch", "--eval-strategy epoch needs --eval-file or --test-split-size"),
        ("train_file: a.jsonl\nuse_dora: true", "--use-dora: needs --lora-rank"),
        ("train_file: a.jsonl\nload_in_8bit: true", "--load-in-8bit needs --lora-rank: weights in 8 bits cannot"),
        ("train_file: a.jsonl\nlora_kwargs: 3", "argument --lora-kwargs: expected a JSON object"),
    ],
)
def test_recipes_that_cannot_run(
    recipe: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n{recipe}\n")
    status, line = run(["--config", str(path)], monkeypatch, capsys)
    assert status == 2
    assert message in line


def test_fields_of_classes_are_options_by_the_names_of_trl(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--lora-dropout=0.25 --disable-dropout=false --use-dora --use-rslora --load-in-8bit --llm-int8-threshold=4"
    names = "--lora-modules-to-save lm_head --lora_target_parameters a.w b.w"
    mappings = (
        '--lora-kwargs={"bias": "lora_only", "rank_pattern": {"q": 8}, "init_lora_weights": "pissa_niter_4"}',
        '--bnb-kwargs={"llm_int8_skip_modules": ["lm_head"]}',
    )
    run_options, _ = parse_arguments([*base, *given.split(), *names.split(), *mappings])
    lora = run_options.lora_config()
    assert (lora.r, lora.lora_alpha, lora.target_modules, lora.task_type) == (4, 8, "all-linear", "CAUSAL_LM")
    assert (lora.lora_dropout, lora.use_dora, lora.use_rslora, lora.bias) == (0.25, True, True, "lora_only")
    assert (lora.modules_to_save, lora.target_parameters) == (["lm_head"], ["a.w", "b.w"])
    assert (lora.rank_pattern, lora.init_lora_weights) == ({"q": 8}, "pissa_niter_4")
    quantization = run_options.quantization_config()
    assert (quantization.load_in_8bit, quantization.load_in_4bit) == (True, False)
    assert (quantization.llm_int8_threshold, quantization.llm_int8_skip_modules) == (4.0, ["lm_head"])
    assert run_options.given()["lora_modules_to_save"] == ["lm_head"]  # for the model card


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_four_bits_are_nf4_in_the_precision_of_the_weights_unless_told(dtype: str, base: list[str]) -> None:
    four = [*base, "--load-in-4bit", f"--dtype={dtype}"]
    quantization = parse_arguments(four)[0].quantization_config()
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_compute_dtype is (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    told = ['--bnb-kwargs={"bnb_4bit_compute_dtype": "float16"}', "--bnb-4bit-quant-type=fp4"]
    quantization = parse_arguments([*four, *told, "--bnb-4bit-use-double-quant"])[0].quantization_config()
    assert quantization.bnb_4bit_quant_type == "fp4"
    assert quantization.bnb_4bit_compute_dtype is torch.float16
    assert quantization.bnb_4bit_use_double_quant


@pytest.mark.parametrize(
    ("said", "spelled"),
    [
        ("max_length=None cuts nothing", "--max-length none cuts nothing"),
        ("loss_type='lsif' has no beta", "--loss-type lsif has no beta"),
        ("padding_free=True was given, but\n  x", "--padding-free true was given, but x"),
        ("set `max_steps` or --num_train_epochs", "set --max-steps or --num-train-epochs"),
        ("`args.max_steps` must be set", "--max-steps must be set"),
        ("/data/max_length/seed=1.txt, column 'max_length'", "/data/max_length/seed=1.txt, column 'max_length'"),
        ("alpha must be in [0, 1]; alpha, my_max_length", "--alpha must be in [0, 1]; alpha, my_max_length"),
        ("max_steps.jsonl, line 1; max_steps-1/x; max_steps.", "max_steps.jsonl, line 1; max_steps-1/x; --max-steps."),
    ],
)
def test_messages_name_options_as_the_command_line_does(said: str, spelled: str) -> None:
    names = ["beta", "alpha", "seed", "loss_type", "max_length", "max_steps", "num_train_epochs", "padding_free"]
    assert as_on_command_line(said, names) == spelled


def test_a_long_json_object_is_no_path(base, monkeypatch, capsys) -> None:
    options = ["--lr-scheduler-type=cosine_with_min_lr", '--lr-scheduler-kwargs={"min_lr_rate":' + " " * 5000 + "0.1}"]
    assert run([*base, *options], monkeypatch, capsys)[0] == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rate: 1e-6\nlearning_rate: 1e-3", "'learning_rate' stands twice, and only one value would be read"),
        ("learning_rate: 1e-6\nlearning-rate: 1e-3", "'learning_rate' and 'learning-rate' are one option"),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", "'a' stands twice, and only one value would be read"),
        ("learning_rate: null", "option 'learning_rate' cannot be null; leave it out for its default"),
        ("run_name: 007", "option 'run_name' is text, but YAML reads 7 there: quote it"),
        ("chat_template_path: no", "option 'chat_template_path' is text, but YAML reads False there: quote it"),
        ("report_to: [none, null]", "option 'report_to' is text, but YAML reads None there: quote it"),
        ("disable_dropout:", "option 'disable_dropout' cannot be null; leave it out for its default"),
        ("lr_scheduler_kwargs: {a: 2024-01-01}", "TypeError: Object of type date is not JSON serializable"),
        ("lr_scheduler_kwargs: " + "[" * 1000 + "]" * 1000, "RecursionError: maximum recursion depth exceeded"),
        ("lr_scheduler_kwargs: &a {b: *a}", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_what_no_option_can_be_in_a_recipe(
    recipe: str, message: str, base, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    status, line = run([*base, f"--config={tmp_path / 'recipe.yaml'}"], monkeypatch, capsys)
    assert status == 2
    assert message in line


def test_null_in_a_recipe_is_none_or_false(base, tmp_path: Path) -> None:
    names = "bf16", "load_in_4bit", "lora_alpha", "max_length", "report_to", "resume_from_checkpoint"
    (tmp_path / "recipe.yaml").write_text("".join(f"{name}: null\n" for name in names))
    options, config = parse_arguments([*base, f"--config={tmp_path / 'recipe.yaml'}"])
    assert (options.load_in_4bit, options.lora_alpha, options.resume_from_checkpoint) == (False, None, False)
    assert (config.bf16, config.max_length, config.report_to) == (False, None, [])
