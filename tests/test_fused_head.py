"""The fused head inside Hugging Face models, against the same models' own logits."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.distributed as dist
import transformers
from fused_head_models import (
    ARCHITECTURES,
    COMMON,
    IGNORE,
    RELATIVE,
    V,
    assert_close,
    assert_same,
    assert_same_gradients,
    batch,
    fused,
    gradients,
    largest,
    make,
    own,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from dil_kernels.models.fused_head import (
    UnsupportedHeadError,
    fused_head_problem,
    install_fused_head,
    remove_fused_head,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_as_own_logits(name):
    model = make(name).train()
    head = install_fused_head(model)
    assert head.logit_scale == pytest.approx(ARCHITECTURES[name][1], rel=1e-11)
    assert head.final_logit_softcapping == ARCHITECTURES[name][2]
    assert_same(model, *batch(), temperature=0.7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_no_less_exact_than_own_logits(name):
    model = make(name, torch.bfloat16)
    inputs, labels, upstream = batch()
    exact = copy.deepcopy(model).double()
    truth = own(exact, inputs, labels)
    true_grads = gradients(exact, truth, upstream)
    install_fused_head(model)

    def errors(logps: Tensor) -> tuple[float, float]:
        grads = gradients(model, logps, upstream)
        assert grads.keys() == true_grads.keys()
        worst = max(largest(grads[n] - g) / largest(g) for n, g in true_grads.items() if largest(g) > 1e-12)
        return largest(logps - truth), worst

    own_errors, fused_errors = errors(own(model, inputs, labels)), errors(fused(model, inputs, labels))
    assert fused_errors[0] <= 2 * own_errors[0]
    assert fused_errors[1] <= 2 * own_errors[1]


def test_called_without_labels_to_score_nothing_changes():
    model = make("Gemma2ForCausalLM").eval()
    inputs, labels, _ = batch()
    before = model(**inputs, labels=labels)
    signature = inspect.signature(model.forward)
    generated = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    install_fused_head(model)
    after = model(**inputs, labels=labels)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False), generated)


def test_scores_without_the_logits():
    model = make("LlamaForCausalLM")
    inputs, labels, _ = batch()
    install_fused_head(model)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    fused(model, inputs, labels)
    assert shapes == [(1, 1, 4)]  # the stand-in


def test_statistics_are_of_the_processed_logits():
    model = make("Gemma2ForCausalLM")
    inputs, labels, _ = batch()
    install_fused_head(model)
    output = model(**inputs, score_labels=labels, score_options={"return_statistics": True, "temperature": 0.7})
    scored = labels[:, 1:] != IGNORE
    logits = model(**inputs).logits[:, :-1][scored] / 0.7
    logps = logits.log_softmax(-1)
    assert_close(output.mean_logit[scored], logits.mean(-1), 1e-5, "mean logit")
    assert_close(output.entropy[scored], -(logps.exp() * logps).sum(-1), 1e-5, "entropy")
    assert torch.equal(output.top1_hit[scored], logits.argmax(-1) == labels[:, 1:][scored])
    assert not output.entropy[~scored].any()


def test_load_balancing_loss_is_handed_on():
    model = make("MixtralForCausalLM")
    inputs, labels, _ = batch()
    expected = model(**inputs).aux_loss
    install_fused_head(model)
    assert torch.equal(model(**inputs, score_labels=labels).aux_loss, expected)


def test_hidden_states_and_attentions_are_handed_on():
    model = make("LlamaForCausalLM")
    model.set_attn_implementation("eager")
    inputs, labels, _ = batch()
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = model(**inputs, **asked)
    install_fused_head(model)
    output = model(**inputs, **asked, score_labels=labels)
    for name in ("hidden_states", "attentions"):
        values, truth = getattr(output, name), getattr(expected, name)
        assert len(values) == len(truth) > 0
        assert all(map(torch.equal, values, truth))
    assert "hidden_states" not in model(**inputs, score_labels=labels)


def test_removal_restores_the_model():
    model = make("LlamaForCausalLM")
    attributes = {module: set(vars(module)) for module in (model, model.lm_head)}
    install_fused_head(model)
    remove_fused_head(model)
    remove_fused_head(model)
    assert model.forward == type(model).forward.__get__(model)
    assert model.lm_head.forward == nn.Linear.forward.__get__(model.lm_head)
    assert {module: set(vars(module)) for module in attributes} == attributes


def test_other_instances_are_left_alone():
    model, other = make("LlamaForCausalLM"), make("LlamaForCausalLM")
    install_fused_head(model)
    assert "forward" not in vars(other)
    assert "forward" not in vars(other.lm_head)


def test_autocast():
    model = make("LlamaForCausalLM")
    inputs, labels, upstream = batch()
    truth = own(model, inputs, labels)
    true_grads = gradients(model, truth, upstream)
    install_fused_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = own(model, inputs, labels), fused(model, inputs, labels)
    assert actual.dtype == torch.float32
    assert largest(actual - truth) <= 2 * largest(expected - truth)
    own_grads, fused_grads = gradients(model, expected, upstream), gradients(model, actual, upstream)
    for name, grad in true_grads.items():
        assert largest(fused_grads[name] - grad) <= 2 * largest(own_grads[name] - grad), name


def test_gradient_checkpointing():
    model = make("LlamaForCausalLM").train()
    inputs, labels, upstream = batch()
    expected = gradients(model, own(model, inputs, labels), upstream)
    install_fused_head(model)
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model, fused(model, inputs, labels), upstream), expected)


def test_checkpointing_the_whole_model():
    model = make("LlamaForCausalLM").train()
    inputs, labels, upstream = batch()
    expected = gradients(model, own(model, inputs, labels), upstream)
    install_fused_head(model)
    logps = torch.utils.checkpoint.checkpoint(fused, model, inputs, labels, use_reentrant=False)
    assert_same_gradients(gradients(model, logps, upstream), expected)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    model = make(name).train()
    inputs, labels, upstream = batch()
    install_fused_head(model)
    expected = fused(model, inputs, labels)
    expected_grads = gradients(model, expected, upstream)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(**inputs, score_labels=labels).token_logps
    assert_close(actual, expected, RELATIVE * largest(expected), "log-probs")
    assert_same_gradients(gradients(model, actual, upstream), expected_grads)


class Shifted(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.changed(output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda self, x: x + 1.0, "does more to its logits"),
        (lambda self, x: x.clamp(-50, 50), "does more to its logits"),
        (lambda self, x: x.sinh(), "does more to its logits"),
        (lambda self, x: -x, "does more to its logits"),
        (lambda self, x: x.index_fill(-1, torch.tensor([7]), -1e9), "does more to its logits"),
        (lambda self, x: x[..., : V - 1], r"turns logits \[1, 5, 211\] into \[1, 5, 210\]"),
        (lambda self, x: x * self.model.norm.weight[0], "trainable"),
        (lambda self, x: x + self.lm_head(x.new_zeros(1, 5, 32)), "more than once"),
        (lambda self, x: x.no_such_method(), "no_such_method"),
    ],
)
def test_unknown_post_processing_is_refused(change, reason, monkeypatch):
    monkeypatch.setattr(Shifted, "changed", change, raising=False)
    model = Shifted(make("LlamaForCausalLM").config)
    attributes = {module: set(vars(module)) for module in model.modules()}
    with pytest.raises(UnsupportedHeadError, match=f"Shifted: .*{reason}"):
        install_fused_head(model)
    assert fused_head_problem(model) is not None
    assert {module: set(vars(module)) for module in model.modules()} == attributes


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced_head(head: nn.Module) -> PreTrainedModel:
    model = make("LlamaForCausalLM")
    model.lm_head = head
    return model


def patched_head() -> PreTrainedModel:
    model = make("LlamaForCausalLM")
    model.lm_head.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Linear(2, 2), "not a PreTrainedModel"),
        (lambda: transformers.LlamaModel(make("LlamaForCausalLM").config), "not a causal language model"),
        (lambda: transformers.LlamaForSequenceClassification(make("LlamaForCausalLM").config), "not a causal"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            ),
            "encoder-decoder",
        ),
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**COMMON)), "not a causal"),
        (lambda: replaced_head(ScaledLinear(32, V)), "a ScaledLinear, not an nn.Linear"),
        (patched_head, "was replaced"),
    ],
)
def test_other_models_are_refused(model, reason):
    assert reason in fused_head_problem(model())


def test_weights_need_not_be_there():
    with torch.device("meta"):
        model = make("GraniteForCausalLM")
    assert fused_head_problem(model) is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": batch()[1]}, ValueError, "exclude each other"),
        ({"score_labels": batch()[1][:, 1:]}, ValueError, r"score_labels must be \[3, 9\]"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep"),
        ({"score_options": {"logit_scale": 2.0}}, TypeError, "logit_scale"),
        ({"score_options": {"shift": False}}, TypeError, "score_options must be among temperature, .*, got 'shift'"),
        ({"score_labels": None, "score_options": {"temperature": 2.0}}, TypeError, "but no score_labels"),
    ],
)
def test_bad_calls(options, error, message):
    model = make("LlamaForCausalLM")
    inputs, labels, upstream = batch()
    install_fused_head(model)
    with pytest.raises(error, match=message):
        model(**inputs, **{"score_labels": labels, **options})
    assert_same(model, inputs, labels, upstream)


SHARDED = [
    ("ddp", "Qwen2ForCausalLM"),  # tied
    ("ddp", "PhiForCausalLM"),  # bias
    ("fsdp", "Qwen2ForCausalLM"),
    ("fsdp", "LlamaForCausalLM"),
    ("fsdp, head apart", "LlamaForCausalLM"),
]


def share(rank: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    return batch(seed=rank)


def _train_on_a_share(rank: int, directory: str) -> None:
    """One of two processes; each has its own rows of the batch. Writes the gradients of every case."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for wrapper, name in SHARDED:
        model = wrapped = make(name)
        install_fused_head(model)
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            head = [model.lm_head] if wrapper == "fsdp, head apart" else []
            for module in [*model.model.layers, *head, model]:
                fully_shard(module, mesh=mesh)
        inputs, labels, upstream = share(rank)
        grads = gradients(model, fused(wrapped, inputs, labels), upstream)
        full = {key: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for key, grad in grads.items()}
        if rank == 0:
            torch.save(full, f"{directory}/{wrapper} {name}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_of_two_processes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_processes")
    spawn(_train_on_a_share, (str(directory),), nprocs=2)
    return {case: torch.load(directory / f"{case[0]} {case[1]}.pt") for case in SHARDED}


@pytest.mark.parametrize("case", SHARDED)
def test_two_processes_give_the_gradients_of_one(gradients_of_two_processes, case):
    model = make(case[1])
    both = [gradients(model, own(model, inputs, labels), upstream) for inputs, labels, upstream in map(share, range(2))]
    mean = {key: (both[0][key] + both[1][key]) / 2 for key in both[0]}
    assert_same_gradients(gradients_of_two_processes[case], mean)
