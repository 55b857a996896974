class TrainerFactory:
    TRAINER_MAPPING = dict(dpo="swift.rlhf_trainers.DPOTrainer")  # noqa: C408, RUF012
