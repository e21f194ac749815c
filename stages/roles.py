"""The roles of PPO on one copy of the base weights: policy, reference, rewards and critic, by adapters and heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from baton import decoder_blocks
from baton.adapter_roles import attach, attach_new, save_adapter
from baton.adapters import SCORE_KEY, lora_config_from, read_adapter, split_head
from baton.attention import choose_attention
from baton.errors import UserError
from baton.logprobs import TokenLogprobs, token_logprobs
from baton.lora import Acting, Addition, SharedLinear, families, join_families
from baton.output_head import changes_logits
from baton.recipe import Lora
from stages.micro_batch import MicroBatch

POLICY, REFERENCE, VALUE = "policy", "reference", "value"


Critic = Literal["adapter", "shared", "separate"]


class Forward(NamedTuple):
    """What one training forward gives."""

    logprobs: torch.Tensor  # (B, T) of the response tokens under the policy, at the sampling temperature
    entropies: torch.Tensor  # (B, T) in nats
    values: torch.Tensor  # (B, S), V of each state


@dataclass(frozen=True)
class Cast:
    """Who plays which role, by folders: what PPO's inputs say, settled before any weight is loaded."""

    base: Path  # complete model: the base under SFT's adapter, or SFT's merged model
    sft: Path | None  # SFT's adapter; None where `base` is SFT's model itself
    rewards: dict[str, Sequence[Path]] = field(default_factory=dict)  # label -> its members' adapters on this base
    lora: Lora | None = None  # of a new policy adapter, where SFT has none
    policy: Literal["adapter", "full"] = "adapter"
    critic: Critic = "adapter"
    critic_start: Path | None = None  # the reward adapter that the critic starts from; SFT's where there is none
    critic_weight: float = 1.0  # of that reward in the sum that the critic predicts


