"""Reference log-probs on disk: reused where nothing changed, computed again where anything did or a file is damaged."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_training import RELATIVE, plain_logps
from safetensors.numpy import save
from tiny_model import make_model, make_pairs
from tiny_trainer import batch_of, make_trainer, tokenized
from torch import nn
from two_processes import run_on_two_processes

from dil_kernels.data.collators import PreferenceCollator
from dil_kernels.trainer import DILTrainer
from dil_kernels.training import ref_cache
from dil_kernels.training.ref_cache import (
    CacheEntry,
    ReferenceCache,
    dataset_fingerprint,
    default_ref_cache_dir,
    model_fingerprint,
    scored_lengths,
)


def precomputed(directory: Path, **options: Any) -> tuple[DILTrainer, int]:
    """A trainer with precomputed references, and how often its model ran for them."""
    model = options.pop("model", None) or make_model()
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    settings = {"ref_cache_dir": str(directory / "refs"), "precompute_ref_log_probs": True, **options}
    trainer = make_trainer(directory, model=model, **settings)
    handle.remove()
    return trainer, len(calls) - 4  # of `check_rows` and `disable_noise`


def sums_of(dataset: datasets.Dataset) -> list[list[float]]:
    return [dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")]


def entry_of(directory: Path) -> CacheEntry:
    return ReferenceCache(directory, {"model": "m"}).entry(tokenized(make_pairs(3)))


LOGPS = np.array([[-1.5, -2.5], [-3.25, -4.0], [-0.5, -6.0]], np.float32)


def test_a_second_run_reads_what_the_first_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = {"five": make_pairs(5, seed=4), "two": make_pairs(2, seed=6)}
    first, calls = precomputed(tmp_path, eval_dataset=evaluation)
    assert calls == 4 + 2 + 1  # batches of 2, and of 3 in evaluation
    printed = capsys.readouterr().out
    files = sorted((tmp_path / "refs").iterdir())
    assert len(files) == 3
    for count in (7, 5, 2):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"Reference log-probs of {count} rows ")]
        assert "computed; kept in " in line
    second, calls = precomputed(tmp_path, eval_dataset=evaluation)
    assert calls == 3  # a batch of each
    assert capsys.readouterr().out.count("rows read from ") == 3
    assert sorted((tmp_path / "refs").iterdir()) == files
    assert sums_of(second.train_dataset) == sums_of(first.train_dataset)
    for name in evaluation:
        assert sums_of(second.eval_dataset[name]) == sums_of(first.eval_dataset[name])
    logps, _ = plain_logps(make_model().double(), batch_of(make_pairs(7)))
    read = torch.tensor(sums_of(second.train_dataset)).flatten().double()
    torch.testing.assert_close(read, logps.sum(1), rtol=RELATIVE, atol=0)


def test_a_run_from_the_cache_trains_as_one_that_keeps_its_reference(tmp_path: Path) -> None:
    precomputed(tmp_path)
    histories = []
    for options in ({}, {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "refs")}):
        trainer = make_trainer(tmp_path, num_train_epochs=2, optim="sgd", **options)
        trainer.train()
        histories.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(histories[0]) == 8
    assert histories[1] == pytest.approx(histories[0], rel=1e-4, abs=1e-5)


def test_unpaired_responses_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
    responses = datasets.Dataset.from_list(rows)
    first, calls = precomputed(tmp_path, train_dataset=responses)
    second, sampled = precomputed(tmp_path, train_dataset=responses)
    assert (calls, sampled) == (4, 1)
    assert second.train_dataset["ref_logps"][:] == first.train_dataset["ref_logps"][:]
    chosen = plain_logps(make_model().double(), batch_of(make_pairs(7)))[0].sum(1)[:7]
    torch.testing.assert_close(torch.tensor(second.train_dataset["ref_logps"][:]).double(), chosen, rtol=1e-5, atol=0)


PAIRS = make_pairs(7).to_list()


def last_bit_of_a_weight() -> nn.Module:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[-1, -1] ^= 1
    return model


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "the last bit of a weight": lambda: {"model": last_bit_of_a_weight()},
    "configuration": lambda: {"model": make_model(rms_norm_eps=2e-6)},
    "dtype of the weights": lambda: {"model": make_model().bfloat16()},
    "attention": lambda: {"model": make_model(attn_implementation="eager")},
    "a word": lambda: {"train_dataset": datasets.Dataset.from_list([*PAIRS[:-1], {**PAIRS[-1], "rejected": "w1"}])},
    "order": lambda: {"train_dataset": datasets.Dataset.from_list(PAIRS[::-1])},
    "a row less": lambda: {"train_dataset": datasets.Dataset.from_list(PAIRS[:-1])},
    "chosen for rejected": lambda: {
        "train_dataset": make_pairs(7).rename_columns({"chosen": "rejected", "rejected": "chosen"})
    },
    "truncation": lambda: {"max_length": 10},
    "autocast": lambda: {"bf16": True},
    "log-probs from logits": lambda: {"fused_head": False},
    "backend": lambda: {"backend": "eager"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_the_numbers_computes_them_again(
    tmp_path: Path, change: Callable[[], dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    precomputed(tmp_path)
    caplog.clear()
    changed, calls = precomputed(tmp_path, **change())
    assert calls >= 3
    assert len(list((tmp_path / "refs").iterdir())) == 2
    assert "cannot be used" not in caplog.text
    fresh, _ = precomputed(tmp_path / "fresh", **change())
    assert sums_of(changed.train_dataset) == sums_of(fresh.train_dataset)
    assert precomputed(tmp_path)[1] == 1, "the first entry is still there"


def two_adapters(active: str = "default", lora_alpha: int = 8) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=lora_alpha, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    model = get_peft_model(make_model(), config)
    model.add_adapter("other", config)
    model.set_adapter(active)
    return model


@pytest.mark.parametrize("change", [{"active": "other"}, {"lora_alpha": 64}], ids=["another adapter", "its scaling"])
def test_adapters_of_the_same_weights_compute_again(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "refs")}
    make_trainer(tmp_path, model=two_adapters(), **options)
    changed = make_trainer(tmp_path, model=two_adapters(**change), **options)
    fresh = make_trainer(tmp_path, model=two_adapters(**change), **{**options, "ref_cache_dir": "none"})
    assert sums_of(changed.train_dataset) == sums_of(fresh.train_dataset)
    make_trainer(tmp_path, model=two_adapters(), **options)
    assert len(list((tmp_path / "refs").iterdir())) == 2


def test_other_versions_compute_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {entry_of(tmp_path).path}
    for package in (ref_cache.dil_kernels, ref_cache.torch, ref_cache.transformers):
        monkeypatch.setattr(package, "__version__", "0.0")
        paths.add(entry_of(tmp_path).path)
    monkeypatch.setattr(ref_cache, "FORMAT", ref_cache.FORMAT + 1)
    paths.add(entry_of(tmp_path).path)
    assert len(paths) == 5


def test_every_damaged_byte_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = entry_of(tmp_path)
    assert entry.load() is None
    assert caplog.messages == []
    assert entry.store(LOGPS) is None
    assert [path.name for path in tmp_path.iterdir()] == [entry.path.name]
    np.testing.assert_array_equal(entry.load(), LOGPS)
    whole = entry.path.read_bytes()
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        entry.path.write_bytes(damaged)
        loaded = entry.load()
        # JSON allows blanks and another order in the header, which leaves all that is checked as it was.
        assert loaded is None or np.array_equal(loaded, LOGPS), f"byte {index} of {len(whole)}"
        if index >= len(whole) - LOGPS.nbytes - entry.lengths.nbytes:
            assert loaded is None, f"byte {index} of {len(whole)} is a number's"
    caplog.clear()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        entry.path.write_bytes(whole[:length])
        assert entry.load() is None
    assert len(caplog.messages) == 5
    assert all(f"{entry.path} cannot be used (" in message for message in caplog.messages)
    assert entry.store(LOGPS) is None
    np.testing.assert_array_equal(entry.load(), LOGPS)


def test_a_damaged_file_is_computed_again_by_the_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = precomputed(tmp_path)
    (path,) = (tmp_path / "refs").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 128]))
    second, calls = precomputed(tmp_path)
    assert calls == 4
    assert f"{path} cannot be used (its checksum does not fit)" in caplog.text
    assert sums_of(second.train_dataset) == sums_of(first.train_dataset)
    assert precomputed(tmp_path)[1] == 1, "the file is whole again"


FORGED = {
    "another key": ({"key": "{}"}, LOGPS, None, "its key is another one"),
    "other lengths": ({}, LOGPS, 1, "its responses have other lengths than those of the data set"),
    "not finite": ({}, np.where(LOGPS == -4.0, np.inf, LOGPS), None, "it holds log-probs that are not finite"),
    "fp64": ({}, LOGPS.astype(np.float64), None, "logps are float64 (3, 2), lengths int64 (3, 2)"),
    "a row less": ({}, LOGPS[:2], None, "logps are float32 (2, 2), lengths int64 (3, 2)"),
}


@pytest.mark.parametrize(("metadata", "logps", "longer", "problem"), FORGED.values(), ids=FORGED)
def test_a_whole_file_that_says_something_else_is_not_used(
    tmp_path: Path, metadata: Any, logps: Any, longer: int | None, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry = entry_of(tmp_path)
    lengths = entry.lengths + (longer or 0)
    key = metadata.get("key", entry.key)
    tensors = {"logps": np.ascontiguousarray(logps), "lengths": lengths}
    entry.path.write_bytes(save(tensors, {"key": key, "checksum": ref_cache._checksum(key, logps, lengths)}))
    assert entry.load() is None
    assert f"cannot be used ({problem})" in caplog.text


def test_log_probs_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    entry = entry_of(tmp_path / "refs")
    problem = entry.store(np.where(LOGPS == -4.0, np.nan, LOGPS).astype(np.float32))
    assert problem == "1 rows have log-probs that are not finite: 2"
    assert not entry.path.exists()


def test_a_directory_that_cannot_be_written_costs_the_cache_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "refs").write_text("a file where the directory should be")
    trainer, calls = precomputed(tmp_path)
    assert calls == 4
    assert "rows computed and not kept: " in capsys.readouterr().out
    assert len(trainer.train_dataset["ref_chosen_logps"]) == 7


def test_readers_beside_writers_see_nothing_or_all(tmp_path: Path) -> None:
    entry, problems, done = entry_of(tmp_path), [], threading.Event()

    def write() -> None:
        problems.extend(entry.store(LOGPS) for _ in range(40))

    def read() -> None:
        while not done.is_set():
            loaded = entry.load()
            problems.append(None if loaded is None or np.array_equal(loaded, LOGPS) else "torn")

    logging.getLogger("dil_kernels.training.ref_cache").addHandler(handler := Recorder())
    writers, readers = ([threading.Thread(target=target) for _ in range(4)] for target in (write, read))
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    logging.getLogger("dil_kernels.training.ref_cache").removeHandler(handler)
    assert set(problems) == {None}
    assert handler.messages == [], "a reader met a damaged file"
    assert [path.name for path in tmp_path.iterdir()] == [entry.path.name]


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_log_probs_that_the_data_bring_are_kept_as_they_are(tmp_path: Path) -> None:
    given = tokenized(make_pairs(7)).add_column("ref_chosen_logps", [-1.0 * i for i in range(7)])
    both = given.add_column("ref_rejected_logps", [-1.0] * 6 + [-1e39])
    with pytest.raises(
        ValueError, match="train data set, row 7, column 'ref_rejected_logps': expected a finite number"
    ):
        make_trainer(tmp_path, train_dataset=both, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="has ref_chosen_logps, but no ref_rejected_logps"):
        precomputed(tmp_path, train_dataset=given)
    trainer, calls = precomputed(tmp_path, train_dataset=given.add_column("ref_rejected_logps", [-2.0] * 7))
    assert calls == 0
    assert sums_of(trainer.train_dataset) == [[-1.0 * i for i in range(7)], [-2.0] * 7]
    assert not (tmp_path / "refs").exists()


def test_no_cache_where_none_is_wanted_or_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class OtherCollator(PreferenceCollator):
        pass

    precomputed(tmp_path, ref_cache_dir="none")
    assert "rows computed and not kept: ref_cache_dir is 'none'" in capsys.readouterr().out
    precomputed(tmp_path, data_collator=OtherCollator(0))
    assert "not kept: which tokens the data collator OtherCollator scores is not known" in capsys.readouterr().out
    assert not (tmp_path / "refs").exists()
    assert default_ref_cache_dir().parts[-2:] == ("dil_kernels", "reference_log_probs")


def test_a_data_set_is_known_by_its_tokens_however_they_are_stored() -> None:
    rows = tokenized(make_pairs(9)).to_list()
    whole = datasets.Dataset.from_list(rows)
    expected = dataset_fingerprint(whole)
    parts = datasets.concatenate_datasets([datasets.Dataset.from_list(part) for part in (rows[:2], rows[2:])])
    narrow = whole.cast_column("chosen_ids", datasets.List(datasets.Value("int32")))
    picked = datasets.Dataset.from_list([*rows[5:], *rows[:5]]).select([*range(4, 9), *range(4)])
    for same in (parts, narrow, picked, whole.remove_columns("length"), whole.with_format("torch")):
        assert dataset_fingerprint(same) == expected
        np.testing.assert_array_equal(scored_lengths(same), scored_lengths(whole))
    moved = [*rows[3]["chosen_ids"], *rows[4]["chosen_ids"]]  # the same tokens, another end of the row
    rows[3]["chosen_ids"], rows[4]["chosen_ids"] = moved[:1], moved[1:]
    assert len(moved) > 2
    assert dataset_fingerprint(datasets.Dataset.from_list(rows)) != expected
    rows[0]["prompt_ids"] = []
    counts = [max(len(rows[0][name]) - 1, 0) for name in ("chosen_ids", "rejected_ids")]
    assert scored_lengths(datasets.Dataset.from_list(rows))[0].tolist() == counts
    assert scored_lengths(whole).sum() == (batch_of(make_pairs(9))["labels"] != -100).sum()


def test_a_model_is_known_by_what_it_computes() -> None:
    expected = model_fingerprint(make_model())
    moved = make_model()
    moved.config._name_or_path = "elsewhere"
    assert model_fingerprint(moved) == expected
    assert model_fingerprint(make_model().train().requires_grad_(False)) == expected
    buffer = make_model()
    buffer.model.rotary_emb.inv_freq[-1] *= 2  # in no checkpoint
    swapped = make_model()
    swapped.model.layers[0].mlp.act_fn = nn.GELU()
    assert len({expected, *map(model_fingerprint, (buffer, swapped, make_model(1), make_model().half()))}) == 5


def test_weights_that_are_not_here_have_no_fingerprint(tmp_path: Path) -> None:
    sharded = make_model()
    sharded.lm_head.weight.ds_id = 0  # as DeepSpeed's ZeRO-3 marks them
    with pytest.raises(NotImplementedError, match=r"embed_tokens\.weight is sharded over processes"):
        model_fingerprint(sharded)
    with torch.device("meta"):
        absent = nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="weight is on the meta device"):
        model_fingerprint(absent)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        layer = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(NotImplementedError, match="weight is sharded over processes"):
            model_fingerprint(layer)
    finally:
        torch.distributed.destroy_process_group()


DISTRIBUTED = """
import json
from test_ref_cache import precomputed, sums_of
directory = Path(sys.argv[1])
record = []
for _ in range(2):
    trainer, calls = precomputed(directory, ddp_backend="gloo", ddp_find_unused_parameters=False)
    record.append([calls, sums_of(trainer.train_dataset)])
(directory / f"rank{trainer.args.process_index}.json").write_text(json.dumps(record))
"""


def test_two_processes_share_one_file(tmp_path: Path) -> None:
    result = run_on_two_processes(DISTRIBUTED, tmp_path, tmp_path)
    assert result.stdout.count("computed; kept in ") == result.stdout.count("rows read from ") == 1
    assert len(list((tmp_path / "refs").iterdir())) == 1
    (first, again), other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert other == [first, again]
    assert (first[0], again[0]) == (2, 1)  # half of the 4 batches each, then one as a sample
    assert again[1] == first[1]
    one, calls = precomputed(tmp_path)
    assert calls == 1, "one process finds what two have kept"
    assert sums_of(one.train_dataset) == first[1]
    alone, _ = precomputed(tmp_path, ref_cache_dir="none")
    np.testing.assert_allclose(sums_of(alone.train_dataset), first[1], rtol=RELATIVE)
