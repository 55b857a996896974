"""What a trainer is made of fits together, or an error at construction names both sides."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tiny_model import make_model, make_pairs, make_tokenizer, save_model
from tiny_trainer import make_trainer, tokenized

from dil_kernels.training.model_checks import pad_token_id, position_limit, vocabulary_size

GPT2 = {"vocab_size": 288, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}


def make_gpt2() -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


@pytest.mark.parametrize("kind", ["with padding", "padding-free"])
def test_any_valid_id_is_taken_for_padding(tmp_path: Path, kind: str) -> None:
    """A tokenizer to which [PAD] was added after the model's last id, as users do."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 280
    losses = []
    for size, processing_class in ((288, make_tokenizer()), (280, tokenizer)):
        model = make_model()
        model.resize_token_embeddings(size)
        trainer = make_trainer(
            tmp_path, model=model, processing_class=processing_class, max_steps=2, padding_free=kind == "padding-free"
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] != [0, 0]
    assert len(losses[1]) == 2


def test_the_id_for_padding_is_one_that_the_model_has() -> None:
    tokenizer = make_tokenizer()
    assert pad_token_id(tokenizer, 288) == tokenizer.pad_token_id == 0
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_token_id(tokenizer, None) == pad_token_id(tokenizer, 281) == 280
    assert pad_token_id(tokenizer, 280) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = "~"
    assert pad_token_id(tokenizer, tokenizer.eos_token_id) == 0


@pytest.mark.parametrize("side", ["model", "ref_model"])
@pytest.mark.parametrize("form", ["pairs", "tokenised", "evaluation", "given to evaluate"])
def test_ids_beyond_the_embedding_are_named(tmp_path: Path, side: str, form: str) -> None:
    small = make_model(vocab_size=150)
    rng = random.Random(0)
    low = [{name: f"w{rng.randrange(100)} " for name in ("prompt", "chosen", "rejected")} for _ in range(4)]
    pairs = datasets.Dataset.from_list([*low, {"prompt": "w1 ", "chosen": "w170", "rejected": "w2"}])
    models = {"model": make_model(), side: small}
    data = {"train_dataset": tokenized(pairs) if form == "tokenised" else pairs}
    if "eval" in form:
        data = {"train_dataset": datasets.Dataset.from_list(low), "eval_dataset": pairs}
    name = "train" if form in ("pairs", "tokenised") else "eval"
    problem = (
        rf"^the {name} data set has the token id 176 \('w170'\), but {side} has embeddings for 150 ids only \(the "
        r"tokenizer has 280\)"
    )
    if form == "given to evaluate":
        trainer = make_trainer(tmp_path, **models, train_dataset=data["train_dataset"])
        with pytest.raises(ValueError, match=problem):
            trainer.evaluate(pairs)
        return
    with pytest.raises(ValueError, match=problem):
        make_trainer(tmp_path, **models, **data)


@pytest.mark.parametrize("side", ["model", "ref_model"])
def test_sequences_beyond_the_positions_of_a_model_are_named(tmp_path: Path, side: str) -> None:
    words = "w1 w2 w3 w4 w5 w6 w7 w8 w9 "
    fits = {"prompt": words, "chosen": words + "w10", "rejected": "w1"}  # 9 + 10 and the end: all 20 positions
    models = {"model": make_model(), side: make_gpt2()}
    trainer = make_trainer(tmp_path, **models, train_dataset=datasets.Dataset.from_list([fits, fits]), max_steps=1)
    trainer.train()
    longer = datasets.Dataset.from_list([fits, {**fits, "prompt": "w1 " + words}])
    problem = (
        f"^the train data set has a sequence of 21 tokens, but {side} has only 20 positions: set max_length=20 or less"
    )
    with pytest.raises(ValueError, match=problem):
        make_trainer(tmp_path, **models, train_dataset=longer)
    make_trainer(tmp_path, **models, train_dataset=longer, max_length=20)


