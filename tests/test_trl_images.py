"""DILTrainer on TRL's DPOTrainer with pairs about images: it trains as TRL does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from plain_training import assert_all_close
from tiny_model import make_tokenizer
from tiny_trainer import trained_weights
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl_runs import PLAIN, STATISTICS, logs_of, trl

from dil_kernels.integrations.trl import DILConfig, DILTrainer
from dil_kernels.training.metrics import METRICS

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDE, PATCH = 16, 8  # of an image, in pixels
COLOURS = ("red", "green", "blue", "white")


def make_processor() -> LlavaProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_llava(seed: int, image_token: int) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(**SIZES, image_size=SIDE, patch_size=PATCH)
    text = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=288, pad_token_id=0, initializer_range=0.2)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=4)
    )


def make_image_trainer(output_dir: Path, trainer_class: Any, config_class: Any, **options: Any) -> Any:
    pairs = [
        {
            "prompt": f"<image> w1 w{index} ",
            "chosen": f"w3 w{index + 4} w7",
            "rejected": "w9",
            "images": [Image.new("RGB", (24, 20), colour)],
        }
        for index, colour in enumerate(COLOURS)
    ]
    options = {**PLAIN, "max_length": None, "per_device_train_batch_size": 2, "max_steps": 2, **options}
    processor = make_processor()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    return trainer_class(
        model=make_llava(0, image_token),
        ref_model=make_llava(1, image_token),
        args=config_class(str(output_dir), **options),
        train_dataset=Dataset.from_list(pairs),
        processing_class=processor,
    )


def test_images_are_trained_on_as_by_trl(tmp_path: Path) -> None:
    ours = make_image_trainer(tmp_path, DILTrainer, DILConfig, loss_type="dpo", average_log_prob=False, fused_head=True)
    theirs = make_image_trainer(tmp_path, trl.DPOTrainer, trl.DPOConfig)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    for trainer in (ours, theirs):
        trainer.train()
    for actual, expected in zip(logs_of(ours), logs_of(theirs), strict=True):
        for metric in {*METRICS, *STATISTICS, "grad_norm"}:
            assert actual[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-5), metric
    moved, as_by_trl = (
        {name: value - before[name] for name, value in trained_weights(trainer).items()} for trainer in (ours, theirs)
    )
    assert any("vision_tower" in name and value.any() for name, value in moved.items())
    assert_all_close(moved, as_by_trl, 1e-3)  # what two fp32 runs may differ by


def test_images_are_refused_in_joined_rows(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"^padding_free=True was given, but the data have images"):
        make_image_trainer(tmp_path, DILTrainer, DILConfig, padding_free=True)
