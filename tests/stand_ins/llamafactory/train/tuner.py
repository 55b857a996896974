import os

from ..hparams import read_args
from .dpo import trainer


def run_exp(args=None, callbacks=None):
    name, options = trainer.CustomDPOTrainer.__name__, getattr(trainer.CustomDPOTrainer, "options", None)
    print(f"process {os.environ.get('RANK')}: {name}, {options}, {read_args() if args is None else args}", flush=True)
