import torch


class CustomDPOTrainer:
    def __init__(self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs):
        self.model, self.ref_model, self.ftx_gamma = model, ref_model, finetuning_args.pref_ftx

    def concatenated_forward(self, model, batch, is_ref_model=False):
        raise AssertionError("the trainer's own forward")

    def compute_preference_loss(
        self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    ):
        return self.dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        )

    def loss(self, batch):
        """The loss of a batch, as LLaMA-Factory takes it, and its metrics."""
        policy = self.concatenated_forward(self.model, batch)
        with torch.no_grad():
            ref = self.concatenated_forward(self.ref_model, batch, is_ref_model=True)
        logps = (output[f"{side}_logps"] for output in (policy, ref) for side in ("chosen", "rejected"))
        losses, *_ = self.compute_preference_loss(*logps)
        losses += -self.ftx_gamma * policy["chosen_logps_avg"]
        return losses.mean(), {name: value.mean().item() for name, value in policy.items()}
