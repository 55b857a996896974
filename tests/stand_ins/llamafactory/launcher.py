import os
import subprocess
import sys


def launch():
    from .train.tuner import run_exp

    command = sys.argv.pop(1)
    assert command == "train"
    if os.environ.get("FORCE_TORCHRUN") != "1":
        run_exp()
        return
    words = "{torchrun} --nproc_per_node 2 {file_name} {args}"
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone"
    if os.environ.get("RDZV_ID"):
        words = words.format(torchrun=torchrun, file_name=__file__, args=" ".join(sys.argv[1:]))
    else:
        words = words.format(torchrun=torchrun, file_name=__file__, args=" ".join(sys.argv[1:]))
    sys.exit(subprocess.run(words.split(), check=True).returncode)


if __name__ == "__main__":
    print("LLaMA-Factory's own process")
