from trl import DPOTrainer


class AxolotlDPOTrainer(DPOTrainer):
    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags
        self.model_accepts_loss_kwargs = False
