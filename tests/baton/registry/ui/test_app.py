"""Every page: what it shows, that it escapes, and that damage is a message."""

import re
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest

from baton.registry import Registry, records
from baton.registry.care import tombstones
from baton.registry.manifest import manifest_path
from baton.registry.trust import attestations
from baton.registry.ui.app import make_app
from baton.registry.ui.comparison import Cell, direction, metric_lines
from baton.registry.ui.rendering import markdown
from tests.baton.registry.conftest import overwrite, remove
from tests.baton.registry.ui.conftest import HOSTILE, client_of

Get = Callable[..., str]


def test_the_first_page_lists_the_models(filled: Registry, get: Get) -> None:
    filled.promote("team/base:1", "prod", "because", by="ann")
    html = get(filled, "/")
    for name in ("base", "other", "adapter", "reward", "value"):
        assert f'href="/m/team/{name}"' in html
    assert "prod → 1" in html
    assert get(filled, "/?q=othe").count('href="/m/team/') == 2  # its name and its latest version
    assert "Nothing found" in get(filled, "/?q=absent")


def test_search_finds_references_and_digests(filled: Registry, get: Get) -> None:
    version = filled.resolve("team/reward:1")
    for query in ("team/reward:1", version.digest, version.digest[7:17], f"team/reward@{version.digest}"):
        assert 'href="/m/team/reward/1"' in get(filled, f"/?q={query}"), query
    assert "Nothing found" in get(filled, "/?q=00000000")
    assert "has no version 9" in get(filled, "/?q=team/reward:9")


def test_a_model_with_its_aliases_and_their_history(filled: Registry, get: Get) -> None:
    filled.promote("team/base:1", "prod", "the first one", by="ann")
    html = get(filled, "/m/team/base")
    assert "the first one" in html and "ann" in html and "first</span>" in html
    assert "1 move" in html
    assert 'name="ref" value="team/base:1"' in html


def test_gates_that_were_passed_and_that_are_asked(filled: Registry, tmp_path: Path, get: Get) -> None:
    from baton.registry.trust import policy, promotion

    (tmp_path / "policy.yaml").write_text("aliases: {prod: {metrics: [accuracy >= 0.5]}}")
    policy.set_policy(filled, tmp_path / "policy.yaml", by="ann")
    promotion.promote(filled, "team/reward:1", "prod", "good enough", by="bo")
    html = get(filled, "/m/team/reward")
    assert "Passed the gate" in html and "accuracy &gt;= 0.5" in html and "0.75" in html
    assert "metrics:\n- accuracy &gt;= 0.5" in html


