import torch
from torch.nn.functional import pad


class DPOTrainer:
    def __init__(self, model=None, ref_model=None, *_args, **kwargs):
        self.model, self.ref_model, self.args, self.template = model, ref_model, kwargs["args"], kwargs["template"]
        self.aux_loss_enabled = False

    def get_cu_seqlens(self, position_ids, logits_to_keep):
        assert logits_to_keep is None
        starts = (position_ids[0] == 0).nonzero().squeeze(1)
        return pad(starts, (0, 1), value=position_ids.shape[1]).int()

    def concatenated_forward(self, model, batch, is_ref_model=False):
        raise AssertionError("the trainer's own forward")

    def dpo_loss(
        self,
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        loss_type="sigmoid",
        model_output=None,
    ):
        assert loss_type == "sft"
        nothing = torch.zeros(len(chosen_logps))
        return model_output["nll_loss"].expand(len(chosen_logps)), nothing, nothing

    def loss(self, batch):
        """The weighted sum of the losses of a batch, as ms-swift takes it, and its metrics."""
        policy = self.concatenated_forward(self.model, batch)
        with torch.no_grad():
            ref = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
        logps = (output[f"{side}_logps"] for output in (policy, ref) for side in ("chosen", "rejected"))
        logps, total = list(logps), 0
        for name, weight in zip(self.args.loss_type, self.args.loss_weights, strict=True):
            losses, *_ = self.dpo_loss(*logps, name, policy)
            total = total + weight * losses
        return total.mean(), {name: value.float().mean().item() for name, value in policy.items()}
