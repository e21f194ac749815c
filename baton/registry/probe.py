"""The probe: fixed input ids with the outputs that a version must give, in float32 on the CPU.

It catches what checksums cannot: a swapped base, a lost head, an adapter on another model.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from baton.errors import UserError
from baton.registry import probe_process
from baton.registry.checks import CheckFailed
from baton.registry.inspection import ADAPTER_WEIGHTS
from baton.registry.streaming import stream
from baton.registry.version import HEAD_KINDS
from baton.registry.weights import HEAD, dtype_of, find_model, read_header, read_model

if TYPE_CHECKING:
    import torch

SEQUENCES, LENGTH, LOGITS = 2, 16, 32
ATOL = RTOL = 1e-3
_WORTH_STREAMING = 64 << 20  # bytes of weights; less is loaded in full as fast
T = TypeVar("T")


class ProbeMismatch(CheckFailed):
    """A materialised version does not load whole, or does not give the outputs that its manifest records."""

    def __init__(self, message: str, check: str = "probe") -> None:
        """check: `swapped-base` or `lost-head` where it is plain which of them it was."""
        super().__init__(check, message)


def record(folder: Path, base_folder: Path | None, kind: str, vocabulary: dict[str, Any]) -> dict[str, Any]:
    """As `compute`, in a process that never held the model: nothing but the files can have made the outputs."""
    request = {
        "folder": str(folder.absolute()),
        "base_folder": str(base_folder.absolute()) if base_folder else None,
        "kind": kind,
        "vocabulary": vocabulary,
    }
    recorded: dict[str, Any] = probe_process.ask(request)["probe"]
    return recorded


def compute(folder: Path, base_folder: Path | None, kind: str, vocabulary: dict[str, Any]) -> dict[str, Any]:
    """Load what was written and note its outputs; `vocabulary` is the manifest's."""
    special = vocabulary["special_tokens"]

    def note(model: "torch.nn.Module") -> dict[str, Any]:
        return _note(model, folder, vocabulary)

    return _with_model(note, folder, base_folder, kind, special["pad"])


