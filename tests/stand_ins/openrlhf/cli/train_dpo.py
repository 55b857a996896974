import sys

from openrlhf.trainer.dpo_trainer import DPOTrainer

if __name__ == "__main__":
    print(DPOTrainer.__name__, DPOTrainer.options, sys.argv[1:])
