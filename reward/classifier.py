"""Rewards by a sequence classifier with a tokenizer of its own: a foreign version, or a model from outside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.build import ModelSource, classifier_source
from baton.errors import UserError
from baton.ppo_sections import RewardSource
from baton.registry import Registry, Version
from reward.sample import Sample, failure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class ClassifierSource:
    """A classifier that reads prompt and reply as text, rendered by its own chat template.

    The reply counts as ended, whether it did or not: the template closes it. A special token that prompt or reply
    spell out in letters is broken up, so that a policy cannot open or end turns in what is judged.
    """

    def __init__(
        self,
        setting: RewardSource,
        name: str,
        loaded: tuple[Any, PreTrainedTokenizerBase],
        device: torch.device,
        max_tokens: int,
    ) -> None:
        """name: of the model, for messages; loaded: model and tokenizer; max_tokens: of a batch, padding included.

        Each adapter of a PEFT model with several is a member of an ensemble.

        Raises UserError where the text or the padding cannot be made right.
        """
        model, tokenizer = loaded
        if not tokenizer.chat_template:
            raise UserError(
                f"{name}: its tokenizer has no chat template, so how it wants prompt and reply to be written is "
                "unknown. Copy the model to a folder, and add the format that it was trained on as chat_template.jinja"
            )
        self.label, self.weight = setting.label, setting.weight
        self._name, self._tokenizer, self._max_tokens = name, tokenizer, max_tokens
        self._adapters = list(getattr(model, "peft_config", {}))
        self._pads_as_configured = model.config.get_text_config().pad_token_id is not None
        self._pad_id = settle_padding(name, model, tokenizer)
        self._model = model.to(device).eval().requires_grad_(False)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards in the samples' order; an ensemble's mean."""
        return self.member_scores([self.encode(sample) for sample in samples]).mean(0).tolist()

    def score_members(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Rewards in the samples' order by each member; one list where the model is no ensemble."""
        return self.member_scores([self.encode(sample) for sample in samples]).tolist()

    def member_scores(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores (K, N) of what `encode` gives, by each of K members, one after the other."""
        import torch

        from reward.scoring import score

        parameter = next(self._model.parameters())
        found = []
        # as in the reward model's training: an adapter's float32 weights on a bfloat16 base
        with torch.autocast(parameter.device.type, torch.bfloat16, enabled=parameter.dtype is torch.bfloat16):
            for adapter in self._adapters if len(self._adapters) > 1 else [None]:
                if adapter is not None:
                    self._model.set_adapter(adapter)
                found.append(score(self._model, sequences, self._pad_id, self._max_tokens))
        return torch.stack(found)

    def encode(self, sample: Sample) -> list[int]:
        """The ids up to the tokenizer's own stop token."""
        from baton.chat import until_stop

        messages = [*sample.prompt, {"role": "assistant", "content": sample.response}]
        special = self._tokenizer.all_special_tokens
        messages = [message | {"content": _broken_up(str(message["content"]), special)} for message in messages]
        # in one piece, as it was trained elsewhere
        encoded: Any = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
        ids = list(encoded["input_ids"])
        if self._tokenizer.eos_token_id is not None:
            ids = until_stop(self._tokenizer, ids)
        # where padding is the stop token too, the classifier itself reads its score before the last of them
        while self._pads_as_configured and ids and ids[-1] == self._pad_id:
            ids.pop()
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if not ids or limit is not None and len(ids) > limit:
            what = f"prompt and reply are {len(ids)} of its tokens; it reads 1 to {limit}"
            raise failure(self.label, f"{self._name}: {what}", [sample])
        return ids


def settle_padding(name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with, so that a row's score is the one that it has alone.

    A classifier on a decoder reads its score at the last token that is not its configuration's pad token: that one is
    used, whatever the tokenizer pads with. Where there is none, a row alone is read at its very end, and padding must
    be a token that no dialogue ends with. Raises UserError when there is no such token.
    """
    from baton.chat import choose_pad

    config = model.config.get_text_config()
    if config.pad_token_id is None:
        try:
            choose_pad(tokenizer)
        except UserError as error:
            raise UserError(f"{name} has no pad token to tell rows of a batch from padding: {error}") from None
        assert tokenizer.pad_token_id is not None
        config.pad_token_id = model.config.pad_token_id = int(tokenizer.pad_token_id)
    return int(config.pad_token_id)


def load_registered(registry: Registry, version: Version, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a reward version of the registry; an ensemble's members are adapters of the one model."""
    from baton.adapters import member_folders
    from baton.models import load_scorer

    model, tokenizer = load_scorer(registry, version, str(dtype).removeprefix("torch."))
    if version.base is not None:
        for at, folder in enumerate(member_folders(registry.materialise(version))[1:], start=1):
            model.load_adapter(folder, adapter_name=f"member_{at}")
    return model, tokenizer


def load_classifier(setting: str, folder: Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a recipe's `classifier:`, a local folder or hub id@revision.

    Raises UserError where it does not load whole, has not exactly one label, or is no classifier.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source: ModelSource = classifier_source(setting, folder)
    loader: Any = AutoModelForSequenceClassification  # with the report it returns a pair, which its types do not know
    revision = source.revision or "main"
    try:
        config = AutoConfig.from_pretrained(source.path, revision=revision)
        if config.num_labels != 1:
            raise UserError(
                f"classifier: {setting} has {config.num_labels} labels; a reward is one number: expected a model with "
                "num_labels = 1"
            )
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=revision)
        model, report = loader.from_pretrained(
            source.path, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"classifier: {setting} does not load as a classifier with its tokenizer: {reason}") from None
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:
        raise UserError(
            f"classifier: {setting} lacks {len(absent)} of a classifier's weights, such as {absent[0]}: they would be "
            "random. Give a model that was saved as a sequence classifier"
        )
    return model, tokenizer


def _broken_up(text: str, special: list[str]) -> str:
    for token in special:
        # a zero-width space: the reader sees the same letters, the tokenizer another text
        text = text.replace(token, f"{token[:1]}\u200b{token[1:]}" if len(token) > 1 else "\ufffd")
    return text
