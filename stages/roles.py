"""Four roles on one copy of the base weights: policy, reference, reward and value, each an adapter; two with a head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from baton.adapters import SCORE_KEY, lora_config_from, read_adapter, set_adapter_tensors, split_head
from stages.rollout import MicroBatch

POLICY, REFERENCE, REWARD, VALUE = "policy", "reference", "reward", "value"


class Forward(NamedTuple):
    """What one training forward gives, (B, T) each."""

    logprobs: torch.Tensor  # of the response tokens under the policy, at the sampling temperature
    values: torch.Tensor  # V(s_t), from the state before each response token


class Roles(nn.Module):
    """One base, four LoRA adapters, a reward head and a value head.

    The policy starts as SFT's adapter and the value as the reward's, head included; reference and reward are frozen.
    Dropout is off in all of them: old and new log-probabilities must come from the same function.
    """

    def __init__(self, base: Path, sft: Path, reward: Path, dtype: torch.dtype, temperature: float) -> None:
        super().__init__()
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
        from transformers import AutoModelForCausalLM

        sft_config, sft_tensors = read_adapter(sft)
        reward_config, reward_tensors = read_adapter(reward)
        reward_adapter, head = split_head(reward_tensors)
        assert head is not None, "a published reward model has its head"
        configs = {
            role: lora_config_from(config, task_type="CAUSAL_LM", modules_to_save=None)
            for role, config in (
                (POLICY, sft_config),
                (REFERENCE, sft_config),
                (REWARD, reward_config),
                (VALUE, reward_config),
            )
        }
        causal = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        self.peft = PeftModel(causal, configs[POLICY], adapter_name=POLICY)
        for role in (REFERENCE, REWARD, VALUE):
            self.peft.add_adapter(role, configs[role])
        for role, tensors in (
            (POLICY, sft_tensors),
            (REFERENCE, sft_tensors),
            (REWARD, reward_adapter),
            (VALUE, reward_adapter),
        ):
            set_adapter_tensors(self.peft, tensors, role)
        self.reward_head = nn.Linear(head.shape[1], 1, bias=False)
        self.value_head = nn.Linear(head.shape[1], 1, bias=False)
        self.reward_head.weight.data = head.float()
        self.value_head.weight.data = head.float().clone()
        self.compute_dtype, self.temperature = dtype, temperature
        self._layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        for name, parameter in self.named_parameters():
            trained = f".{POLICY}." in name or f".{VALUE}." in name or name.startswith("value_head.")
            parameter.requires_grad_(trained)
            if trained:
                parameter.data = parameter.data.float()  # a bfloat16 parameter would swallow small updates
        self.eval()

    @property
    def causal(self) -> Any:
        """The base model, with the adapters inside."""
        return self.peft.get_base_model()

    @contextmanager
    def acting_as(self, role: str) -> Iterator[Any]:
        """The causal model with `role`'s adapter active, under autocast where the base computes in bfloat16.

        Only the choice of adapter changes. PEFT's own set_adapter would also flip requires_grad, between the forward
        and the backward of another role.
        """
        for layer in self._layers:
            layer._active_adapter = [role]
        device = self.reward_head.weight.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.compute_dtype is torch.bfloat16):
            yield self.causal

    def forward(self, batch: MicroBatch) -> Forward:
        """Policy and value of one micro-batch in one call, so that DDP sees every trained parameter used."""
        return Forward(self.logprobs(POLICY, batch), self.values(batch))

    def logprobs(self, role: str, batch: MicroBatch) -> torch.Tensor:
        """Log-probabilities (B, T) of the response tokens, at least float32, zero where there is no response token.

        Only the hidden states before response tokens meet the head; logits at position t predict token t + 1.
        """
        with self.acting_as(role) as model:
            hidden = self._hidden(model, batch)
            rows, steps = batch.is_response.nonzero(as_tuple=True)
            logits = model.get_output_embeddings()(hidden[rows, batch.before_response[rows, steps]])
        chosen = batch.response_ids[rows, steps]
        scaled = _wide(logits) / self.temperature
        found = scaled.gather(-1, chosen[:, None]).squeeze(-1) - scaled.logsumexp(-1)
        return found.new_zeros(batch.is_response.shape).index_put((rows, steps), found)

    def values(self, batch: MicroBatch) -> torch.Tensor:
        """V(s_t) (B, T) in the units of the rewards, zero where there is no response token."""
        with self.acting_as(VALUE) as model:
            hidden = self._hidden(model, batch)
        at = batch.before_response[..., None].expand(-1, -1, hidden.shape[-1])
        states = _wide(hidden.gather(1, at))
        return torch.where(batch.is_response, self.value_head(states).squeeze(-1), 0.0)

    @torch.no_grad()
    def scores(self, batch: MicroBatch) -> torch.Tensor:
        """The reward model's scores (B,) at each row's last token: the end-of-turn token where the reply has one."""
        with self.acting_as(REWARD) as model:
            hidden = self._hidden(model, batch)
        rows = torch.arange(len(batch.last), device=hidden.device)
        return self.reward_head(_wide(hidden[rows, batch.last])).squeeze(-1)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's and the value's, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save_policy(self, folder: Path) -> None:
        """Write the policy as a plain PEFT adapter folder."""
        self._save(POLICY, folder, "CAUSAL_LM", None)

    def save_value(self, folder: Path) -> None:
        """Write the value model as a plain PEFT folder of a sequence classifier with one label, head included."""
        self._save(VALUE, folder, "SEQ_CLS", self.value_head.weight)

    def _save(self, role: str, folder: Path, task_type: str, head: torch.Tensor | None) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        tensors = get_peft_model_state_dict(self.peft, adapter_name=role)
        if head is not None:
            tensors[SCORE_KEY] = head
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: t.detach().cpu().contiguous() for key, t in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        config = self.peft.peft_config[role].to_dict()
        kept = lora_config_from(config, task_type=task_type, modules_to_save=["score"] if head is not None else None)
        kept.inference_mode = True
        kept.save_pretrained(str(folder))

    def _hidden(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """The last hidden states (B, L, H)."""
        decoder = getattr(model, model.base_model_prefix)
        return decoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: bfloat16 log-probabilities are too coarse to compare."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
