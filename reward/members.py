"""The members of a reward model on one base: an adapter and a score head each, or one model trained whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from baton.adapter_roles import attach, attach_new, save_adapter
from baton.adapters import SCORE_KEY, lora_config_from, read_adapter, split_head
from baton.attention import choose_attention, takes_tables
from baton.length_groups import groups, padded
from baton.lora import Acting, Addition, join_families
from baton.recipe import Lora
from reward.rows import Rows

Trained = Literal["adapter", "full", "head"]


class Members(nn.Module):
    """K reward models that share the frozen weights of a base; scores are (K, N).

    Dropout is off: a pair's two sides must be read by the same function. Heads compute in float32.
    """

    def __init__(self, base: Path, dtype: torch.dtype, pad_id: int) -> None:
        """An empty cast; use `from_sft` or `from_folders`. `dtype`: that of the arithmetic."""
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        self.base_folder, self.dtype, self.pad_id = base, dtype, pad_id
        self.base_dtype = dtype
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
        self.model.config.pad_token_id = pad_id
        self.heads = nn.ModuleList()
        self.trained: Trained = "adapter"
        self._acting = Acting()
        self._configs: list[dict[str, Any]] = []

    @classmethod
    def from_sft(
        cls,
        base: Path,
        adapter: Path | None,
        dtype: torch.dtype,
        pad_id: int,
        *,
        count: int,
        trained: Trained,
        seed: int,
        lora: Lora | None = None,
    ) -> Self:
        """`count` members that all start as SFT's `adapter` on `base` or, where `base` is SFT's model, as itself.

        `lora` describes the new adapters of the second case, which add nothing yet.

        The first one's head is zero, so that it starts from equal rewards. The heads of the others are drawn from
        N(0, 1 / (hidden + 1)) (Stiennon et al. 2020; Huang et al. 2024, "The N+ implementation details", detail 12): of
        what fine-tuning can vary, the head and the order of the data are what such ensembles vary (Coste et al. 2023,
        Eisenstein et al. 2023); the whole data for each, as bootstrapping costs more than it adds (Lakshminarayanan et
        al. 2017).
        """
        members = cls(base, torch.float32 if trained == "full" else dtype, pad_id)
        members.dtype, members.trained = dtype, trained
        if trained == "full":
            members.model = _merged(members.model, adapter) if adapter else members.model
        elif adapter is None:
            assert lora is not None, "a new adapter needs its settings"
            for number in range(1 if trained == "head" else count):
                role = f"member_{number}"
                members._configs.append(attach_new(members.model, role, lora, members._acting, seed + number))
        else:
            config, tensors = read_adapter(adapter)
            for _ in range(1 if trained == "head" else count):
                members._attach(config, tensors)
        hidden = members.hidden_size
        for number in range(count):
            generator = torch.Generator().manual_seed(seed + number)
            noise = torch.randn(1, hidden, generator=generator) / math.sqrt(hidden + 1)
            members._add_head(noise if number else torch.zeros(1, hidden))
        return members._settled()

    @classmethod
    def from_folders(cls, base: Path, folders: Sequence[Path], dtype: torch.dtype, pad_id: int) -> Self:
        """The members in PEFT `folders`, each with its head, for scoring."""
        members = cls(base, dtype, pad_id)
        for folder in folders:
            config, tensors = read_adapter(folder)
            adapter, head = split_head(tensors)
            assert head is not None, "a published reward model has its head"
            members._attach(config, adapter)
            members._add_head(head)
        return members._settled().requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return self.heads[0].weight.device  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.heads)

    def _attach(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        # copies: members that start from one file must not share its tensors
        own = {name: item.clone() for name, item in tensors.items()}
        attach(self.model, f"member_{len(self._configs)}", config, own, self._acting)
        self._configs.append(config)

    def _add_head(self, weight: torch.Tensor) -> None:
        head = nn.Linear(weight.shape[1], 1, bias=False)
        head.weight.data = weight.float().clone()
        self.heads.append(head)

    def _settled(self) -> Self:
        self.requires_grad_(False)
        for number in range(len(self)):
            for parameter in self.parameters_of(number).values():
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()  # a bfloat16 parameter would swallow small updates
        return self.eval()

    def join(self) -> None:
        """Join layers that read the same input; once the model has its device and number format."""
        join_families(self.model)

    def in_float32(self) -> Self:
        """A copy that computes in float32."""
        copy = deepcopy(self).float()
        copy.dtype = torch.float32
        copy.join()
        return copy

    def parameters_of(self, number: int) -> dict[str, nn.Parameter]:
        """What is trained of one member, by names that are the same for all."""
        found = {"score.weight": self.heads[number].weight}
        if self.trained == "full":
            found |= {name: p for name, p in self.model.named_parameters() if not name.startswith("score.")}
        elif self.trained == "adapter":
            for name, module in self.model.named_modules():
                if isinstance(module, Addition) and name.endswith(f".additions.{self._role(number)}"):
                    found |= {f"{name.rpartition('.additions.')[0]}.{key}": p for key, p in module.named_parameters()}
        return found  # type: ignore[return-value]

    def _role(self, number: int) -> str | None:
        # heads alone: all of them read the states of one adapter
        return f"member_{number if len(self._configs) > 1 else 0}" if self._configs else None

    def can_share_prompts(self, max_length: int) -> bool:
        """Whether the base reads a pair as one row exactly as it reads its two sides."""
        return takes_tables(self.model, max_length)

    def states(self, rows: Rows, number: int) -> torch.Tensor:
        """The last tokens' hidden states (2, N, H) under one member's adapter."""
        return self._hidden(rows.input_ids, number, rows.position_ids, rows.table)[rows.row, rows.last]

    def rewards(self, states: torch.Tensor, number: int) -> torch.Tensor:
        """One member's scores (…,) of hidden states (…, H)."""
        weight = self.heads[number].weight
        states = states.to(torch.promote_types(states.dtype, torch.float32)).to(weight.dtype)  # type: ignore[arg-type]
        return self.heads[number](states).squeeze(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]], max_tokens: int = 8192) -> torch.Tensor:
        """Scores (K, N) in float32, on the CPU, of token ids; a pass holds at most `max_tokens`, padding included."""
        found = torch.empty(len(self), len(sequences))
        readers = len(self) if len(self._configs) > 1 else 1
        for group in groups([len(ids) for ids in sequences], 1, max_tokens):
            chosen = [sequences[at] for at in group]
            ids = padded(chosen, self.pad_id, self.device)
            last = torch.tensor([len(row) - 1 for row in chosen], device=self.device)
            rows = torch.arange(len(group), device=self.device)
            states = [self._hidden(ids, number)[rows, last] for number in range(readers)]
            for number in range(len(self)):
                scores = self.rewards(states[min(number, readers - 1)], number)
                found[number, torch.tensor(group)] = scores.float().cpu()
        return found

    def _hidden(
        self,
        input_ids: torch.Tensor,
        number: int,
        position_ids: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden states (B, L, H); padding is on the right, where no token sees it."""
        model, before = self.model, self.model.config._attn_implementation
        if input_ids.device.type == "cpu":
            choose_attention(model, input_ids.shape[1])
        decoder, self._acting.role = getattr(model, model.base_model_prefix), self._role(number)
        is_half = self.trained == "full" and self.dtype is torch.bfloat16
        if table is not None:
            table = table.to(next(decoder.parameters()).dtype)
        try:
            # fully trained weights are held in float32; a frozen base is in the number format of the arithmetic
            with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=is_half):
                found = decoder(
                    input_ids=input_ids, attention_mask=table, position_ids=position_ids, use_cache=False
                ).last_hidden_state
        finally:
            model.config._attn_implementation, self._acting.role = before, None
        return found  # type: ignore[no-any-return]

    def round_as_saved(self) -> None:
        """Give a fully trained model the values that its file will hold: training held it in float32."""
        if self.trained != "full":
            return
        dtype = _dtype_of(self.base_folder)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)

    def save(self, number: int, folder: Path) -> None:
        """Write one member as a plain PEFT folder, or the fully trained model as a whole classifier."""
        if self.trained == "full":
            _save_whole(self.model, self.heads[0].weight, self.base_folder, folder)  # type: ignore[arg-type]
            return
        role = self._role(number)
        config = self._configs[number if len(self._configs) > 1 else 0]
        settings = lora_config_from(config, task_type="SEQ_CLS", modules_to_save=["score"])
        assert role is not None
        head: Any = self.heads[number]
        save_adapter(self.model, role, settings, {SCORE_KEY: head.weight}, folder)


def _merged(model: Any, adapter: Path) -> Any:
    """`model` with SFT's adapter merged into it: of its layers alone, as a classifier has another head."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(adapter))
    config.task_type = None
    return PeftModel.from_pretrained(model, adapter, config=config).merge_and_unload()


def _dtype_of(base: Path) -> torch.dtype:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base).dtype or torch.float32


def _save_whole(model: Any, head: torch.Tensor, base: Path, folder: Path) -> None:
    """Write the classifier in the number format of the base's own files: training held it in float32."""
    dtype = _dtype_of(base)
    state = {name: item.detach().to(dtype) for name, item in model.state_dict().items()}
    state["score.weight"] = head.detach().to(dtype)
    before, model.config.dtype = model.config.dtype, dtype
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = before
