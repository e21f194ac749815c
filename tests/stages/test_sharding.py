"""One process: every collective is the identity, and norms and scaling are plain."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from stages.sharding import Spread


@pytest.fixture
def spread() -> Spread:
    return Spread(Accelerator(cpu=True))


def test_alone_collectives_change_nothing(spread: Spread) -> None:
    assert (spread.world, spread.rank, spread.sharded) == (1, 0, False)
    tensor = torch.tensor([1.0, 2.0])
    assert spread.sum(tensor) is tensor
    assert spread.maximum(3) == 3 and spread.largest(torch.tensor(2.5)) == 2.5
    assert spread.collect({"a": 1}) == [{"a": 1}]
    with spread.gathered():
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
