def get_batch_log_probs(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
    raise AssertionError("the trainer's own log-probs")
