"""A causal language model that is being fine-tuned: through an adapter, or whole; its hidden states, and its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from baton.adapter_roles import attach_new, save_adapter
from baton.adapters import check_targets, is_target, lora_config_from, new_lora_config
from baton.attention import choose_attention
from baton.errors import UserError
from baton.logprobs import token_logprobs
from baton.lora import Acting, families, join_families
from baton.output_head import head_makes_logits
from baton.recipe import Lora

ROLE = "tuned"
_TARGETS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Layers that PEFT gives an adapter to."""


class TokenSums(NamedTuple):
    """Of the tokens in the loss."""

    nats: torch.Tensor  # sum of -log p, with its gradient
    entropy_nats: torch.Tensor  # sum of the predicted distributions' entropies


class Tuned:
    """Plain LoRA is computed by layers of our own (baton/lora.py); DoRA, dropout and a quantised base by PEFT's.

    A frozen base is held in the number format of the arithmetic; what is trained is held in float32.
    """

    def __init__(
        self,
        base: Path,
        dtype: torch.dtype,
        trained: Literal["adapter", "full"],
        quantise: str | None,
        device: torch.device | None,
    ) -> None:
        """Use `make`."""
        from transformers import AutoModelForCausalLM

        self.base_folder, self.dtype, self.trained, self.quantise = base, dtype, trained, quantise
        held_in = torch.float32 if trained == "full" else dtype
        more = {"quantization_config": _four_bits(dtype), "device_map": {"": device}} if quantise else {}
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=held_in, **more)
        self._acting = Acting()
        self._config: dict[str, Any] | None = None  # of an adapter in our own layers
        self._plain_logits = not head_makes_logits(self.model)

    @classmethod
    def make(
        cls,
        base: Path,
        dtype: torch.dtype,
        *,
        trained: Literal["adapter", "full"],
        lora: Lora,
        seed: int,
        quantise: str | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """The model in the folder `base` and, unless it is trained whole, a new adapter that adds nothing yet.

        A quantised base is made on `device`, any other on the CPU.
        """
        tuned = cls(base, dtype, trained, quantise, device)
        if trained == "full":
            tuned.model.requires_grad_(True)
            return tuned
        tuned.model.requires_grad_(False)
        if _is_plain(tuned.model, lora, quantise):
            tuned._config = attach_new(tuned.model, ROLE, lora, tuned._acting, seed)
            tuned._acting.role = ROLE
        else:
            tuned._attach_by_peft(lora, seed)
        return tuned

    def _attach_by_peft(self, lora: Lora, seed: int) -> None:
        from peft import get_peft_model

        head = self.model.get_output_embeddings()
        named = [] if isinstance(lora.targets, str) else lora.targets
        if any(module is head and _is_meant(name, named) for name, module in self.model.named_modules()):
            raise UserError(
                f"lora.targets: {', '.join(named)} holds the output head, which is applied by itself: it takes no "
                "adapter. Leave it out"
            )
        check_targets(named, [name for name, module in self.model.named_modules() if isinstance(module, _TARGETS)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, new_lora_config(lora))
        self.widen()

    def widen(self) -> None:
        """Hold what is trained in float32: a bfloat16 parameter would swallow small updates."""
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    @property
    def by_peft(self) -> bool:
        """Whether PEFT's layers compute the adapter."""
        return self.trained == "adapter" and self._config is None

    @property
    def plain(self) -> Any:
        """The transformers model itself, without PEFT's shell; its layers are those that are trained."""
        return self.model.get_base_model() if self.by_peft else self.model

    @property
    def device(self) -> torch.device:
        return self.plain.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; tied weights once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def join(self) -> None:
        """Join layers that read the same input; once the model has its device and number format."""
        join_families(self.plain)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Within, the adapter adds nothing; a model that is trained whole has no base left."""
        before, self._acting.role = self._acting.role, None
        try:
            with self.model.disable_adapter() if self.by_peft else nullcontext():
                yield
        finally:
            self._acting.role = before

    @contextmanager
    def replying(self) -> Iterator[Any]:
        """The model for many small forward passes without gradients; its own modes and settings come back after."""
        was_training, held = self.model.training, families(self.plain) if self.device.type == "cpu" else []
        for family in held:
            family.hold(ROLE)
        self.model.eval()
        try:
            with self._autocast():
                yield self.plain
        finally:
            self.model.train(was_training)
            for family in held:
                family.release(ROLE)

    def _autocast(self) -> torch.autocast:
        """Where weights of two number formats meet; our own layers and a frozen base have one."""
        is_half = self.dtype is torch.bfloat16 and self._config is None
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_half)

    def token_sums(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        places: tuple[torch.Tensor, torch.Tensor],
        tokens: torch.Tensor,
        noise: torch.Tensor | None = None,
    ) -> TokenSums:
        """Loss and entropy summed over `tokens` (N,), predicted at `places`, (rows (N,), columns (N,)) of `input_ids`.

        input_ids (B, L), padded on the right; position_ids (B, L) that restart within a row keep documents apart;
        noise (B, L, H) is added to the embeddings. Only the states at `places` meet the output head.
        """
        model = self.plain
        given: dict[str, Any] = {"input_ids": input_ids}
        if noise is not None:
            embeddings = model.get_input_embeddings()(input_ids)
            given = {"inputs_embeds": embeddings + noise.to(embeddings.dtype)}
        if position_ids is not None:
            given["position_ids"] = position_ids
        before = model.config._attn_implementation
        if position_ids is None and self.device.type == "cpu" and not getattr(model.config, "attention_dropout", 0):
            choose_attention(model, input_ids.shape[1])
        try:
            with self._autocast():
                return self._head(model, given, places, tokens)
        finally:
            model.config._attn_implementation = before

    def _head(
        self, model: Any, given: dict[str, Any], places: tuple[torch.Tensor, torch.Tensor], tokens: torch.Tensor
    ) -> TokenSums:
        if self._plain_logits:
            table = model(**given, use_cache=False).logits[places].float().log_softmax(-1)
            entropies = -(table.detach().exp() * table.detach()).sum()
            return TokenSums(-table.gather(1, tokens[:, None]).sum(), entropies)
        decoder = getattr(model, model.base_model_prefix)
        states = decoder(**given, use_cache=False).last_hidden_state[places]
        if self.dtype is torch.bfloat16:
            states = states.to(self.dtype)  # the last norm's are float32 where its weights are
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        weight, bias = head.weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        with torch.autocast(states.device.type, enabled=False):
            found = token_logprobs(states, weight, bias, tokens, 1.0)
        return TokenSums(-found.logprobs.sum(), found.entropies.sum())

    def round_as_saved(self) -> None:
        """Give a model that is trained whole the values that its file will hold: training held it in float32."""
        if self.trained == "full":
            dtype = _stored_dtype(self.base_folder)
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)

    def save(self, folder: Path) -> None:
        """Write a plain PEFT folder, or the whole model in the number format of its base's own files."""
        if self._config is not None:
            settings = lora_config_from(self._config, task_type="CAUSAL_LM", modules_to_save=None)
            save_adapter(self.model, ROLE, settings, {}, folder)
        elif self.by_peft:
            self.model.save_pretrained(folder)
        else:
            dtype = _stored_dtype(self.base_folder)
            state = _narrowed(self.model, dtype)
            before, self.model.config.dtype = self.model.config.dtype, dtype
            try:
                self.model.save_pretrained(folder, state_dict=state)
            finally:
                self.model.config.dtype = before


def check_quantise(quantise: str | None, device: torch.device) -> None:
    """Raises UserError where four-bit weights were asked for and cannot be computed with."""
    from importlib.util import find_spec

    if quantise is None:
        return
    if device.type != "cuda":
        raise UserError(
            f"quantise: {quantise} is computed by CUDA kernels, and this machine's device is {device.type}. Leave it "
            "out: the frozen base is held in the number format of the arithmetic"
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantise: {quantise} needs bitsandbytes: pip install 'baton[quantise]'")


def _four_bits(dtype: torch.dtype) -> Any:
    """NormalFloat with quantised constants (Dettmers et al. 2023, sections 3 and 4)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _is_plain(model: Any, lora: Lora, quantise: str | None) -> bool:
    """Whether our own layers compute this adapter: products of two factors beside linear layers."""
    if lora.dora or lora.dropout or quantise:
        return False
    if isinstance(lora.targets, str):
        return True
    head = model.get_output_embeddings()
    meant = [module for name, module in model.named_modules() if _is_meant(name, lora.targets)]
    return all(isinstance(module, (nn.Linear, Conv1D)) and module is not head for module in meant)


def _is_meant(name: str, targets: list[str]) -> bool:
    return any(is_target(name, target) for target in targets)


def _narrowed(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's state in `dtype`. Tied weights stay one tensor, which save_pretrained writes once."""
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {}
    for name, item in model.state_dict().items():
        place = (item.data_ptr(), item.shape)
        if place not in copies:
            copies[place] = item.to(dtype) if item.is_floating_point() else item
        state[name] = copies[place]
    return state


def _stored_dtype(base: Path) -> torch.dtype:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base).dtype or torch.float32
