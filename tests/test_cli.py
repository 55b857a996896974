"""dil-train and dil-env as programs: what they refuse, what they write."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import CHAT_TEMPLATE, make_pairs, make_tokenizer, save_model, write_lines

import dil_kernels
from dil_kernels import backends
from dil_kernels.cli import programs
from dil_kernels.cli.arguments import build_parser
from dil_kernels.cli.option_names import option_string
from dil_kernels.losses import divergence_names
from dil_kernels.wording import ELSEWHERE


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", *make_pairs(12))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints; its exit status is 2."""
    try:
        status = programs.main(argv)
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dil-train: error: ")
    return line.removeprefix("dil-train: error: ")


def test_a_run_from_a_recipe(model_dir: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model_dir}\ntrain-file: {pairs_file}\neval_file: {pairs_file}\noutput_dir: {output}\n"
        "loss_type: bce\nmax_steps: 9\nper_device_train_batch_size: 4\nlogging_steps: 1\nreport_to: none\n"
        "learning_rate: 1e-3\nsave_strategy: no\nuse_cpu: true\n"
    )
    assert programs.main(["--config", str(recipe), "--max-steps", "3", "--loss-type", "lsif"]) == 0
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]  # the command line won
    assert steps[0]["loss"] == pytest.approx(-0.5)  # lsif where policy and reference are one
    results = json.loads((output / "before_after.json").read_text())
    assert results["pairs"] == 12
    assert results["after"]["margin"] > results["before"]["margin"]
    printed = capsys.readouterr().out
    assert f"{results['after']['margin']:.3f}" in printed
    assert "12 held-out pairs" in printed
    assert (output / "training_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained, original = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (output, model_dir))
    assert any(not trained[name].equal(original[name]) for name in original)
    assert len(AutoTokenizer.from_pretrained(output)) == len(make_tokenizer())


def test_a_run_of_mixed_data_with_further_options(model_dir: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    packed = tmp_path / "more.jsonl.gz"
    chat = {
        "prompt": [{"role": "user", "content": "w1"}],
        "chosen": [{"role": "assistant", "content": "w2"}],
        "rejected": [{"role": "assistant", "content": "w3"}],
    }
    packed.write_bytes(gzip.compress("".join([json.dumps(chat) + "\n"] * 8).encode()))
    (tmp_path / "chats.csv").write_text(
        'prompt,chosen,rejected\n"[{""role"": ""user"", ""content"": ""w4""}]",'
        '"[{""role"": ""assistant"", ""content"": ""w5""}]","[{""role"": ""assistant"", ""content"": ""w6""}]"\n'
    )
    (tmp_path / "template.jinja").write_text(f"w77 {CHAT_TEMPLATE}")
    output, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model_dir}\noutput_dir: {output}\nmax_steps: 2\nper_device_train_batch_size: 2\n"
        "report_to: none\nlearning_rate: 1e-3\nsave_strategy: no\nuse_cpu: true\ndisable_tqdm: true\n"
        f"datasets:\n- path: {packed}\n  fraction: 8\n- {{path: {tmp_path / 'chats.csv'}, fraction: 1}}\n"
        f"test_split_size: 3\npad_token: w9\nchat_template_path: {tmp_path / 'template.jinja'}\n"
        "model_init_kwargs: {attention_bias: true}\n"
        "lora_rank: 2\nuse_rslora: true\nlora_modules_to_save: [lm_head]\nlora_dropout: 0.5\ndisable_dropout: false\n"
    )
    assert programs.main(["--config", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "3 held-out pairs" in printed
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["r"], saved["use_rslora"], saved["lora_dropout"]) == (2, True, 0.5)
    assert "lm_head" in saved["modules_to_save"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.pad_token == "w9"
    assert tokenizer.chat_template.startswith("w77 ")
    card = (output / "README.md").read_text()
    assert "6 pairs of `more.jsonl.gz`, `chats.csv`" in card
    assert "- path: more.jsonl.gz" in card
    assert "use_rslora: true" in card
    assert str(tmp_path) not in card


def test_what_tokenizer_and_model_refuse(model_dir: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    """The tokenizer's before the data are read, which are broken; but that they are there is seen first."""
    (tmp_path / "none.jsonl").write_text("{")
    (tmp_path / "broken.jinja").write_text("w1\n{% if %}")
    argv = ["--model", str(model_dir), "--output-dir", str(tmp_path / "out"), "--use-cpu"]
    nothing = [*argv, "--train-file", str(tmp_path / "none.jsonl")]
    for options, message in (
        (["--pad-token", "<none>"], f"--pad-token <none>: the tokenizer of {model_dir} has no such token"),
        (["--chat-template-path", str(tmp_path / "broken.jinja")], f"{tmp_path / 'broken.jinja'}, line 2: "),
    ):
        assert message in refused([*nothing, *options], capsys)
    (tmp_path / "none.jsonl").unlink()
    elsewhere = [*nothing, "--model", "no/model"][2:]
    assert refused(elsewhere, capsys) == f"{tmp_path}/none.jsonl: no such file"
    argv += ["--train-file", str(pairs_file), "--model-init-kwargs", '{"hiden_size": 3}']
    assert programs.main(argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "could not be loaded with --model-init-kwargs" in last
    assert "hiden_size" in last


def test_bad_data_starts_nothing(model_dir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps(make_pairs(1)[0])
    for line, message in (
        ('{"prompt": "w1", ', "line 2: broken JSON at character 18"),
        (
            '{"prompt": "w1", "chosen": "w2", "use_cache": "x"}',
            "line 2: column 'rejected' is missing (columns with a value: prompt, chosen, use_cache)",
        ),
        ('{"prompt": "w1", "chosen": "w2", "rejected": ""}', "line 2, column 'rejected': the response is empty"),
    ):
        path.write_text(f"{good}\n{line}\n")
        argv = ["--model", str(model_dir), "--train-file", str(path), "--output-dir", str(tmp_path / "out")]
        assert refused(argv, capsys).startswith(f"{path}, {message}")
        assert not (tmp_path / "out").exists()


def test_options_that_do_not_exist(tmp_path: Path, capsys) -> None:
    assert refused(["pairs.jsonl"], capsys) == "unexpected argument 'pairs.jsonl'; data are given as --train-file"
    assert refused(["--lerning-rate", "1"], capsys) == "unknown option --lerning-rate; did you mean --learning-rate?"
    for name in ELSEWHERE:
        message = refused([option_string(name), "1"], capsys)
        assert message == f"unknown option {option_string(name)}; did you mean {option_string(ELSEWHERE[name])}?"
    assert {*map(option_string, ELSEWHERE.values())} <= {*build_parser()._option_string_actions}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ncutoff_len: 8\n")
    assert refused(["--config", str(recipe)], capsys).endswith(
        "unknown option 'cutoff_len'; did you mean 'max_length'?"
    )
    recipe.write_text("model: m\nloss_typ: lsif\n")
    message = refused(["--config", str(recipe)], capsys)
    assert message == f"recipe {recipe}: unknown option 'loss_typ'; did you mean 'loss_type'?"
    recipe.write_text("- model\n")
    assert "must be a mapping of options to values, got list" in refused(["--config", str(recipe)], capsys)
    assert "cannot be read" in refused(["--config", str(tmp_path / "none.yaml")], capsys)


def test_options_that_do_not_fit(model_dir: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    base = ["--model", str(model_dir), "--train-file", str(pairs_file), "--output-dir", str(tmp_path / "out")]
    for argv, message in (
        (base[:2], "--train-file, --output-dir must be given"),
        ([*base, "--power", "0.1"], "--power 0.1 was given, but --loss-type lsif has no power"),
        ([*base, "--loss-type", "kto"], "argument --loss-type: invalid choice: 'kto'"),
        ([*base, "--max-steps", "many"], "argument --max-steps: invalid int value: 'many'"),
        ([*base, "--eval-strategy", "steps"], "--eval-strategy steps needs --eval-file"),
        ([*base, "--num-generations-at-eval", "2"], "--num-generations-at-eval needs --eval-file"),
        ([*base, "--report-to", "tensorbord"], "--report-to tensorbord: unknown; available: "),
        ([*base, "--resume-from-checkpoint"], "no complete checkpoint to resume from"),
        (["--model", str(tmp_path / "no"), *base[2:]], f"--model {tmp_path / 'no'}: there is no such directory"),
    ):
        assert message in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_a_missing_integration_is_said_first(
    model_dir: Path, pairs_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    argv = ["--model", str(model_dir), "--train-file", str(pairs_file), "--output-dir", str(tmp_path / "out")]
    assert refused([*argv, "--report-to", "wandb"], capsys) == "--report-to wandb: its package is not installed"


def test_what_the_trainer_refuses_is_one_line(model_dir: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    argv = ["--model", str(model_dir), "--train-file", str(pairs_file), "--output-dir", str(tmp_path / "out")]
    for options, message in (
        (["--padding-free", "--attn-implementation", "eager"], "--padding-free true was given, but LlamaForCausalLM"),
        (["--ref-adapter-name", "a"], "--ref-adapter-name a was given, but model is not a PeftModel"),
    ):
        assert programs.main([*argv, "--disable-tqdm", "--use-cpu", *options]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"dil-train: error: {message}")


def test_an_earlier_run_is_not_mixed_up(model_dir: Path, pairs_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    argv = ["--model", str(model_dir), "--train-file", str(pairs_file), "--output-dir", str(tmp_path)]
    assert "holds checkpoints of an earlier run" in refused(argv, capsys)


@pytest.mark.parametrize(
    ("error", "status"),
    [(FloatingPointError("the loss of step 3 is not finite"), 1), (NotImplementedError("2 GPUs in one process"), 2)],
)
def test_a_run_that_fails_says_why_on_one_line(
    error: Exception, status: int, model_dir: Path, pairs_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("dil_kernels.training.run.run_training", fail)
    argv = ["--model", str(model_dir), "--train-file", str(pairs_file), "--output-dir", str(tmp_path / "out")]
    assert programs.main(argv) == status
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"dil-train: error: {error}"


def test_a_recipe_says_no_and_none_as_the_command_line_does(
    model_dir: Path, pairs_file: Path, tmp_path: Path, capsys
) -> None:
    from dil_kernels.cli.arguments import parse_arguments

    recipe = tmp_path / "recipe.yaml"
    base = f"model: {model_dir}\ntrain_file: {pairs_file}\noutput_dir: {tmp_path / 'out'}\nreport_to: none\n"
    recipe.write_text(base + "save_strategy: no\nmax_length: null\nlearning_rate: 2e-6\nbf16: false\n")
    _, config = parse_arguments(["--config", str(recipe)])
    assert (config.save_strategy, config.max_length, config.learning_rate, config.bf16) == ("no", None, 2e-6, False)
    _, config = parse_arguments(["--config", str(recipe), "--max_length", "64", "--save-strategy=steps"])
    assert (config.save_strategy, config.max_length) == ("steps", 64)
    recipe.write_text(base + "max_steps: many\n")
    message = refused(["--config", str(recipe)], capsys)
    assert message == f"recipe {recipe}: argument --max-steps: invalid int value: 'many'"


def test_help_lists_what_the_registries_hold(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        programs.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"--loss-type {{{','.join(divergence_names())}}}" in text
    assert f"--backend {{auto,{','.join(backends.BACKENDS)}}}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_env_says_what_is_there_and_why_not(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        programs.env_main(["--verbose"])
    assert programs.env_main([]) == 0
    text = capsys.readouterr().out
    for name in backends.BACKENDS:
        assert f"\n  {name} " in text
    problem = backends.cuda_extension_problem()
    assert ("unavailable: " + problem if problem else "CUDA (_cuda.so)       available") in text


@pytest.mark.parametrize("main", [programs.main, programs.env_main])
def test_either_says_its_version(main, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"dil_kernels {dil_kernels.__version__}\n"


INTERRUPTED_TORCH = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except KeyboardInterrupt:  # as extension modules have it, too
    raise RuntimeError("the initialisation failed") from None
"""


@pytest.mark.parametrize("program", ["dil-train", "dil-env"])
def test_an_interrupt_while_torch_is_imported_is_one_line(program: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH)
    result = subprocess.run(
        [Path(sys.executable).parent / program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs ignore
        capture_output=True,
        text=True,
    )
    assert result.returncode == 130
    assert (result.stdout, result.stderr) == ("", f"{program}: error: interrupted before it began\n")


def test_without_the_extra_it_says_what_to_install() -> None:
    source = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("accelerate", "datasets", "transformers"):
            raise ImportError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
from dil_kernels.cli import programs
sys.exit(programs.main(["--model", "m", "--train-file", "pairs.jsonl", "--output-dir", "out"]))
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "dil-train: error: dil-train needs the extra [train]: pip install 'dil-kernels[train]', in a"
    )


def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys) -> None:
    for columns, longest in (("80", 80), ("200", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            programs.main(["--help"])
        widths = [len(line) for line in capsys.readouterr().out.splitlines() if "{" not in line]  # of all choices
        assert max(widths) <= longest
