"""Push to, and pull from, a server that speaks the Hub's endpoints."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.travel import hub
from baton.registry.trust import attestations
from tests.baton.registry.conftest import Folders
from tests.hub_server import READER, WRITER, HubServer

REPO = "org/model"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with HubServer() as found:
        # read from the environment when huggingface_hub is imported, which another test has done
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield found


def blobs(registry: Registry, ref: str) -> dict[str, str]:
    return {entry["path"]: entry["sha256"] for entry in registry.resolve(ref).manifest["files"]}


def test_a_base_goes_to_the_hub_and_comes_back_the_same(filled: Registry, server: HubServer) -> None:
    version = filled.resolve("team/base:1")
    url = hub.push(filled, version, REPO, message="first")
    repository = server.repositories[REPO]
    assert repository.private
    assert url == f"{server.url}/{REPO}/commit/{repository.refs['main']}"
    assert set(repository.head()) == {*blobs(filled, version.ref), "README.md", ".gitattributes"}
    assert len(repository.commits) == 2  # the server's own first one, and ours
    pulled = hub.pull(filled, REPO, "main", "other/pulled", "base")
    before, after = blobs(filled, version.ref), blobs(filled, pulled.ref)
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {"README.md"}
    assert pulled.manifest["licence"] == "apache-2.0"
    assert pulled.manifest["parents"] == {}
    assert pulled.manifest["probe"] == version.manifest["probe"]
    assert filled.verify(pulled, deep=True) == []
    (origin,) = attestations.of(filled, pulled.digest, "origin")
    assert origin.body == {"host": server.url, "repo": REPO, "commit": repository.refs["main"]}
    assert hub.pull(filled, REPO, repository.refs["main"], "other/pulled", "base").number == 1
    assert len(attestations.of(filled, pulled.digest)) == 1


def test_the_second_push_changes_and_sends_nothing(filled: Registry, server: HubServer) -> None:
    version = filled.resolve("team/base:1")
    first = hub.push(filled, version, REPO)
    server.requests.clear()
    assert hub.push(filled, version, REPO) == first
    assert not [request for request in server.requests if request.startswith(("POST", "PUT"))]


def test_the_next_version_sends_only_what_differs_and_removes_what_is_gone(filled: Registry, server: HubServer) -> None:
    hub.push(filled, filled.resolve("team/adapter:1"), REPO)
    repository = server.repositories[REPO]
    repository.commit({**repository.head(), "figure.png": b"somebody's"})
    server.requests.clear()
    # a whole model in the place of the adapter: adapter_config.json left behind would be loaded over it
    hub.push(filled, filled.resolve("team/base:1"), REPO)
    assert set(repository.head()) == {
        *blobs(filled, "team/base:1"),
        "README.md",
        ".gitattributes",
        "figure.png",
    }
    uploads = [request for request in server.requests if request.startswith("PUT")]
    assert len(uploads) == 1  # model.safetensors; the tokenizer was there


def test_an_adapter_names_the_base_that_was_pulled_from_the_hub(
    registry: Registry, made: Folders, server: HubServer, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in made.base.iterdir()}
    commit = server.add("org/base", files, private=False)
    base = hub.pull(registry, "org/base", "main", "team/base", "base")
    adapter = registry.publish(made.adapter, name="team/adapter", kind="adapter", base=base)
    hub.push(registry, adapter, REPO)
    head = server.repositories[REPO].head()
    settings = json.loads(head["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", commit)
    assert "base_model: org/base" in head["README.md"].decode()
    assert head["adapter_model.safetensors"] == (made.adapter / "adapter_model.safetensors").read_bytes()
    again = hub.pull(registry, REPO, "main", "team/again", "adapter", base=base)
    assert again.base == base.digest
    assert again.manifest["probe"]["expected"] == adapter.manifest["probe"]["expected"]
    with pytest.raises(UserError, match=r"is an adapter on 'org/base' at [0-9a-f]{40}\. Pull or publish that model"):
        hub.pull(registry, REPO, "main", "team/again", "adapter")
    server.add("org/copy", files, private=False)
    copy = hub.pull(registry, "org/copy", "main", "team/copy", "base")  # the same content: either is right
    assert hub.pull(registry, REPO, "main", "team/again", "adapter", base=copy) == again
    files = {path.name: path.read_bytes() for path in made.other_base.iterdir()}
    server.add("org/impostor", files, private=False)
    impostor = hub.pull(registry, "org/impostor", "main", "team/impostor", "base")
    with pytest.raises(UserError, match="is an adapter on org/base at .*was pulled from org/impostor"):
        hub.pull(registry, REPO, "main", "team/again", "adapter", base=impostor)


def test_a_base_without_an_origin_is_explained_or_named(filled: Registry, server: HubServer) -> None:
    adapter = filled.resolve("team/adapter:1")
    hub.push(filled, adapter, REPO)
    head = server.repositories[REPO].head()
    named = json.loads(head["adapter_config.json"])["base_model_name_or_path"]
    assert named == f"baton:{adapter.base}"
    assert adapter.base and adapter.base in head["README.md"].decode()
    hub.push(filled, filled.resolve("team/base:1"), "org/base")
    commit = server.repositories["org/base"].refs["main"]
    hub.push(filled, adapter, REPO, base_repo=f"hf://org/base@{commit}")
    head = server.repositories[REPO].head()
    assert json.loads(head["adapter_config.json"])["revision"] == commit
    hub.push(filled, filled.resolve("team/other:1"), "org/other")
    with pytest.raises(UserError, match=r"is not the base of team/adapter:1: its model.safetensors has sha256"):
        hub.push(filled, adapter, REPO, base_repo="org/other@main")
    with pytest.raises(UserError, match="names no revision"):
        hub.push(filled, adapter, REPO, base_repo="org/base")


def test_an_adapter_can_be_pushed_merged(filled: Registry, server: HubServer) -> None:
    adapter = filled.resolve("team/adapter:1")
    hub.push(filled, adapter, REPO, merge=True)
    head = server.repositories[REPO].head()
    assert "model.safetensors" in head and "adapter_config.json" not in head
    pulled = hub.pull(filled, REPO, "main", "team/merged", "merged")
    assert pulled.manifest["base"] is None
    expected, found = adapter.manifest["probe"]["expected"], pulled.manifest["probe"]["expected"]
    # the base is bfloat16: merged, rounded to 8 bits of mantissa
    assert found[0][-1] == pytest.approx(expected[0][-1], rel=0.05)
    with pytest.raises(UserError, match="nothing to merge"):
        hub.push(filled, filled.resolve("team/base:1"), REPO, merge=True)


def test_a_reward_model_comes_back_with_its_head(filled: Registry, server: HubServer) -> None:
    reward = filled.resolve("team/reward:1")
    hub.push(filled, reward, REPO)
    base = filled.resolve("team/base:1")
    pulled = hub.pull(filled, REPO, "main", "other/reward", "reward", base=base)
    assert pulled.manifest["probe"]["expected"] == reward.manifest["probe"]["expected"]
    with pytest.raises(UserError, match=r"is an adapter on sha256:.*; team/other:1 is sha256:"):
        hub.pull(filled, REPO, "main", "other/reward", "reward", base=filled.resolve("team/other:1"))


def test_somebody_else_commits_meanwhile(filled: Registry, server: HubServer) -> None:
    server.add(REPO, {"notes.txt": b"mine"})
    repository = server.repositories[REPO]
    server.before_commit = lambda: repository.commit({**repository.head(), "notes.txt": b"changed"}) and None
    with pytest.raises(UserError, match="somebody else committed. Nothing was pushed. Look at what they did"):
        hub.push(filled, filled.resolve("team/base:1"), REPO)
    assert repository.head()["notes.txt"] == b"changed"
    assert "model.safetensors" not in repository.head()


def test_a_byte_that_flips_on_the_way_up_is_found(filled: Registry, server: HubServer) -> None:
    server.on_upload = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(UserError, match=r"is not what was pushed: model.safetensors: sha256:[0-9a-f]{64}, the Hub"):
        hub.push(filled, filled.resolve("team/base:1"), REPO)


def test_a_byte_that_flips_on_the_way_down_is_found(filled: Registry, server: HubServer) -> None:
    hub.push(filled, filled.resolve("team/base:1"), REPO)
    for name in ("model.safetensors", "config.json"):  # one by its sha256, one by its git blob id

        def flip(path: str, data: bytes, name: str = name) -> bytes:
            return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:] if path == name else data

        server.on_download = flip
        with pytest.raises(UserError, match=f"{name} of .* arrived damaged: .*, the Hub lists"):
            hub.pull(filled, REPO, "main", "other/pulled", "base")
    assert "other/pulled" not in filled.models()


def test_a_file_that_the_commit_left_out_is_found(filled: Registry, server: HubServer) -> None:
    server.before_commit = lambda: None
    hub.push(filled, filled.resolve("team/base:1"), REPO)
    repository = server.repositories[REPO]
    original = repository.commit

    def forgetful(files: dict[str, bytes], branch: str = "main") -> str:
        return original({path: data for path, data in files.items() if path != "config.json"}, branch)

    original({".gitattributes": b""})
    repository.commit = forgetful  # type: ignore[method-assign]
    with pytest.raises(UserError, match="config.json: it is missing"):
        hub.push(filled, filled.resolve("team/base:1"), REPO)


def test_a_public_repository_must_be_asked_for(filled: Registry, server: HubServer) -> None:
    server.add(REPO, {}, private=False)
    version = filled.resolve("team/base:1")
    with pytest.raises(UserError, match="is public: everybody could read"):
        hub.push(filled, version, REPO)
    assert len(server.repositories[REPO].commits) == 1
    hub.push(filled, version, REPO, private=False)
    hub.push(filled, version, "org/new", private=False)
    assert not server.repositories["org/new"].private


@pytest.mark.parametrize("path", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_config.json"])
def test_a_strangers_weights_are_not_left_beside_ours(filled: Registry, server: HubServer, path: str) -> None:
    server.add(REPO, {path: b"{}"})
    with pytest.raises(UserError, match=f"holds model files that Baton did not write: {path}"):
        hub.push(filled, filled.resolve("team/base:1"), REPO)


def test_who_may_not_is_told_why(filled: Registry, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    version = filled.resolve("team/base:1")
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match=r"your token may not do this .*HTTP 403.*write access to org"):
        hub.push(filled, version, REPO)
    server.add(REPO, {})
    with pytest.raises(UserError, match=r"your token may not do this .*HTTP 403"):
        hub.push(filled, version, REPO)
    with pytest.raises(UserError, match="there is no model repository org/absent at .* or your token may not see it"):
        hub.pull(filled, "org/absent", "main", "team/x", "base")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(UserError, match="there is no model repository org/model"):
        hub.pull(filled, REPO, "main", "team/x", "base")
    with pytest.raises(UserError, match=r"your token may not do this|there is no model repository"):
        hub.push(filled, version, "org/new")


def test_other_answers_are_messages_too(filled: Registry, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    version = filled.resolve("team/base:1")
    server.add(REPO, {"config.json": b"{}"})
    with pytest.raises(UserError, match=r"has no revision 'v9'\. Name a branch, a tag or a commit"):
        hub.pull(filled, REPO, "v9", "team/x", "base")
    with pytest.raises(UserError, match="say which revision"):
        hub.pull(filled, REPO, " ", "team/x", "base")
    for name in ("model", "a/b/c", "../x", "org/--"):
        with pytest.raises(UserError, match="is not a repository's name; expected org/name"):
            hub.push(filled, version, name)
    server.failures["POST /commit/"] = (500, "Broken")
    with pytest.raises(UserError, match=r"answered HTTP 500: Broken\. Nothing was changed here"):
        hub.push(filled, version, REPO)
    server.failures = {"PUT /storage/": (403, "AccessDenied")}
    server.storage.clear()
    with pytest.raises(UserError, match="HTTP 403"):
        hub.push(filled, version, REPO)
    server.failures = {"GET /api/models": (403, "GatedRepo")}
    with pytest.raises(UserError, match="is gated: ask for access"):
        hub.pull(filled, REPO, "main", "team/x", "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 is set"):
        hub.pull(filled, REPO, "main", "team/x", "base")


def test_a_hub_that_is_not_there(filled: Registry, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        hub.pull(filled, REPO, "main", "team/x", "base")


def test_pickles_and_strange_names_stay_there(
    registry: Registry, made: Folders, server: HubServer, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in made.base.iterdir()}
    pickled = {**files, "pytorch_model.bin": b"\x80\x02}q\x00.", "training_args.bin": b"\x80\x02}q\x00."}
    del pickled["model.safetensors"]
    server.add("org/pickled", pickled)
    with pytest.raises(UserError, match="Pickles .* are not pulled: ask its owners for safetensors"):
        hub.pull(registry, "org/pickled", "main", "team/x", "base")
    extras = {"onnx/model.onnx": b"x", "original/model.safetensors": b"x", "training_args.bin": b"\x80\x02}q\x00."}
    server.add("org/both", {**files, **extras, "consolidated.safetensors": b"x"})
    version = hub.pull(registry, "org/both", "main", "team/x", "base")
    assert {entry["path"] for entry in version.manifest["files"]} == set(files)
    for path in ("../evil.json", "/etc/evil.json", "a\\b.json", "a/../../b.json"):
        server.add("org/evil", {**files, path: b"{}"})
        with pytest.raises(UserError, match="has a file with an unsafe name"):
            hub.pull(registry, "org/evil", "main", "team/x", "base")


def test_shards_are_fetched_by_their_index(registry: Registry, made: Folders, server: HubServer) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(made.base / "model.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    files = {path.name: path.read_bytes() for path in made.base.iterdir()}
    del files["model.safetensors"]
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    files |= {shard: save({n: tensors[n] for n in held}, {"format": "pt"}) for shard, held in shards.items()}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    server.add(REPO, {**files, "model.safetensors.index.json": index})
    version = hub.pull(registry, REPO, "main", "team/x", "base")
    assert {"a.safetensors", "b.safetensors"} <= {entry["path"] for entry in version.manifest["files"]}
    del files["b.safetensors"]
    server.add(REPO, {**files, "model.safetensors.index.json": index})
    with pytest.raises(UserError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json names"):
        hub.pull(registry, REPO, "main", "team/y", "base")
    server.add(REPO, {**files, "model.safetensors.index.json": b"[]"})
    with pytest.raises(UserError, match="is not an index"):
        hub.pull(registry, REPO, "main", "team/y", "base")


def test_the_licence_is_the_cards(registry: Registry, made: Folders, server: HubServer) -> None:
    files = {path.name: path.read_bytes() for path in made.base.iterdir()}
    cards = {
        "license: other\nlicense_name: our-own": "our-own",
        "license: [mit, apache-2.0]": "apache-2.0 AND mit",
        "license: 3": None,
        "license: [": None,
    }
    server.add(REPO, {**files, "README.md": b""})
    for number, (text, expected) in enumerate(cards.items()):
        server.add(REPO, {**files, "README.md": f"---\n{text}\n---\n".encode()})
        version = hub.pull(registry, REPO, "main", f"team/x{number}", "base")
        assert version.manifest["licence"] == expected, text


def test_what_a_policy_withholds_is_not_pushed(filled: Registry, server: HubServer, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from baton.registry.trust import policy

    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "team.pub").write_bytes(public.public_bytes(encoding, form))
    (tmp_path / "policy.yaml").write_text("resolve: {signatures: {at_least: 1, keys: [team.pub]}}")
    policy.set_policy(filled, tmp_path / "policy.yaml")
    with pytest.raises(UserError, match="sign"):
        hub.push(filled, filled.resolve("team/base:1"), REPO)
    assert REPO not in server.repositories


def test_the_commands_take_hf_addresses(filled: Registry, server: HubServer) -> None:
    """A process of its own finds the endpoint and the token where the Hub's client looks for them."""
    from typer.testing import CliRunner

    from baton.cli import app

    registry = ["--registry", filled.location]
    command = [sys.executable, "-m", "baton.cli", "push", "team/base:1", f"hf://{REPO}", *registry]
    settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    pushed = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert pushed.returncode == 0 and f"{server.url}/{REPO}/commit/" in pushed.stdout, pushed.stderr
    words = ["pull", f"hf://{REPO}@main", "--name", "team/pulled", "--kind", "base", *registry]
    pulled = CliRunner().invoke(app, words)
    assert pulled.exit_code == 0 and "team/pulled:1 sha256:" in pulled.output, pulled.output