def test_answers_beyond_the_positions_of_a_model_are_named(tmp_path: Path) -> None:
    pairs = make_pairs(2)
    options = {"model": make_gpt2(), "train_dataset": pairs, "eval_dataset": pairs, "max_length": 20}
    longest = max(map(len, tokenized(pairs, 20)["prompt_ids"][:]))
    make_trainer(
        tmp_path, **options, num_generations_at_eval=2, generate_max_new_tokens=21 - longest, max_steps=1
    ).train()
    with pytest.raises(ValueError, match=r"generate_max_new_tokens=\d+ .* beyond the 20 positions of model"):
        make_trainer(tmp_path, **options, num_generations_at_eval=2, generate_max_new_tokens=22 - longest)


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[Any, int | None]] = {
    "gpt2": (lambda: make_gpt2(), 20),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SIZES, ffn_dim=16, max_position_embeddings=24, word_embed_proj_dim=16)
        ),
        24,
    ),
    "gptj": (
        lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(vocab_size=64, n_positions=24, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
        ),
        24,
    ),
    "roberta": (
        lambda: transformers.RobertaForCausalLM(
            transformers.RobertaConfig(**SIZES, intermediate_size=16, max_position_embeddings=26, is_decoder=True)
        ),
        24,
    ),
    "llama": (lambda: make_model(max_position_embeddings=24), None),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
        ),
        None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_is_where_a_model_fails(family: str) -> None:
    build, limit = FAMILIES[family]
    model = build().eval()
    assert position_limit(model) == limit
    with torch.no_grad():
        model(torch.full((1, limit or 40), 7))
        if limit is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, limit + 1), 7))


def test_the_size_of_a_vocabulary_is_the_least() -> None:
    assert vocabulary_size(make_model()) == 288
    assert vocabulary_size(make_model(), make_model(vocab_size=200), None) == 200
    model = make_model(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(32, 250, bias=False)
    assert vocabulary_size(model) == 250
    assert vocabulary_size(torch.nn.Linear(2, 2)) is None


LLAMA = {**SIZES, "intermediate_size": 16}
WRONG_MODELS: dict[str, tuple[Any, str]] = {
    "path": (lambda: Path("gpt2"), "causal language model, got PosixPath"),
    "encoder and decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "got T5ForConditionalGeneration, which has an encoder and a decoder",
    ),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA)),
        "got LlamaForSequenceClassification, which has no language-model head",
    ),
    "headless": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)),
        "got LlamaModel, which has no language-model head",
    ),
    "masked": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, intermediate_size=16)),
        "got BertForMaskedLM, a masked language model",
    ),
}


@pytest.mark.parametrize("argument", ["model", "ref_model"])
@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, argument: str, kind: str) -> None:
    build, problem = WRONG_MODELS[kind]
    with pytest.raises(TypeError, match=f"^{argument} must be .*{problem}"):
        make_trainer(tmp_path, **{argument: build()})


def test_models_are_loaded_by_their_names_with_the_tokenizer(tmp_path: Path) -> None:
    directory = str(save_model(tmp_path / "model", make_model(3).bfloat16()))
    losses = []
    for names in (
        {"model": directory, "ref_model": directory, "processing_class": None},
        {"model": transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)},
    ):
        trainer = make_trainer(tmp_path, **names, train_sampling_strategy="sequential", max_steps=2)
        assert trainer.model.dtype == torch.float32
        assert trainer.model.model_tags[:2] == ["dil", "preference-learning"]
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    with pytest.raises(OSError, match="no_such_model"):
        make_trainer(tmp_path, model=str(tmp_path / "no_such_model"), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="processing_class must be the tokenizer of the model, got None"):
        make_trainer(tmp_path, processing_class=None)


