"""Runs a program with its weights sharded on CPUs, where accelerate has it fall back to plain DDP without a word.

python -m tests.sharding_shim MODULE ARGUMENTS…, under `accelerate launch` with an FSDP2 or DeepSpeed configuration.
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def main() -> None:
    os.environ.pop("ACCELERATE_USE_CPU", None)  # the switch for plain DDP
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # what accelerate answers where it finds a GPU, less the GPU
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