def test_a_version_with_all_that_is_known(filled: Registry, get: Get) -> None:
    version = filled.resolve("team/reward:1")
    attestations.attest(filled, version.digest, "approval", {"note": "reads well"}, by="ann")
    attestations.attest(filled, version.digest, "evaluation", {"metrics": {"win_rate": 0.61}}, by="bo")
    html = get(filled, "/m/team/reward/1")
    for text in (version.digest, "apache-2.0", "reads well", "win_rate", "0.61", "bo, an evaluation of", "accuracy"):
        assert escape(text) in html, text
    assert 'href="/m/team/adapter/1"' in html and 'href="/m/team/base/1"' in html
    assert "adapter_model.safetensors" in html
    assert "PeftModel.from_pretrained" in html  # the card
    answer = client_of(filled).get("/m/team/reward/1/lineage.svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "team/base:1" in answer.text and "team/adapter:1" in answer.text


def test_versions_side_by_side(filled: Registry, get: Get) -> None:
    for name, value in (("adapter", 0.5), ("reward", 0.7)):
        digest = filled.resolve(f"team/{name}:1").digest
        attestations.attest(filled, digest, "evaluation", {"metrics": {"win_rate": value}}, by="bo")
    html = get(filled, "/compare?ref=team/adapter:1&ref=team/reward:1")
    assert html.count('class="best"') == 1
    assert re.search(r'<td class="">0\.5</td>\s*<td class="best">0\.7 ', html)
    assert "has no model" in get(filled, "/compare?ref=team/absent:1&ref=team/base:1")
    assert "Choose versions" in get(filled, "/compare")
    many = "&".join(f"ref=team/{name}:1" for name in ("base", "other", "adapter", "reward", "value"))
    assert "9 versions were asked for" in get(filled, f"/compare?{many}&ref=a/b:1,c/d:1 e/f:1 g/h:1")


def test_which_is_best() -> None:
    lines = metric_lines([{"eval/loss": 2.0, "steps": 1}, {"eval/loss": 1.0, "steps": 2}, {"accuracy": 0.5}])
    assert [(line.name, line.direction) for line in lines] == [
        ("eval/loss", "lower"),
        ("steps", None),
        ("accuracy", "higher"),
    ]
    assert lines[0].cells == [Cell("2"), Cell("1", True), Cell("")]
    assert not any(cell.is_best for line in lines[1:] for cell in line.cells)  # no direction; nothing to compare with
    assert direction("win_rate (by bo)") == "higher"
    assert direction("reward_accuracy") == "higher" and direction("kl_nats") == "lower"
    assert metric_lines([{"loss": "nan"}, {"loss": 1.0}])[0].cells == [Cell("nan"), Cell("1")]


@pytest.mark.parametrize("path", ["/", "/m/team/hostile", "/m/team/hostile/1", "/m/team/hostile/2"])
def test_hostile_text_stays_text(hostile: Registry, get: Get, path: str) -> None:
    html = get(hostile, path)  # which asserts that there is no markup of theirs
    if path.endswith("hostile"):
        for text in HOSTILE:
            assert str(escape(text)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in html
    if path.endswith("1"):
        assert html.count("&lt;script&gt;") > 20
        assert "cannot be shown" not in html


def test_hostile_text_in_comparisons_searches_and_pictures(hostile: Registry, get: Get) -> None:
    get(hostile, "/compare?ref=team/hostile:1&ref=<script>alert(1)</script>")
    for text in HOSTILE:
        get(hostile, "/?q=" + text.replace("&", "%26").replace("#", "%23").replace("%}", "%25}"))
    svg = client_of(hostile).get("/m/team/hostile/1/lineage.svg").text
    assert "<script" not in svg and " onload" not in svg.replace("&lt;svg onload", "")
    get(hostile, "/m/team/hostile/<script>", status=404)
    get(hostile, "/<script>alert(1)</script>", status=404)
    get(hostile, "/m/..%2f..%2fetc/passwd", status=404)
    get(hostile, "/m/UPPER/name", status=404)


def test_markdown_has_no_html_links_or_images() -> None:
    html = markdown("# a\n<b>x</b> [l](http://e.f) ![i](j) <http://e.f>\n\n[l]: http://e.f\n")
    assert "<b>" not in html and "<a" not in html and "<img" not in html


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8787", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8787", 200),
        ("evil.example", 421),
        ("evil.example:8787", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.168.0.7", 421),
        ("[::2]", 421),
        ("", 421),
    ],
)
def test_only_this_machines_names_are_answered(filled: Registry, host: str, status: int) -> None:
    assert client_of(filled).get("/", headers={"host": host}).status_code == status


def test_another_host_answers_to_addresses_and_its_own_name(filled: Registry) -> None:
    from starlette.testclient import TestClient

    client = TestClient(make_app(filled, frozenset({"box"}), any_address=True), base_url="http://box")
    for host, status in (("box:80", 200), ("192.168.0.7:80", 200), ("[fe80::1]:80", 200), ("evil.example", 421)):
        assert client.get("/", headers={"host": host}).status_code == status


