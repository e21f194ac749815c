"""PPO's program on two processes, weights replicated or sharded: every step's figures are those of one process."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from baton.launch import stage_command
from tests.conftest import ROOT, program_environment, run_stage

HEAD = """compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_machines: 1
num_processes: 2
mixed_precision: "no"
main_process_port: 0
"""
FSDP2 = (
    HEAD.format(kind="FSDP")
    + """fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_state_dict_type: FULL_STATE_DICT
"""
)
ZERO = (
    HEAD.format(kind="DEEPSPEED")
    + """deepspeed_config:
  zero_stage: {stage}
  offload_optimizer_device: none
  offload_param_device: none
  gradient_accumulation_steps: 1
  zero3_init_flag: false
"""
)
CONFIGURATIONS = {
    "ddp": HEAD.format(kind="MULTI_GPU"),
    "fsdp2": FSDP2,
    "zero2": ZERO.format(stage=2),
    "zero3": ZERO.format(stage=3),
}
