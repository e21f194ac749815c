"""One process: every collective is the identity, norms and scaling are plain. And what is refused before any start.

Two processes with FSDP2 and DeepSpeed: tests/test_ppo_processes.py.
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from baton.errors import UserError
from stages.session import Session
from stages.sharding import Spread, open_spread


@pytest.fixture
def spread() -> Spread:
    return Spread(Accelerator(cpu=True))


def accelerator(fsdp: Any = None, deepspeed: Any = None, mixed_precision: str = "no") -> Any:
    """As accelerate is on the first of two processes."""
    return SimpleNamespace(
        num_processes=2,
        process_index=0,
        device=torch.device("cpu"),
        mixed_precision=mixed_precision,
        state=SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed),
    )


def fsdp(version: int = 2, activation_checkpointing: bool = False) -> Any:
    return SimpleNamespace(fsdp_version=version, activation_checkpointing=activation_checkpointing)


def test_alone_collectives_change_nothing(spread: Spread) -> None:
    assert (spread.world, spread.rank, spread.sharded, spread.shards) == (1, 0, False, 1)
    assert spread.can_save and not spread.steps_itself and spread.text() == ""
    tensor = torch.tensor([1.0, 2.0])
    assert spread.sum(tensor) is tensor
    assert spread.maximum(3) == 3 and spread.largest(torch.tensor(2.5)) == 2.5
    assert spread.collect({"a": 1}) == [{"a": 1}]
    with spread.gathered(), spread.computing(), spread.changing():
        spread.accumulate(True)


def test_norm_and_scale(spread: Spread) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    spread.sum_gradients({str(at): p for at, p in enumerate(parameters)})
    assert parameters[2].grad is None, "unused stays unused: no decay"
    assert spread.norm(parameters) == 13.0
    spread.scale(parameters, 2.0)
    assert spread.norm(parameters) == 13.0, "gradients are clipped, never blown up"
    spread.scale(parameters, 0.5)
    assert parameters[0].grad.tolist() == [1.5, 2.0]
    parameters[1].grad[0] = math.inf
    assert spread.norm(parameters) == math.inf
    assert spread.norm([]) == 0.0


def test_backward_adds_gradients(spread: Spread) -> None:
    weight = nn.Parameter(torch.tensor(2.0))
    spread.backward(3 * weight)
    spread.backward(weight**2)
    assert float(weight.grad) == 7.0


def test_fsdp2_loads_whole_weights_on_every_rank(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's default has transformers load on rank 0 alone, for a broadcast that PPO does not make."""
    from transformers.distributed import fsdp as theirs

    monkeypatch.setattr(theirs, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert theirs.is_fsdp_enabled()
    spread = open_spread(accelerator(fsdp()), make_recipe())
    assert not theirs.is_fsdp_enabled()
    assert spread.sharded and spread.shards == 2 and "FSDP2" in spread.text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (accelerator(fsdp(version=1)), "has fsdp_version: 1, and PPO .* set fsdp_version: 2"),
        (accelerator(fsdp(activation_checkpointing=True)), "fsdp_activation_checkpointing, which PPO does not do"),
        (accelerator(fsdp(), mixed_precision="bf16"), 'mixed_precision: bf16; .* set mixed_precision: "no"'),
        (accelerator(deepspeed=SimpleNamespace(zero_stage=2), mixed_precision="fp16"), "mixed_precision: fp16"),
    ],
)
def test_what_would_be_ignored_is_refused(make_recipe: Callable[..., Any], given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_spread(given, make_recipe())


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"ppo": {"critic_warmup_steps": 1}}, "ppo.critic_warmup_steps"),
        ({"ppo": {"kl_minibatch_stop_nats": 0.1}}, "ppo.kl_minibatch_stop_nats"),
    ],
)
def test_deepspeed_refuses_what_it_cannot_do(make_recipe: Callable[..., Any], sections: Any, name: str) -> None:
    given = accelerator(deepspeed=SimpleNamespace(zero_stage=2))
    with pytest.raises(UserError, match=f"{name} does not go with DeepSpeed"):
        open_spread(given, make_recipe(**sections))


@pytest.mark.parametrize(("stage", "sharded"), [(2, False), (3, True)])
def test_deepspeed_says_what_it_does(make_recipe: Callable[..., Any], stage: int, sharded: bool) -> None:
    spread = open_spread(accelerator(deepspeed=SimpleNamespace(zero_stage=stage)), make_recipe())
    assert spread.sharded is sharded and spread.shards == 1 and spread.steps_itself and not spread.can_save
    assert spread.text().startswith(f"DeepSpeed ZeRO-{stage} on 2 processes")
    assert ("whole while the model computes" in spread.text()) is sharded
    with spread.gathered():  # before the engine is there: weights are still whole
        pass


def test_deepspeed_neither_saves_nor_continues(make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    spread = open_spread(accelerator(deepspeed=SimpleNamespace(zero_stage=3)), make_recipe())
    run = SimpleNamespace(last_checkpoint=lambda: None, checkpoints=tmp_path / "checkpoints")
    session: Any = SimpleNamespace(spread=spread, run=run, state=None)
    Session.save(session)
    assert not any(tmp_path.iterdir())
    run.last_checkpoint = lambda: tmp_path / "checkpoint-2"
    with pytest.raises(UserError, match="checkpoint-2 cannot be continued under DeepSpeed; .* delete .*checkpoints"):
        Session.resume(session)
