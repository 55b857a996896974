"""What ms-swift runs for `--external_plugins`: `rlhf_type=dpo` gets the trainer of dpo_trainer.py.

ms-swift puts the folder of this file on the path of imports; no other file here has the name of a package.
"""

from swift.trainers.trainer_factory import TrainerFactory

TrainerFactory.TRAINER_MAPPING["dpo"] = "dil_kernels.integrations.swift.dpo_trainer.DILTrainer"
