"""What is read is data: it runs no code, and is not taken for markup; what is kept is for its user alone."""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refusals import ONE_TURN
from tiny_model import CHAT_TEMPLATE, make_pairs, make_tokenizer, save_model, write_lines
from tiny_trainer import make_trainer, resumable_run

from dil_kernels.cli import help_text, programs
from dil_kernels.data import load_preference_pairs
from dil_kernels.data.tokenization import tokenize_dataset
from dil_kernels.trainer import DILConfig
from dil_kernels.training.generations import _as_markdown
from dil_kernels.training.markdown import code, escaped, fenced, table
from dil_kernels.training.model_card import CardNotes
from dil_kernels.training.ref_cache import ReferenceCache
from dil_kernels.user_cache import make_private

ROOT = Path(__file__).parents[1]
NASTY = (
    "a|b `c` ```\n# x\r- [l](javascript:1) ![i](http://t/p.png) <img src=x onerror=1> &amp; *e* _f_ ~~s~~ $m$ \\| '\""
)


class Payload:
    """A pickle that makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# ---- what could run code


def calls_of(tree: ast.AST) -> dict[str, list[ast.Call]]:
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def dangers_of(source: str) -> list[str]:
    """What in Python code would run what it reads, or write where others foresee it."""
    tree = ast.parse(source)
    calls = calls_of(tree)
    dangers = [name for name in ("eval", "exec", "os.system", "os.popen", "tempfile.mktemp") if name in calls]
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    dangers += sorted(names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
    for name, nodes in calls.items():
        for call in nodes:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                dangers.append("torch.load without weights_only=True")
            if name.startswith("yaml.") and name.split(".")[1] in ("load", "load_all", "unsafe_load", "full_load"):
                dangers.append(name)
            if given.get("allow_pickle") == "True" or given.get("shell") == "True":
                dangers.append(f"{name} with allow_pickle or shell")
            if name.endswith(("Environment", "Template")) and "Sandbox" not in name and "jinja2" in source:
                dangers.append(name)
            if name in ("os.chmod", "os.umask") or name.endswith(".chmod"):
                dangers.append(name)
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return dangers + [text for text in texts if re.match(r"/(var/)?tmp/", text)]


def test_no_module_runs_what_it_reads() -> None:
    found = {}
    for folder in ("dil_kernels", "examples", "benchmarks", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if dangers := dangers_of(path.read_text()):
                found[str(path.relative_to(ROOT))] = dangers
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "import jinja2\njinja2.Environment()",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "open('/tmp/dil_kernels.log')",
    ],
)
def test_such_code_would_be_seen(source: str) -> None:
    assert dangers_of(source)


def test_a_checkpoint_that_holds_a_pickle_is_not_run(tmp_path: Path) -> None:
    resumable_run(tmp_path / "run").train()
    whole = tmp_path / "run" / "checkpoint-2"
    (whole / "dil_checksums.json").unlink()  # as whoever made the checkpoint would
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copytree(whole, tmp_path / "forged")
        torch.save(Payload(tmp_path / "ran"), tmp_path / "forged" / name)
        with pytest.raises(pickle.UnpicklingError):
            resumable_run(tmp_path / "run").train(str(tmp_path / "forged"))
        assert not (tmp_path / "ran").exists(), name
        shutil.rmtree(tmp_path / "forged")
    torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    shutil.copytree(whole, tmp_path / "forged")
    torch.save(Payload(tmp_path / "ran"), tmp_path / "forged" / "training_args.bin")  # which is not read
    resumable_run(tmp_path / "run").train(str(tmp_path / "forged"))
    assert not (tmp_path / "ran").exists()


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").mkdir()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""


@pytest.mark.parametrize("way", ["dil-train", "DILTrainer"])
def test_code_of_a_model_runs_only_where_it_is_allowed(way: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    model = save_model(tmp_path / "model")
    (model / "own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    pairs = write_lines(tmp_path / "pairs.jsonl", *make_pairs(3))
    if way == "dil-train":
        options = [
            "--model",
            str(model),
            "--train-file",
            str(pairs),
            "--output-dir",
            str(tmp_path / "out"),
            "--use-cpu",
        ]
        assert programs.main(options) == 2
        message = capsys.readouterr().err
        assert "--trust-remote-code" in message
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            make_trainer(tmp_path / "out", model=str(model))
    assert not list(tmp_path.rglob("ran"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_yaml_makes_no_objects(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(SystemExit):
        programs.main(["--config", str(recipe)])
    assert "broken YAML: could not determine a constructor" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('PATH') }}",
    "raise_exception": "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir('PATH') }}",
    "attribute by a filter": "{{ (''|attr('__class__')).__base__ }}",
    "another file": "{% include '/etc/hostname' %}",
    "changing the messages": "{{ messages.clear() }}",
}


@pytest.mark.parametrize("attack", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_run_in_a_sandbox(attack: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(attack.replace("PATH", str(tmp_path / "ran")) + CHAT_TEMPLATE)
    pairs = load_preference_pairs(write_lines(tmp_path / "data" / "pairs.jsonl", ONE_TURN))
    with pytest.raises(ValueError, match="chat template"):
        tokenize_dataset(pairs, tokenizer, max_length=None, max_prompt_length=None, truncation_mode="keep_end")
    assert not (tmp_path / "ran").exists()


# ---- what could be taken for markup


def markdown_tokens(text: str) -> list[Any]:
    from markdown_it import MarkdownIt

    def flat(tokens: list[Any]) -> list[Any]:
        return [each for token in tokens for each in (token, *flat(token.children or []))]

    return flat(MarkdownIt("gfm-like", {"linkify": False}).parse(text))


ACTIVE = {
    "link_open",
    "image",
    "html_inline",
    "html_block",
    "em_open",
    "strong_open",
    "s_open",
    "heading_open",
    "fence",
}


def test_generations_show_text_as_it_is() -> None:
    texts = [NASTY, "# heading", "- list", "> quote", "1. one", "```\ncode", "=====", "    four", "a\\"]
    for text in texts:
        page = _as_markdown([{"step": 1, "prompt": text, "completion": text}])
        tokens = markdown_tokens(page)
        kinds = [token.type for token in tokens]
        assert kinds.count("heading_open") == 2, text  # those of the page
        assert not ({*kinds} & ACTIVE) - {"heading_open", "html_inline"}, text
        assert {token.content for token in tokens if token.type == "html_inline"} <= {"<br>", "<!-- -->"}
        assert kinds.count("td_open") == 2, text
        lines = re.split(r"\r|\n", text)
        shown = "".join(token.content for token in tokens if token.type in ("text", "text_special"))
        for line in lines:
            assert shown.count(line.strip()) == 2, (text, shown)


SHOWN = {
    "https://x.y/z": "https://x.y/z",
    "see www.x.y, x.yz, HTTP://x.y, //x.y and ftp://x.y": "see www.x.y, x.yz, HTTP://x.y, //x.y and ftp://x.y",
    "_www.3x.y": "_www.3x.y",
    "@name, a@b.cd, mailto:a@b.cd": "@name, a@b.cd, mailto:a@b.cd",
    "  \tcode": "  \tcode",
    "\tcode ": "\tcode ",
    "    four\t": "    four\t",
    "\x1b[2J\x00\x7f\x9b1m\x85": r"\x1b[2J\x00\x7f\x9b1m\x85",
    "a\u202eb\u2066c\u2069\u200fd\u061c": r"a\u202eb\u2066c\u2069\u200fd\u061c",
}
LINKED = re.compile(r"://|//|www\.|@\w|\w\.[a-z]{2}", re.IGNORECASE)


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_text_is_no_link_and_loses_nothing(text: str, shown: str) -> None:
    """As those see it who make links of plain text, which they look for within one run of text."""
    page = _as_markdown([{"step": 1, "prompt": text, "completion": text}])
    found = [""]
    for token in markdown_tokens(page):
        if token.type in ("text", "text_special"):
            found[-1] += token.content
        elif token.type == "html_inline":
            assert token.content == "<!-- -->"
            found[-1] += "\0"
        else:
            assert token.type not in ACTIVE - {"heading_open"} | {"code_block"}
            found.append("")
    assert [each.replace("\0", "") for each in found].count(shown) == 2
    assert not [run for each in found for run in each.split("\0") if LINKED.search(run)]
    assert shown in code(text)
    assert shown in fenced(text)


def test_code_blocks_and_tables_end_where_they_should() -> None:
    for text in (NASTY, "```", "`", "````\nx"):
        (block,) = [token for token in markdown_tokens(fenced(text, "yaml")) if token.type == "fence"]
        assert block.content == text.replace("\r", "\n") + "\n"
        (span,) = [token for token in markdown_tokens(f"x {code(text)} y") if token.type == "code_inline"]
        assert span.content == re.sub(r"[\r\n]+", " ", text)
        tokens = markdown_tokens(table([("a", "b"), (escaped(text), "c")]))
        assert [token.type for token in tokens].count("td_open") == 2


def test_a_model_card_says_names_and_nothing_more(tmp_path: Path) -> None:
    nasty = NASTY.replace("/", "").replace("\n", "\n---\nlicense: other\n")
    trainer = make_trainer(tmp_path / "a|b `c` #d <img src=x>")
    trainer.card_notes = CardNotes(
        {"model": f"x/{nasty}", "train_file": nasty, "train_split": nasty, "dataset_config": nasty, "eval_file": nasty}
    )
    trainer.data_report = {nasty: "3 rows"}
    trainer.create_model_card(tags=[nasty], language=nasty, finetuned_from=nasty, dataset_tags=nasty)
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    header = text.split("\n---\n")[0].removeprefix("---\n")
    data = yaml.safe_load(header)
    assert (data["base_model"], data["language"], data["datasets"], data["tags"][-1]) == (nasty, nasty, [nasty], nasty)
    assert "license" not in data
    body = text.removeprefix(f"---\n{header}\n---\n")
    tokens = markdown_tokens(body)
    kinds = [token.type for token in tokens]
    assert not {*kinds} & {"image", "html_block", "em_open", "s_open"}
    assert {token.content for token in tokens if token.type == "html_inline"} == {"<br>", "<!-- -->"}
    headings = [tokens[i + 1].content for i, kind in enumerate(kinds) if kind == "heading_open"]
    assert headings[1:] == ["Results", "Data", "Training", "How to reproduce", "Citation"]
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert all(link.startswith(("https://arxiv.org/", "https://huggingface.co/")) for link in links)
    (recipe,) = [token.content for token in tokens if token.type == "fence" and token.info == "yaml"]
    assert yaml.safe_load(recipe)["dataset_config"] == nasty


def test_a_token_of_the_hub_is_not_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, hub_token="hf_secret")
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    saved = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "training_args.bin" in saved
    assert not [name for name, data in saved.items() if b"hf_secret" in data]


def test_errors_move_no_cursor(tmp_path: Path, capsys) -> None:
    path = tmp_path / "\x1b[2Jpairs\x07.jsonl"
    model = str(save_model(tmp_path / "model"))
    options = ["--model", model, "--train-file", str(path), "--output-dir", str(tmp_path / "out"), "--use-cpu"]
    capsys.readouterr()  # saving has a progress bar
    assert programs.main(options) == 2
    printed = capsys.readouterr().err
    assert "pairs\\x07.jsonl" in printed
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed)


# ---- what is kept for a user


@pytest.fixture
def open_umask() -> Any:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): oct(path.stat().st_mode & 0o777) for path in directory.rglob("*")}


def test_caches_are_private(tmp_path: Path, monkeypatch, open_umask) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    help_text.help_text()
    options = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "refs" / "of" / "runs")}
    make_trainer(tmp_path / "out", **options)
    found = modes(tmp_path)
    for name in ("cache", "cache/dil_kernels", "refs", "refs/of", "refs/of/runs"):
        assert found[name] == "0o700", name
    assert len(list((tmp_path / "refs" / "of" / "runs").iterdir())) == 1


def test_a_directory_that_was_made_to_be_shared_stays_so(tmp_path: Path, open_umask) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o770)
    make_private(shared)
    assert modes(tmp_path) == {"shared": "0o770"}
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        make_private(tmp_path / "file")


def test_a_cache_of_others_is_no_more_than_numbers(tmp_path: Path) -> None:
    """A forged file of reference log-probs is a file of numbers; test_ref_cache.py has those that are refused."""
    entry = ReferenceCache(tmp_path, {}).entry(make_trainer(tmp_path / "out").train_dataset)
    entry.path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert entry.load() is None
    torch.save(Payload(tmp_path / "ran"), entry.path)
    assert entry.load() is None
    assert not (tmp_path / "ran").exists()


def test_copies_of_options_are_those(tmp_path: Path) -> None:
    config = DILConfig(str(tmp_path), use_cpu=True, alpha=0.25, hub_token="hf_secret")
    copied = pickle.loads(pickle.dumps(config))
    assert (copied.alpha, copied.hub_token, config.hub_token) == (0.25, None, "hf_secret")
    assert copied == pickle.loads(pickle.dumps(copied))
    for copied in (copy.copy(config), copy.deepcopy(config)):
        assert (copied.alpha, copied.hub_token) == (0.25, "hf_secret")


def test_the_padding_token_is_no_secret(tmp_path: Path) -> None:
    trl_config = pytest.importorskip("dil_kernels.integrations.trl").DILConfig
    config = trl_config(str(tmp_path), use_cpu=True, pad_token="<pad>", hub_token="hf_secret")
    copied = pickle.loads(pickle.dumps(config))
    assert (copied.pad_token, copied.hub_token) == ("<pad>", None)
