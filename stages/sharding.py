"""How PPO's model is spread over processes: alone, replicated (DDP without a wrapper), by FSDP2 or by DeepSpeed.

Gradients are SUMS over the ranks: a loss that each rank divides by the global token count needs no factor of world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from baton.errors import UserError
from baton.recipe import PPORecipe
from stages.roles import Roles

Found = TypeVar("Found")


def open_spread(accelerator: Any, recipe: PPORecipe) -> Spread:
    """What the launcher's configuration asks for; before any weight is loaded. Raises UserError."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return Zero(accelerator, recipe)
    return Spread(accelerator)


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
        if self.plugin is not None:
            from accelerate.utils import disable_fsdp_ram_efficient_loading

            _refuse_what_would_be_ignored(accelerator, self.plugin)
            disable_fsdp_ram_efficient_loading()  # or only rank 0 would load what is loaded from now on

    @property
    def sharded(self) -> bool:
        """Whether a process holds only its part of the weights between two passes."""
        return self.plugin is not None and self.world > 1

    @property
    def shards(self) -> int:
        """Into how many parts the weights are cut while the model computes."""
        return self.world if self.sharded else 1

    @property
    def steps_itself(self) -> bool:
        """Whether gradients are reduced, clipped and applied by `step`, and each micro-batch has one backward pass."""
        return False

    @property
    def can_save(self) -> bool:
        """Whether a run can be saved and continued."""
        return True

    def text(self) -> str:
        """A line for a person; empty where nothing is sharded."""
        return f"weights sharded over {self.world} processes by FSDP2" if self.sharded else ""

    def prepare(self, roles: Roles) -> None:
        """Shard the weights in place where FSDP2 was asked for; what the loop calls is then used like a forward."""
        if not self.sharded:
            return
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

    def together(self, work: Callable[[], Found]) -> Found:
        """`work()`; where it fails on one rank it fails on all, with that rank's message, and nobody waits for it.

        A collective. `work` itself must not need the other ranks after the point where it may fail.
        """
        if self.world == 1:
            return work()
        found: Any = None
        mine: Exception | None = None
        try:
            found = work()
        except Exception as error:
            mine = error
        said = [
            text for text in self.collect(None if mine is None else (isinstance(mine, UserError), str(mine))) if text
        ]
        if mine is not None:
            raise mine
        if said:
            is_users, message = said[0]
            raise (UserError if is_users else RuntimeError)(f"on another process: {message}")
        return found  # type: ignore[no-any-return]

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

    def adopt(self, roles: Roles, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer whose `param_groups` count from now on."""
        return optimizer

    def computing(self) -> AbstractContextManager[None]:
        """Around forward and backward passes, as many on every rank. A collective."""
        return nullcontext()

    def changing(self) -> AbstractContextManager[None]:
        """Trained parameters can be read and written, by all ranks alike. A collective."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of the global loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> float:
        """Where it `steps_itself`: clip and apply the gradients; their norm before clipping. A collective."""
        raise AssertionError("gradients are applied by the caller unless it steps_itself")

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


class Zero(Spread):
    """DeepSpeed's ZeRO: its engine reduces, clips and applies the gradients, and keeps the optimizer's state in parts.

    Under ZeRO-3 the weights are in parts too, but only at rest: PPO calls its models from the inside, where DeepSpeed's
    hooks do not gather, so all weights are whole while replies are sampled, scored and learnt from. Weights are never
    offloaded by us; nothing is saved between steps.
    """

    def __init__(self, accelerator: Any, recipe: PPORecipe) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        super().__init__(accelerator)
        self.recipe = recipe
        self.stage = int(accelerator.state.deepspeed_plugin.zero_stage)
        _refuse_what_would_be_ignored(accelerator, accelerator.state.deepspeed_plugin)
        settings = {
            "ppo.critic_warmup_steps": recipe.ppo.critic_warmup_steps,
            "ppo.kl_minibatch_stop_nats": recipe.ppo.kl_minibatch_stop_nats,
            "rollout.engine: vllm": recipe.rollout.engine == "vllm",
        }
        for name, given in settings.items():
            if given:
                raise UserError(
                    f"{recipe.path}: {name} does not go with DeepSpeed, which takes the optimizer's step by itself; "
                    "leave it out, or launch with an FSDP2 configuration"
                )
        unset_hf_deepspeed_config()  # under ZeRO-3 transformers would load weights in parts, of shape (0,)
        self._engine: Any = None
        self._roles: Any = None
        self._last = True

    @property
    def sharded(self) -> bool:
        """Whether a process holds only its part of the weights between two passes."""
        return self.stage == 3

    @property
    def shards(self) -> int:
        """Into how many parts the weights are cut while the model computes."""
        return 1

    @property
    def steps_itself(self) -> bool:
        """Whether gradients are reduced, clipped and applied by `step`, and each micro-batch has one backward pass."""
        return True

    @property
    def can_save(self) -> bool:
        """Whether a run can be saved and continued."""
        return False

    def text(self) -> str:
        """A line for a person."""
        whole = "; weights are in parts only at rest, whole while the model computes" if self.sharded else ""
        count = "1 process" if self.world == 1 else f"{self.world} processes"
        return (
            f"DeepSpeed ZeRO-{self.stage} on {count}{whole}\n"
            "no checkpoints under DeepSpeed: a run that is interrupted begins again (FSDP2 saves and continues)"
        )

    def prepare(self, roles: Roles) -> None:
        """Nothing yet: DeepSpeed wants the optimizer too, see `adopt`."""

    def adopt(self, roles: Roles, optimizer: torch.optim.Optimizer) -> Any:
        """Hand model and optimizer to DeepSpeed."""
        self.accelerator.state.deepspeed_plugin.deepspeed_config.update(
            {
                "train_micro_batch_size_per_gpu": 1,  # it wants a number, and uses none: batches are ours
                "gradient_accumulation_steps": 1,  # or it would divide the loss; `backward` tells it which is the last
                "gradient_clipping": self.recipe.train.max_grad_norm,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
        )
        self._roles, (self._engine, _) = roles, self.accelerator.prepare(roles, optimizer)
        return self._engine.optimizer

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All parameters whole on every rank, no collective inside. A collective at the beginning."""
        if not self.sharded or self._engine is None:
            yield
            return
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        with deepspeed.zero.GatheredParameters(list(self._roles.parameters())):
            remove_hooks(self._engine)
            try:
                yield
            finally:
                add_hooks(self._engine)

    def computing(self) -> AbstractContextManager[None]:
        """Around forward and backward passes, as many on every rank. A collective."""
        return self.gathered()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Trained parameters can be read and written, by all ranks alike, but not be trained on. A collective."""
        if not self.sharded:
            yield
            return
        import deepspeed

        # without the rank that changes them, changes would be dropped
        with deepspeed.zero.GatheredParameters(list(self._roles.trained_parameters().values()), modifier_rank=0):
            yield

    def accumulate(self, last: bool) -> None:
        """Called before each micro-batch's forward: only the last one of a minibatch ends in a step."""
        self._last = last

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of the global loss; once a micro-batch."""
        self._engine.set_gradient_accumulation_boundary(self._last)
        # what the engine's own forward would do: it counts the micro-batches
        self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss * self.world)  # it takes the mean over the ranks

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Nothing: the backward passes have done it."""

    def step(self) -> float:
        """Clip and apply the gradients; their norm before clipping. A collective."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())


def _refuse_what_would_be_ignored(accelerator: Any, plugin: Any) -> None:
    """Raises UserError for settings of the accelerate configuration that PPO does not follow."""
    if hasattr(plugin, "fsdp_version") and plugin.fsdp_version != 2:
        raise UserError(
            f"the accelerate configuration has fsdp_version: {plugin.fsdp_version}, and PPO spreads weights by FSDP2; "
            "set fsdp_version: 2 under fsdp_config"
        )
    if getattr(plugin, "activation_checkpointing", False):
        raise UserError(
            "the accelerate configuration has fsdp_activation_checkpointing, which PPO does not do; leave it out, and "
            "lower train.tokens_per_micro_batch to save memory"
        )
    if accelerator.mixed_precision != "no":
        raise UserError(
            f"the accelerate configuration has mixed_precision: {accelerator.mixed_precision}; the recipe's dtype says "
            'what is computed in: set mixed_precision: "no"'
        )


def _square(grads: list[torch.Tensor], device: Any) -> torch.Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.nn.utils.get_total_norm(grads, foreach=True).double().square()