def test_only_reading_and_always_the_headers(filled: Registry) -> None:
    client = client_of(filled)
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = client.request(method, "/m/team/base")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert client.head("/").status_code == 200
    for path in ("/", "/absent", "/static/style.css", "/static/icon.svg", "/m/team/base/1/lineage.svg"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "script-src" not in headers["content-security-policy"]
    for path in ("/static/absent.css", "/static/..%2fapp.py", "/static/../app.py"):
        assert client.get(path).status_code == 404
    assert client.get("/favicon.ico").headers["location"] == "/static/icon.svg"


def test_a_defect_is_a_page_too(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    def broken() -> list[str]:
        raise OSError("/secret/path <script>")

    monkeypatch.setattr(filled, "models", broken)
    client = TestClient(make_app(filled), base_url="http://localhost", raise_server_exceptions=False)
    answer = client.get("/")
    assert answer.status_code == 500 and "OSError while making this page" in answer.text
    assert "secret" not in answer.text and "nosniff" in answer.headers["x-content-type-options"]


def test_what_is_not_there(filled: Registry, get: Get) -> None:
    assert "has no model team/absent" in get(filled, "/m/team/absent", status=404)
    assert "has no version 9" in get(filled, "/m/team/base/9", status=404)
    assert client_of(filled).get("/m/team/base/9/lineage.svg").status_code == 404
    get(filled, "/m/team/base/x", status=404)


def test_deleted_versions_are_shown_as_such(filled: Registry, get: Get) -> None:
    tombstones.delete(filled, "team/other:1", why="trained on the wrong rows", by="ann")
    html = get(filled, "/m/team/other")
    assert "deleted by ann: trained on the wrong rows" in html
    assert 'value="team/other:1"' not in html
    html = get(filled, "/m/team/other/1")
    assert "trained on the wrong rows" in html and "model.safetensors" in html
    assert 'href="/m/team/other"' not in get(filled, "/")


def test_damage_is_a_message_beside_what_is_whole(filled: Registry, get: Get) -> None:
    version = filled.resolve("team/adapter:1")
    filled.promote("team/adapter:1", "prod", "a good reason", by="ann")
    approval = attestations.attest(filled, version.digest, "approval", {"note": "kept"}, by="ann")
    evaluation = attestations.attest(filled, version.digest, "evaluation", {"metrics": {"a": 1}}, by="ann")
    attestations.attest(filled, version.digest, "approval", {"note": "reads well"}, by="bo")
    overwrite(filled, attestations.path_of(approval), b"not JSON")
    overwrite(filled, attestations.path_of(evaluation), b"{}")
    damaged = records.record_path(records.alias_folder("team/adapter", "prod"), 1)
    overwrite(filled, damaged, b"{")
    filled = Registry(filled.location)  # nothing remembered
    html = get(filled, "/m/team/adapter/1")
    assert html.count("not an attestation") >= 2 and "reads well" in html and "adapter_model.safetensors" in html
    html = get(filled, "/m/team/adapter")
    assert "0000001.json is damaged" in html and "its last record is damaged" in html
    assert "0000001.json is damaged" in get(filled, "/")
    overwrite(filled, manifest_path(version.digest), b"{}")
    filled = Registry(filled.location)
    html = get(filled, "/m/team/adapter/1")
    assert "is damaged: expected sha256:" in html and "Published" in html
    get(filled, "/compare?ref=team/adapter:1&ref=team/base:1")
    assert "damaged" in client_of(filled).get("/m/team/adapter/1/lineage.svg").text
    overwrite(filled, records.record_path(records.versions_folder("team/adapter"), 1), b"[]")
    filled = Registry(filled.location)
    for path in ("/", "/m/team/adapter", "/m/team/adapter/1"):
        assert "damaged" in get(filled, path)


def test_a_missing_parent_is_a_message(filled: Registry, get: Get) -> None:
    version = filled.resolve("team/base:1")
    remove(filled, manifest_path(version.digest))
    html = get(Registry(filled.location), "/m/team/adapter/1")
    assert "is missing" in html and "adapter_model.safetensors" in html


def test_ten_thousand_versions_are_paged(filled_folder: Registry, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = records.versions_folder("team/many")
    digest = filled_folder.resolve("team/base:1").digest
    for number in range(1, 10_001):
        path = records.record_path(folder, number)
        record = {"number": number, "digest": digest, "kind": "base", "by": "ann", "time": "2026-01-01T00:00:00Z"}
        overwrite(filled_folder, path, records.sealed(path, record))
    registry = Registry(filled_folder.location)
    read: list[str] = []
    one, many = registry.store.get, registry.store.get_many
    monkeypatch.setattr(registry.store, "get", lambda path: (read.append(path), one(path))[1])
    monkeypatch.setattr(registry.store, "get_many", lambda paths: (read.extend(paths), many(paths))[1])
    first = get(registry, "/m/team/many")
    overview = get(registry, "/")
    assert 50 <= len(read) < 100  # what is shown, and no more
    assert 'value="team/many:10000"' in first and 'value="team/many:9951"' in first
    assert 'value="team/many:9950"' not in first and "1–50 of 10000" in first
    assert "10000" in overview
    last = get(registry, "/m/team/many?page=200")
    assert 'value="team/many:1"' in last and 'rel="next"' not in last
    for odd in ("0", "-1", "999999", "x", "99999999999"):
        get(registry, f"/m/team/many?page={odd}")
