class DPOLossFn:
    def __init__(self, cfg, use_linear_ce_fusion=False):
        self.reference_policy_kl_penalty = cfg.reference_policy_kl_penalty
        self.preference_average_log_probs = cfg.preference_average_log_probs

    def _dpo_loss(self, next_token_logprobs, data, global_valid_seqs):
        raise AssertionError("the trainer's own loss")