def _note(model: "torch.nn.Module", folder: Path, vocabulary: dict[str, Any]) -> dict[str, Any]:
    size, special = vocabulary["size"], vocabulary["special_tokens"]
    avoid = {special[role] for role in ("bos", "eos", "pad", "unk")} | set(special["stop"])
    probe: dict[str, Any] = {
        "output": "score" if is_scorer(model) else "logits",
        "input_ids": _input_ids(size, avoid),
        "vocabulary_size": size,
        "atol": ATOL,
        "rtol": RTOL,
    }
    if probe["output"] == "logits":
        probe["vocabulary_ids"] = sorted({i * size // LOGITS for i in range(LOGITS)})
    values = outputs(model, probe)
    if not all(math.isfinite(value) for row in values for value in row):
        raise UserError(f"{folder}: the model gives nan or infinity on fixed input; its training diverged.")
    probe["expected"] = [[float(f"{value:.7g}") for value in row] for row in values]
    return probe


def replay(folder: Path, base_folder: Path | None, manifest: dict[str, Any]) -> None:
    """Load a materialised version and compare; raises ProbeMismatch with the largest difference."""
    check = "swapped-base" if manifest["base"] else "probe"

    def look(model: "torch.nn.Module") -> None:
        compare(model, manifest["probe"], str(folder), check)

    _with_model(look, folder, base_folder, manifest["kind"], manifest["vocabulary"]["special_tokens"]["pad"])


def _with_model(
    do: Callable[["torch.nn.Module"], T], folder: Path, base_folder: Path | None, kind: str, pad: int | None
) -> T:
    """Call `do` with the model, streamed from its file where it is large and that works; else loaded in full."""
    if base_folder is None and _is_worth_streaming(folder):
        model = load(folder, None, kind, pad, streamed=True)
        try:
            return do(model)
        except UserError:
            raise
        except (RuntimeError, NotImplementedError, TypeError):
            del model  # a layer that reads another layer's weights
    return do(load(folder, base_folder, kind, pad))


def _is_worth_streaming(folder: Path) -> bool:
    tensors = find_model(folder)
    is_large = sum(place.num_bytes for place in tensors.values()) > _WORTH_STREAMING
    return is_large and dtype_of(tensors) in ("bfloat16", "float16")


def compare(model: "torch.nn.Module", probe: dict[str, Any], what: str, check: str = "probe") -> None:
    """Compare a float32 model's outputs with a probe's; `what` begins the message of a mismatch, `check` names it."""
    if (probe["output"] == "score") != is_scorer(model):
        raise ProbeMismatch(
            f"{what} should give a {probe['output']}, but {type(model).__name__} does not.",
            "lost-head" if probe["output"] == "score" else check,
        )
    difference = largest_difference(outputs(model, probe), probe)
    if difference is not None:
        raise ProbeMismatch(
            f"{what} loads but is not the model that was published: its {probe['output']} differ "
            f"from the probe by up to {difference:.4g} (allowed {probe['atol']} + {probe['rtol']} × value). "
            "Its base was swapped, its head lost, or it sits on another model. Get it again.",
            check,
        )


def largest_difference(found: list[list[float]], probe: dict[str, Any]) -> float | None:
    """The largest difference from the probe's outputs; None when all are within the tolerance."""
    pairs = [
        (value, wanted)
        for row, wanted_row in zip(found, probe["expected"], strict=True)
        for value, wanted in zip(row, wanted_row, strict=True)
    ]
    # `not <=` also catches nan.
    if any(not abs(value - wanted) <= probe["atol"] + probe["rtol"] * abs(wanted) for value, wanted in pairs):
        return max(math.inf if math.isnan(value) else abs(value - wanted) for value, wanted in pairs)
    return None


def outputs(model: "torch.nn.Module", probe: dict[str, Any]) -> list[list[float]]:
    """One row a sequence: the score at its last token; or logits at its last position and their logsumexp.

    The logsumexp runs over the tokenizer's ids alone, so that padding rows of the embedding do not count.
    """
    import torch

    rows = []
    with torch.no_grad():
        for ids in probe["input_ids"]:
            # One at a time and without padding: no mask or pad id can shift the position that is read.
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
            if probe["output"] == "score":
                rows.append([float(logits[0])])
            else:
                last = logits[-1, : probe["vocabulary_size"]]
                rows.append([*last[probe["vocabulary_ids"]].tolist(), float(last.logsumexp(0))])
    return rows


def is_scorer(model: "torch.nn.Module") -> bool:
    """Whether the model has a score head and gives one number a sequence."""
    from peft import PeftModel

    return hasattr(model.get_base_model() if isinstance(model, PeftModel) else model, "score")


def load(
    folder: Path, base_folder: Path | None, kind: str, pad_token_id: int | None, streamed: bool = False
) -> "torch.nn.Module":
    """Load a version with plain transformers and peft, float32 on the CPU, in eval mode.

    base_folder: of an adapter; None for what loads by itself. streamed: leave the weights in their file where
    possible, and widen each layer's when it runs. Raises ProbeMismatch when it does not load, or loads
    with weights missing.
    """
    from peft import PeftModel

    if kind in HEAD_KINDS:
        stored = read_model(folder) if base_folder is None else read_header(folder / ADAPTER_WEIGHTS)
        if not any(name.endswith(HEAD) for name in stored):
            raise ProbeMismatch(f"{folder} has lost its {HEAD}; the head would be random.", "lost-head")
    if base_folder is not None and not base_folder.is_dir():
        raise ProbeMismatch(f"{folder}: its base {base_folder} is not there. Get the version again.", "moved-base")
    with quiet_loading() as caught:
        try:
            if base_folder is not None:
                model = load_whole(base_folder, kind in HEAD_KINDS, pad_token_id)
                model = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
            else:
                assert kind != "adapter", "an adapter's probe needs its base"
                if streamed:
                    model = load_whole(folder, None, pad_token_id, in_stored_dtype=True)
                    if stream(model):
                        return model.eval()  # type: ignore[no-any-return]
                model = load_whole(folder, None, pad_token_id)
        except Exception as error:
            # Any class may come out of a strange folder; the machine's own troubles are no mismatch.
            if isinstance(error, (UserError, MemoryError)) or getattr(error, "errno", None):
                raise
            check = "swapped-base" if base_folder is not None else "probe"
            raise ProbeMismatch(f"{folder} does not load: {error}{_without_code(folder)}", check) from error
    for warning in caught:
        # PEFT only warns when an adapter does not fit its base, and goes on with random weights.
        if "missing adapter keys" in str(warning.message).lower():
            raise ProbeMismatch(f"{folder} does not fit its base: {warning.message}", "swapped-base")
    return model.float().eval()


def load_whole(
    folder: Path, with_head: bool | None, pad_token_id: int | None, in_stored_dtype: bool = False
) -> Any:
    """Load a whole model in float32; `with_head` adds a fresh score head, None takes the class from config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    # Never the folder's own code, and never a question about it: what it computes would be for it to say.
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    is_saved_scorer = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    dtype = getattr(torch, str(dtype_of(find_model(folder)))) if in_stored_dtype else torch.float32
    arguments: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    arguments |= {"output_loading_info": True, "trust_remote_code": False}
    loader: Any = AutoModelForCausalLM
    if with_head or (with_head is None and is_saved_scorer):
        # Set before loading: without it the model cannot pool, and generation would take eos for padding.
        config.pad_token_id = pad_token_id
        config.num_labels = 1
        arguments["config"] = config
        loader = AutoModelForSequenceClassification
    model, report = loader.from_pretrained(folder, **arguments)
    allowed = {HEAD} if with_head else set()
    missing = set(report["missing_keys"]) - allowed
    if missing:
        raise ProbeMismatch(f"{folder} lacks the weights {', '.join(sorted(missing)[:3])}; save the model again.")
    return model


def _without_code(folder: Path) -> str:
    brings_code = any(b"auto_map" in path.read_bytes() for path in folder.glob("*config.json"))
    return " (Baton loads it without running the Python files that it brings.)" if brings_code else ""


def _input_ids(size: int, avoid: set[int | None]) -> list[list[int]]:
    allowed = [i for i in range(size) if i not in avoid] or list(range(size))
    return [
        [
            allowed[int.from_bytes(hashlib.sha256(f"probe {row} {column}".encode()).digest()) % len(allowed)]
            for column in range(LENGTH)
        ]
        for row in range(SEQUENCES)
    ]


@contextmanager
def quiet_loading() -> Iterator[list[warnings.WarningMessage]]:
    """Load without progress bars and notes, and without drawing from torch's global generator."""
    import torch
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
