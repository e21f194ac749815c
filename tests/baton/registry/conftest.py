"""Tiny models for the registry's tests, and registries of them in a folder and behind a real S3 server (moto's).

`registry` and `filled` make a test run twice, on either store. Where that proves nothing more, use `folder_registry`
and `filled_folder`. Stored files are reached and damaged on any store by the functions `paths`, `overwrite` and
`remove` (`from tests.baton.registry.conftest import overwrite`).
"""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import logging
import multiprocessing
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from baton.registry import Registry, Version
from baton.registry.stores.local import LocalStore

if TYPE_CHECKING:
    from tests.baton.registry.forks import Forks

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ROWS = 304  # a few more than the tokenizer has tokens, as padded embeddings have


class Folders(NamedTuple):
    """Folders by save_pretrained: two bases that differ in their weights alone, adapters of the first, a classifier."""

    base: Path
    other_base: Path
    adapter: Path
    reward: Path
    value: Path
    classifier: Path


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 259 to 300 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the baker of the town bakes bread for the town"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def llama_config(**settings: Any) -> Any:
    """Two small layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
        **settings,
    )


def save_base(folder: Path, seed: int) -> None:
    """A random Llama with its tokenizer, in bfloat16 so that merging has a dtype to come back to."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config()).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


def save_classifier(folder: Path, seed: int, num_labels: int = 1) -> None:
    """A random, whole Llama sequence classifier with its tokenizer."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    LlamaForSequenceClassification(llama_config(num_labels=num_labels)).save_pretrained(folder)
    save_tokenizer(folder)


def save_adapter(folder: Path, base: Path, task_type: str, seed: int) -> None:
    """A LoRA adapter whose weights are all random, so that it changes the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    loader = AutoModelForCausalLM if task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    extra = {} if task_type == "CAUSAL_LM" else {"num_labels": 1}
    torch.manual_seed(seed)
    model = get_peft_model(
        loader.from_pretrained(base, dtype=torch.float32, **extra),
        LoraConfig(task_type=task_type, r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folders, made once; tests that change one use `folders`."""
    root = tmp_path_factory.mktemp("made")
    folders = Folders(*(root / name for name in Folders._fields))
    save_base(folders.base, seed=0)
    save_base(folders.other_base, seed=1)
    save_adapter(folders.adapter, folders.base, "CAUSAL_LM", seed=2)
    save_adapter(folders.reward, folders.base, "SEQ_CLS", seed=3)
    save_adapter(folders.value, folders.base, "SEQ_CLS", seed=4)
    save_classifier(folders.classifier, seed=5)
    return folders


@pytest.fixture
def folders(made: Folders, tmp_path: Path) -> Folders:
    """A copy of the folders that a test may change."""
    return Folders(*(Path(shutil.copytree(folder, tmp_path / "folders" / folder.name)) for folder in made))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class ObjectServer:
    """A real HTTP server that speaks S3, and a way round it for setting tests up fast."""

    ACCOUNT = "123456789012"

    def __init__(self) -> None:
        """Start it on a free port."""
        from moto.server import ThreadedMotoServer

        _make_conditional_writes_atomic()
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"

    @property
    def backend(self) -> Any:
        """Moto's own view of what is stored."""
        from moto.s3.models import s3_backends

        return s3_backends[self.ACCOUNT]["aws"]

    def make_bucket(self) -> str:
        """A new, empty bucket."""
        name = f"test-{uuid.uuid4().hex}"
        self.backend.create_bucket(name, "us-east-1")
        return name

    def fill(self, bucket: str, prefix: str, folder: Path) -> None:
        """Put the files of a folder under a prefix, without going through HTTP."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.backend.put_object(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def drop(self, bucket: str) -> None:
        """Remove a bucket with all that is in it."""
        self.backend.buckets[bucket].keys.clear()
        self.backend.delete_bucket(bucket)

    def stop(self) -> None:
        """Stop the server."""
        self._server.stop()


def _make_conditional_writes_atomic() -> None:
    """Moto looks whether an object is there and writes it in two steps; S3, for which it stands, does so in one.

    A listing, too, fails in moto when an object is deleted meanwhile.
    """
    from moto.s3.responses import S3Response

    lock = threading.Lock()

    def in_one_step(method: Any) -> Any:
        def locked(*arguments: Any) -> Any:
            with lock:
                return method(*arguments)

        return locked

    for name in ("put_object", "_key_response_post", "delete_object", "_bucket_response_get"):
        setattr(S3Response, name, in_one_step(getattr(S3Response, name)))


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """The S3 server of this session; the environment leads to it from here on."""
    server = ObjectServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        yield server
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store_kind(request: pytest.FixtureRequest) -> str:
    """Where this test's registries lie: whatever asks for it runs once on each."""
    return str(request.param)


@pytest.fixture
def new_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """new_location("folder" or "s3"): where no registry is yet."""
    buckets: list[str] = []

    def make(kind: str) -> str:
        if kind == "folder":
            return str(tmp_path / f"registry-{uuid.uuid4().hex[:8]}")
        server: ObjectServer = request.getfixturevalue("object_server")
        buckets.append(server.make_bucket())
        return f"s3://{buckets[-1]}/registry"

    yield make
    for bucket in buckets:
        request.getfixturevalue("object_server").drop(bucket)


@pytest.fixture
def registry(store_kind: str, new_location: Callable[[str], str]) -> Registry:
    """An empty registry, in a folder and on S3."""
    return Registry(new_location(store_kind), create=True)


@pytest.fixture
def folder_registry(new_location: Callable[[str], str]) -> Registry:
    """An empty registry in a folder."""
    return Registry(new_location("folder"), create=True)


@pytest.fixture(scope="session")
def published(made: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one version of each kind but merged; `filled` copies it."""
    root = tmp_path_factory.mktemp("published")
    before = os.environ.get("BATON_CACHE")
    os.environ["BATON_CACHE"] = str(root / "cache")
    try:
        filled = Registry(root / "registry", create=True)
        base = filled.publish(made.base, name="team/base", kind="base", details={"licence": "apache-2.0"})
        filled.publish(made.other_base, name="team/other", kind="base")
        parents: dict[str, Version] = {"pretrain": base}
        for kind in ("adapter", "reward", "value"):
            version = filled.publish(
                getattr(made, kind),
                name=f"team/{kind}",
                kind=kind,
                base=base,
                parents=parents,
                details={"metrics": {"accuracy": 0.75}},
            )
            parents = {"init": version}
    finally:
        if before is None:
            del os.environ["BATON_CACHE"]
        else:
            os.environ["BATON_CACHE"] = before
    return root / "registry"


@pytest.fixture
def make_filled(
    published: Path, new_location: Callable[[str], str], request: pytest.FixtureRequest
) -> Callable[[str], Registry]:
    """make_filled("folder" or "s3"): another copy of the published registry."""

    def make(kind: str) -> Registry:
        location = new_location(kind)
        if kind == "folder":
            shutil.copytree(published, location)
        else:
            bucket, _, prefix = location.removeprefix("s3://").partition("/")
            request.getfixturevalue("object_server").fill(bucket, prefix, published)
        return Registry(location)

    return make


@pytest.fixture
def filled(store_kind: str, make_filled: Callable[[str], Registry]) -> Registry:
    """A copy of the published registry, on either store: a version each of team/base, other, adapter, reward, value."""
    return make_filled(store_kind)


@pytest.fixture
def filled_folder(make_filled: Callable[[str], Registry]) -> Registry:
    """The same, in a folder only."""
    return make_filled("folder")


def paths(registry: Registry) -> list[str]:
    """Every stored file, those of `tmp/` as well."""
    return [entry.path for entry in registry.store.walk("")]


def overwrite(registry: Registry, path: str, data: bytes) -> None:
    """Put bytes at a path behind the registry's back."""
    store = registry.store
    if isinstance(store, LocalStore):
        target = store.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode if target.exists() else 0o644
        target.unlink(missing_ok=True)  # a hard link's other name must keep its bytes
        target.write_bytes(data)
        target.chmod(mode)
        return
    import obstore
    from obstore.store import from_url

    obstore.put(from_url(store.location, client_options={"allow_http": True}), path, data)


def remove(registry: Registry, path: str) -> None:
    """Lose a file that is there."""
    assert registry.store.exists(path), path
    registry.store.delete(path)


def make_older(registry: Registry, path: str, seconds: float) -> None:
    """Let a stored file look as if it had been written so long ago."""
    store = registry.store
    then = time.time() - seconds
    if isinstance(store, LocalStore):
        os.utime(store.path(path), (then, then))
        return
    from moto.s3.models import s3_backends

    bucket, _, prefix = store.location.removeprefix("s3://").partition("/")
    key = s3_backends[ObjectServer.ACCOUNT]["aws"].get_object(bucket, f"{prefix}/{path}")
    key.last_modified = datetime.fromtimestamp(then, UTC).replace(tzinfo=None)


def flip(registry: Registry, path: str, at: int = 100) -> None:
    """Change one bit of a stored file."""
    data = bytearray(registry.store.get(path))
    data[at % len(data)] ^= 1
    overwrite(registry, path, bytes(data))


def in_processes(registry: Registry, target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """Run a module's function once for each tuple of arguments, all at once, and see that none fails."""
    all_at_once(store_kind_of(registry), target, arguments)


def store_kind_of(registry: Registry) -> str:
    """What `store_kind` was."""
    return "folder" if isinstance(registry.store, LocalStore) else "s3"


def all_at_once(store_kind: str, target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """The same by the kind of store."""
    processes = [process_on(store_kind, target, each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def process_on(store_kind: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """A process, not yet started: forking is fast, but obstore's threads do not survive it."""
    context: Any = multiprocessing.get_context("fork" if store_kind == "folder" else "spawn")
    return context.Process(target=target, args=arguments)


@pytest.fixture(scope="session")
def forks(object_server: ObjectServer) -> "Iterator[Forks]":
    """What runs commands in children that may be killed; they find the S3 server's address in its environment."""
    from tests.baton.registry.forks import Forks

    started = Forks()
    yield started
    started.close()