def test_a_wrong_model_under_an_adapter_is_refused(tmp_path: Path) -> None:
    import peft

    build, problem = WRONG_MODELS["classifier"]
    model = peft.get_peft_model(build(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=problem):
        make_trainer(tmp_path, model=model)


def test_several_data_sets_to_train_on_are_refused(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": make_pairs(4), "test": make_pairs(3, seed=1)})
    problem = r"train_dataset must be one data set, got a DatasetDict with 'train', 'test': give one of its data sets"
    with pytest.raises(TypeError, match=problem):
        make_trainer(tmp_path, train_dataset=both)
    metrics = make_trainer(tmp_path, eval_dataset=both).evaluate()
    assert {"eval_train_loss", "eval_test_loss"} <= metrics.keys()


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy", "torch"])
def test_a_tokenised_data_set_may_have_any_format(tmp_path: Path, kind: str) -> None:
    losses = [
        make_trainer(tmp_path, eval_dataset=dataset, train_dataset=dataset).evaluate()["eval_loss"]
        for dataset in (tokenized(make_pairs(5)), tokenized(make_pairs(5)).with_format(kind))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("label", "side", "other"), [(True, "chosen", "rejected"), (False, "rejected", "chosen")])
@pytest.mark.parametrize("form", ["responses", "tokenised"])
def test_unpaired_data_of_one_side_are_warned_of(
    tmp_path: Path, label: bool, side: str, other: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "w1 ", "completion": f"w{i}", "label": label} for i in range(3)]
    one = datasets.Dataset.from_list(rows)
    both = datasets.Dataset.from_list([*rows, {**rows[0], "label": not label}])
    if form == "tokenised":
        one, both = tokenized(one), tokenized(both)
    make_trainer(tmp_path, train_dataset=both, eval_dataset=both)
    assert not [message for message in caplog.messages if "responses only" in message]
    make_trainer(tmp_path, train_dataset=one, eval_dataset=both)
    warned = [message for message in caplog.messages if "responses only" in message]
    assert warned == [f"the train data set has {side} responses only, and no {other} one to tell them from"]


@pytest.mark.parametrize("name", ["image", "images"])
def test_images_beside_the_text_are_refused(tmp_path: Path, name: str) -> None:
    pairs = make_pairs(2).add_column(name, [["a.png"], []] if name == "images" else ["a.png", None])
    with pytest.raises(
        ValueError, match=f"^column '{name}' has images, video or sound, of which training sees nothing"
    ):
        make_trainer(tmp_path, train_dataset=pairs)


NOT_BY_ROWS: dict[str, tuple[Any, str]] = {
    "cpmant": (NotImplementedError, "CpmAntForCausalLM has other logits for a row that is padded on the right"),
    "electra": (TypeError, "got ElectraForCausalLM, whose tokens see later ones"),
    "xlm": (TypeError, "got XLMWithLMHeadModel, whose tokens see later ones"),
}


def make_other(name: str) -> Any:
    sizes = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "dim_head": 8}
    sizes |= {"intermediate_size": 48, "dim_ff": 48, "prompt_length": 4, "init_std": 0.2, "initializer_range": 0.2}
    sizes |= {"emb_dim": 32, "n_layers": 1, "n_heads": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **sizes))


@pytest.mark.parametrize("side", ["model", "ref_model"])
@pytest.mark.parametrize("name", NOT_BY_ROWS)
def test_a_model_whose_rows_depend_on_more_than_their_past_is_refused(tmp_path: Path, name: str, side: str) -> None:
    error, message = NOT_BY_ROWS[name]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **{"model": make_model(), side: make_other(name)})


@pytest.mark.parametrize("name", NOT_BY_ROWS)
def test_nor_is_it_trained_by_trl(tmp_path: Path, name: str) -> None:
    pytest.importorskip("trl", reason="needs the extra [trl]")
    from dil_kernels.integrations.trl import DILConfig, DILTrainer

    args = DILConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=1)
    error, message = NOT_BY_ROWS[name]
    data = {"train_dataset": make_pairs(4), "processing_class": make_tokenizer()}
    with pytest.raises(error, match=message):
        DILTrainer(make_other(name), make_other(name), args, **data).train()