class Roles(nn.Module):
    """One base, an adapter for each role, and heads.

    The policy starts as SFT's adapter and the critic as the reward's, head included; reference and rewards are frozen.
    `policy: full` trains a copy of its own, and the shared base stays for the others; `critic: shared` is a head on the
    policy's own forward pass, `critic: separate` a model of its own. Dropout is off in all of them: old and new
    log-probabilities must come from the same function.
    """

    def __init__(self, cast: Cast, dtype: torch.dtype, temperature: float, seed: int = 0) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.cast, self.compute_dtype, self.temperature = cast, dtype, temperature
        self.shared = AutoModelForCausalLM.from_pretrained(cast.base, dtype=dtype).requires_grad_(False)
        self._acting = Acting()
        self._configs: dict[str, dict[str, Any]] = {}
        self._seed = seed
        hidden = int(self.shared.config.get_text_config().hidden_size)

        if cast.sft is not None:
            self._attach(REFERENCE, cast.sft)
        if cast.policy == "full":
            self.policy_model: Any = self._own_copy(AutoModelForCausalLM, cast.sft)
        elif cast.sft is not None:
            self._attach(POLICY, cast.sft)
        else:
            assert cast.lora is not None, "a policy adapter on a merged model needs its settings"
            self._configs[POLICY] = attach_new(self.shared, POLICY, cast.lora, self._acting, seed)

        self.reward_heads = nn.ModuleDict()
        self._reward_roles: dict[str, list[str]] = {}
        for label, members in cast.rewards.items():
            self._reward_roles[label] = []
            for folder in members:
                role = f"reward_{len(self.reward_heads)}"
                head = self._attach(role, folder)
                assert head is not None, "a published reward model has its head"
                self.reward_heads[role] = _head(head, hidden)
                self._reward_roles[label].append(role)
        self._make_critic(hidden)

        for name, parameter in self.named_parameters():
            trained = name.startswith(("policy_", "value_")) or any(
                f".additions.{role}." in name for role in (POLICY, VALUE)
            )
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()  # a bfloat16 parameter would swallow small updates
        self.eval()

    def _attach(self, role: str, folder: Path) -> torch.Tensor | None:
        """Give `role` the adapter of a PEFT folder; returns its score head, if it has one."""
        config, tensors = read_adapter(folder)
        adapter, head = split_head(tensors)
        attach(self.shared, role, config, adapter, self._acting)
        self._configs[role] = config
        return head

    def _own_copy(self, kind: Any, adapter: Path | None, **options: int) -> Any:
        """A trainable copy of the base, in float32, with `adapter` merged into it."""
        from peft import PeftConfig, PeftModel

        model = kind.from_pretrained(self.cast.base, dtype=torch.float32, **options)
        if adapter is None:
            return model
        config = PeftConfig.from_pretrained(str(adapter))
        if config.task_type == "CAUSAL_LM":
            config.task_type = None  # SFT's adapter on a classifier: the layers alone
        return PeftModel.from_pretrained(model, adapter, config=config).merge_and_unload()

    def _make_critic(self, hidden: int) -> None:
        cast = self.cast
        start = split_head(read_adapter(cast.critic_start)[1])[1] if cast.critic_start else None
        if cast.critic == "separate":
            from transformers import AutoModelForSequenceClassification

            begin = cast.critic_start or cast.sft
            self.value_model: Any = self._own_copy(AutoModelForSequenceClassification, begin, num_labels=1)
            self.value_model.score.weight.data.mul_(cast.critic_weight if start is not None else 0.0)
            self.value_head = self.value_model.score
            return
        if cast.critic == "adapter":
            begin = cast.critic_start or cast.sft
            if begin is not None:
                self._attach(VALUE, begin)
            else:
                self._configs[VALUE] = attach_new(self.shared, VALUE, cast.lora or Lora(), self._acting, self._seed + 1)
        # a head that was trained on another role's states says nothing about these: zero is an honest start
        known = start is not None and cast.critic == "adapter"
        self.value_head = _head(start * cast.critic_weight if known and start is not None else None, hidden)

    @contextmanager
    def acting_as(self, role: str) -> Iterator[Any]:
        """The causal model that plays `role`; within, every call of it acts for that role."""
        full = role == POLICY and self.cast.policy == "full"
        before, self._acting.role = self._acting.role, role
        try:
            with self._autocast() if full else nullcontext():
                yield self.policy_model if full else self.shared
        finally:
            self._acting.role = before

    def _autocast(self) -> torch.autocast:
        """For weights that are held in float32 and computed with in bfloat16."""
        is_half = self.compute_dtype is torch.bfloat16
        return torch.autocast(self.value_head.weight.device.type, dtype=torch.bfloat16, enabled=is_half)

    @property
    def _on_cpu(self) -> bool:
        return self.value_head.weight.device.type == "cpu"

    def join(self) -> None:
        """Join layers that read the same input; once the model has its device and number format."""
        join_families(self.shared)

    @contextmanager
    def sampling(self, role: str) -> Iterator[Any]:
        """`acting_as` for many small forward passes.

        On a CPU the adapter is laid beside the base's weights, in a copy of them, so that each layer is one product.
        """
        full = role == POLICY and self.cast.policy == "full"
        held = families(self.shared) if self._on_cpu and not full else []
        for family in held:
            family.hold(role)
        try:
            with self.acting_as(role) as model:
                yield model
        finally:
            for family in held:
                family.release(role)

    @property
    def laid_out(self) -> int:
        """Bytes of the copy of the base's weights that `sampling` makes, additions aside."""
        if not self._on_cpu or self.cast.policy == "full":
            return 0
        weights: list[Any] = [layer.base.weight for layer in self.shared.modules() if isinstance(layer, SharedLinear)]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def forward(self, batch: MicroBatch, *, entropy_gradient: bool = False) -> Forward:
        """Policy and critic of one micro-batch; with `critic: shared` from one pass."""
        if self.cast.critic != "shared":
            return Forward(*self.policy(batch, entropy_gradient=entropy_gradient), self.values(batch))
        with self.acting_as(POLICY) as model:
            hidden = self._hidden(model, batch)
            found = self._at_responses(model, hidden, batch, self.temperature, entropy_gradient=entropy_gradient)
        return Forward(*found, self._values_of(hidden, batch))

    def policy(
        self, batch: MicroBatch, *, entropy_gradient: bool = False, temperature: float | None = None
    ) -> TokenLogprobs:
        """The policy's log-probabilities and entropies (B, T), at the sampling temperature unless another is given."""
        with self.acting_as(POLICY) as model:
            hidden = self._hidden(model, batch)
            at = temperature or self.temperature
            return self._at_responses(model, hidden, batch, at, entropy_gradient=entropy_gradient)

    def logprobs(self, role: str, batch: MicroBatch) -> TokenLogprobs:
        """Log-probabilities and entropies (B, T) of the response tokens, zero where there is none."""
        with self.acting_as(role) as model:
            return self._at_responses(model, self._hidden(model, batch), batch, self.temperature)

    def values(self, batch: MicroBatch) -> torch.Tensor:
        """V (B, S) of each state in the units of the scores, zero where there is none."""
        if self.cast.critic == "separate":
            with self._autocast():
                return self._values_of(self._hidden(self.value_model, batch), batch)
        with self.acting_as(POLICY if self.cast.critic == "shared" else VALUE) as model:
            return self._values_of(self._hidden(model, batch), batch)

    @torch.no_grad()
    def scores(self, label: str, batch: MicroBatch) -> torch.Tensor:
        """A reward's scores (K, B), by member, at each row's last token: the end of turn where the reply has one."""
        found = []
        for role in self._reward_roles[label]:
            with self.acting_as(role) as model:
                hidden = self._hidden(model, batch)
            rows = torch.arange(len(batch.last), device=hidden.device)
            found.append(self.reward_heads[role](_wide(hidden[rows, batch.last])).squeeze(-1))
        return torch.stack(found)

    @property
    def arithmetic(self) -> torch.dtype:
        """The number format of the forward pass: tests run in float64."""
        held = self.value_head.weight.dtype
        return held if held is torch.float64 else self.compute_dtype

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's and the critic's, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def settle(self) -> None:
        """Do nothing: sharding wants to be called first from the outside."""

    def additions(self, role: str) -> list[Any]:
        """The role's low-rank additions, layer by layer."""
        layers = (module for module in self.shared.modules() if isinstance(module, SharedLinear))
        return [layer.additions[role] for layer in layers if role in layer.additions]

    def blocks(self) -> list[nn.Module]:
        """The decoder layers of all models: what sharding keeps whole, one at a time."""
        models = [self.shared, getattr(self, "policy_model", None), getattr(self, "value_model", None)]
        names = {name for model in models if model is not None for name in model._no_split_modules or ()}
        return [module for module in self.modules() if type(module).__name__ in names]

    def small(self) -> list[nn.Parameter]:
        """Adapters and heads: a per cent of the weights, the same on every process."""
        held = [module for module in self.modules() if isinstance(module, Addition)]
        return [p for module in (*held, self.reward_heads, self.value_head) for p in module.parameters()]

    def is_critics(self, name: str) -> bool:
        """Whether a trained parameter is the critic's alone."""
        return f".additions.{VALUE}." in name or name.startswith("value_")

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a plain PEFT adapter folder, or, fully trained, as a complete model."""
        if self.cast.policy == "full":
            _save_as(self.policy_model, self.cast.base, folder)
            return
        config = lora_config_from(self._configs[POLICY], task_type="CAUSAL_LM", modules_to_save=None)
        save_adapter(self.shared, POLICY, config, {}, folder)

    def save_value(self, folder: Path) -> None:
        """Write the critic as a sequence classifier with one label: a PEFT folder, or a complete model."""
        if self.cast.critic == "separate":
            _save_as(self.value_model, self.cast.base, folder)
            return
        role = POLICY if self.cast.critic == "shared" else VALUE
        config = lora_config_from(self._configs[role], task_type="SEQ_CLS", modules_to_save=["score"])
        save_adapter(self.shared, role, config, {SCORE_KEY: self.value_head.weight}, folder)

    def _hidden(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """The last hidden states (B, L, H)."""
        decoder = getattr(model, model.base_model_prefix)
        if model is self.shared and decoder_blocks.can_compute(decoder, batch.input_ids):
            lengths = (batch.last + 1).tolist()
            return decoder_blocks.hidden_states(decoder, batch.input_ids, self._acting.role, lengths)
        before = model.config._attn_implementation
        if self._on_cpu:
            choose_attention(model, batch.input_ids.shape[1])
        try:
            return decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        finally:
            model.config._attn_implementation = before  # decoding wants the fused kernel

    def _at_responses(
        self,
        model: Any,
        hidden: torch.Tensor,
        batch: MicroBatch,
        temperature: float,
        *,
        entropy_gradient: bool = False,
    ) -> TokenLogprobs:
        """Only the states before response tokens meet the head; logits at position t predict token t + 1."""
        rows, steps = batch.is_response.nonzero(as_tuple=True)
        states = hidden[rows, batch.before_response[rows, steps]]
        head = model.get_output_embeddings()
        weight, bias = head.weight.to(states.dtype), getattr(head, "bias", None)
        bias = None if bias is None else bias.to(states.dtype)
        tokens = batch.response_ids[rows, steps]
        found = token_logprobs(states, weight, bias, tokens, temperature, entropy_gradient=entropy_gradient)
        blank = found.logprobs.new_zeros(batch.is_response.shape)
        return TokenLogprobs(*(blank.index_put((rows, steps), item) for item in found))

    def _values_of(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        at = batch.state_at[..., None].expand(-1, -1, hidden.shape[-1])
        states = _wide(hidden.gather(1, at)).to(self.value_head.weight.dtype)
        with torch.autocast(states.device.type, enabled=False):
            return torch.where(batch.is_state, self.value_head(states).squeeze(-1), 0.0)


def check_head(roles: Roles, ids: list[int]) -> None:
    """The head that PPO applies by itself must give what the model's own forward pass gives.

    Some architectures scale or cap their logits after the head. Raises UserError.
    """
    with torch.no_grad(), roles.acting_as(POLICY) as model:
        given = torch.tensor([ids], device=roles.value_head.weight.device)
        plain = model(input_ids=given, use_cache=False).logits[0, -1].float()
        decoder = getattr(model, model.base_model_prefix)
        ours = model.get_output_embeddings()(decoder(input_ids=given, use_cache=False).last_hidden_state[0, -1]).float()
        changed = changes_logits(model.config)
    if changed or not torch.allclose(plain, ours, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head ({', '.join(changed) or 'seen'}), "
            "which PPO does not follow: its log-probabilities would be those of another model. Choose another base"
        )


def _head(weight: torch.Tensor | None, hidden: int) -> nn.Linear:
    """hidden -> 1 without bias, in float32; zero where there is nothing to start from."""
    head = nn.Linear(hidden, 1, bias=False)
    head.weight.data = torch.zeros(1, hidden) if weight is None else weight.float().clone()
    return head


def _save_as(model: Any, base: Path, folder: Path) -> None:
    """Write `model` in the number format of the base's own files: training held it in float32."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
    folder.mkdir(parents=True, exist_ok=True)
    # not state_dict(): it would shard again what was gathered for saving, and free what `held` holds
    passing = {
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {key: item.detach().to(dtype).clone() for key, item in held.items() if key not in passing}
    before, model.config.dtype = model.config.dtype, dtype
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = before


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: bfloat16 is too coarse for scores and values."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
