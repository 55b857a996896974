import torch


class DPOTrainer:
    def __init__(
        self,
        model,
        ref_model,
        strategy,
        tokenizer,
        optim,
        train_dataloader,
        eval_dataloader,
        scheduler,
        max_norm=0.5,
        beta=0.01,
        max_epochs=2,
        save_hf_ckpt=False,
        disable_ds_ckpt=False,
    ):
        self.model, self.ref_model, self.loss_fn = model, ref_model, None

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        raise AssertionError("the trainer's own forward")

    def concatenated_inputs(self, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        return torch.cat([chosen_ids, reject_ids]), torch.cat([c_mask, r_mask]), prompt_id_lens * 2

    def loss(self, *batch):
        """The loss of a batch, as OpenRLHF takes it, and the NLL of the chosen responses."""
        chosen, rejected, _, nll = self.concatenated_forward(self.model, *batch)
        with torch.no_grad():
            ref_chosen, ref_rejected, *_ = self.concatenated_forward(self.ref_model, *batch)
        return self.loss_fn(chosen, rejected, ref_chosen, ref_rejected)[0], nll
