"""How PPO's model is spread over processes: alone, replicated (DDP without a wrapper), or sharded by FSDP2.

Gradients are SUMS over the ranks: a loss that each rank divides by the global token count needs no factor of world.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from baton.errors import UserError
from stages.roles import Roles


class Spread:
    """Prepares the model, reduces and clips gradients, gathers parameters.

    Under FSDP2 every decoder layer is a group, the rest of the roles another one. Adapters and heads, a per cent of the
    weights, stay plain tensors on every rank; all others are sharded, trained or not.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.world, self.rank = int(accelerator.num_processes), int(accelerator.process_index)
        self.device = accelerator.device
        self.plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
        self._groups: list[tuple[Any, bool]] = []  # FSDP modules, children first; whether each reshards after forward

    @property
    def sharded(self) -> bool:
        return self.plugin is not None and self.world > 1

    def prepare(self, roles: Roles) -> None:
        """Shard the weights in place where FSDP2 was asked for; what the loop calls is then used like a forward."""
        if not self.sharded:
            return
        if getattr(self.plugin, "fsdp_version", 1) != 2:
            raise UserError("PPO spreads weights by FSDP2: set fsdp_version: 2 in the accelerate configuration")
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        reshard = bool(self.plugin.reshard_after_forward)
        offload = self.plugin.cpu_offload
        settings: dict[str, Any] = {
            "ignored_params": set(roles.small()),
            "offload_policy": offload if isinstance(offload, CPUOffloadPolicy) else OffloadPolicy(),
        }
        for layer in roles.blocks():
            fully_shard(layer, reshard_after_forward=reshard, **settings)
            self._groups.append((layer, reshard))
        # the rest too: a root that stays gathered after a forward would hide its DTensors from whoever asks for the
        # parameters, and keep old weights when others are restored
        fully_shard(roles, reshard_after_forward=True, **settings)
        self._groups.append((roles, True))
        for method in ("policy", "logprobs", "values", "scores", "settle"):
            register_fsdp_forward_method(roles, method)
        # decoding calls a model inside the roles: it must not be the first call: its layers would become roots
        roles.settle()

    def maximum(self, number: int) -> int:
        """The largest of the ranks' numbers. A collective."""
        if self.world == 1:
            return number
        box = torch.tensor(number, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def largest(self, tensor: torch.Tensor) -> float:
        """The largest of the ranks' scalars. A collective."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of equally shaped tensors. A collective."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def collect(self, item: Any) -> list[Any]:
        """What every rank has, in the order of the ranks; plain Python data only. A collective."""
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, item)
        return found

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters whole on every rank, no collective inside: ranks may decode different numbers of tokens.

        A collective at the beginning: every rank enters.
        """
        if not self.sharded:
            yield
            return
        for group, _ in self._groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
        try:
            yield
        finally:
            for group, reshard in self._groups:
                group.set_reshard_after_forward(reshard, recurse=False)
                group.reshard()

    def accumulate(self, last: bool) -> None:
        """Called before each micro-batch's forward: only the last one of a minibatch reduces sharded gradients."""
        if self.sharded:
            self._groups[-1][0].set_requires_gradient_sync(last)

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """After the last backward: gradients of plain parameters become sums over the ranks, in one message.

        Sharded ones (DTensors) have been reduced by the backward. A parameter without a gradient on every rank has none
        afterwards; one that only some ranks used counts as zero on the others.
        """
        if self.world == 1:
            return
        for parameter in parameters.values():
            if hasattr(parameter, "full_tensor") and parameter.grad is not None:
                # FSDP's backward gives the mean (its own divide factor needs an operation that gloo does not have)
                parameter.grad.to_local().mul_(self.world)  # type: ignore[attr-defined]
        plain = [parameter for parameter in parameters.values() if not hasattr(parameter, "full_tensor")]
        if not plain:
            return
        has = torch.tensor([p.grad is not None for p in plain], dtype=torch.int32, device=self.device)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        used = [p for p, flag in zip(plain, has.tolist(), strict=True) if flag]
        if not used:
            return
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in used:
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)  # type: ignore[arg-type]
        for grads in by_dtype.values():
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """The norm of all these gradients, the same on every rank. A collective where parameters are sharded."""
        from torch.distributed.tensor import DTensor

        grads = [p.grad for p in parameters if p.grad is not None]
        square = _square([grad for grad in grads if not isinstance(grad, DTensor)], self.device)
        if self.sharded:
            square = square + self.sum(_square([g.to_local() for g in grads if isinstance(g, DTensor)], self.device))
        return float(square.sqrt())

    def scale(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply all gradients."""
        if factor < 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def _square(grads: list[torch.Tensor], device: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        total = total + grad.double().square().sum()
    return total
