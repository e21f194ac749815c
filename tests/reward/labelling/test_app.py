"""The page: what it shows and hides, what it takes, and from whom."""

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from reward.labelling.app import make_app
from reward.labelling.questions import Question, Reply
from reward.labelling.rendering import pieces
from reward.labelling.store import Store
from tests.baton.registry.ui.conftest import HOSTILE
from tests.reward.labelling.conftest import ORIGIN, Page, question, rows_of, say

Open = Callable[..., Page]


def shown(html: str) -> list[str]:
    """The replies' texts as a person reads them, in the page's order."""
    parts = re.findall(r'id="reply-\d".*?</section>', html, re.DOTALL)
    return [unescape("".join(re.findall(r'<div class="prose" dir="auto">(.*?)</div>', part, re.S))) for part in parts]


def test_a_whole_round(open_page: Open, out: Path) -> None:
    page = open_page([question(number) for number in range(5)])
    assert "5 pairs" in page.get("/")
    seen = []
    for done, choice in enumerate(("first", "second", "tie", "bad", "skip")):
        html = page.get("/judge?annotator=ann")
        assert f"{done} of 5" in html and "Undo" in html if done else "Undo" not in html
        seen.append(shown(html))
        page.judge("ann", choice)
    assert "been through all 5 pairs" in page.get("/judge?annotator=ann")
    rows = rows_of(out)
    assert [row["choice"] for row in rows] == ["first", "second", "tie", "bad", "skip"]
    for row, texts in zip(rows, seen, strict=True):
        number = row["pair"][1:]
        sides = [f"left {number}", f"right {number}"]
        assert texts == (sides if row["shown"] == "ab" else sides[::-1])
        assert row["annotator"] == "ann" and re.fullmatch(r"2\d{3}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", row["time"])
        assert row["prompt"] == [say(f"prompt {number}", "user")]
        for side in ("chosen", "rejected"):
            expected = "team/sft:1" if row[side] == [say(sides[0])] else "team/ppo:2"
            assert row["models"][side] == expected
    texts_of = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in rows]
    assert texts_of[0] == seen[0] and texts_of[1] == seen[1][::-1]
    for texts in texts_of[2:]:
        assert [text.split()[0] for text in texts] == ["left", "right"]
    flags = [{key for key in ("is_tie", "both_bad", "skipped") if row.get(key)} for row in rows]
    assert flags == [set(), set(), {"is_tie"}, {"is_tie", "both_bad"}, {"skipped"}]


def test_a_restart_goes_on_where_it_was(open_page: Open) -> None:
    questions = [question(number) for number in range(6)]
    page = open_page(questions)
    page.judge("ann", "first")
    page.judge("bo", "skip")
    before = [shown(page.get(f"/judge?annotator={name}")) for name in ("ann", "bo", "cy")]
    page = open_page(questions[::-1])
    assert [shown(page.get(f"/judge?annotator={name}")) for name in ("ann", "bo", "cy")] == before
    overview = page.get("/")
    assert re.search(r">ann</a>.*?</progress> 1<.*?number\">0</td><td class=\"number\">5<", overview, re.S)
    assert re.search(r">bo</a>.*?</progress> 0<.*?number\">1</td><td class=\"number\">5<", overview, re.S)


def test_undo_shows_the_pair_again(open_page: Open, out: Path) -> None:
    page = open_page([question(number) for number in range(4)])
    page.judge("ann", "tie")
    before = shown(page.get("/judge?annotator=ann"))
    page.judge("ann", "first")
    html = page.get("/judge?annotator=ann")
    assert "reply 1 is better" in html
    form = page.fields("/judge?annotator=ann")
    for _ in range(2):  # the second time as a browser that got no answer
        assert page.post("/undo", form).status_code == 303
    assert shown(page.get("/judge?annotator=ann")) == before and len(rows_of(out)) == 1
    page.post("/undo", page.fields("/judge?annotator=ann"))
    assert out.read_bytes() == b""


def test_sent_twice_counts_once(open_page: Open, out: Path) -> None:
    page = open_page([question(1), question(2)])
    form = page.judge("ann", "first")
    assert page.post("/judge", form).status_code == 303
    assert page.post("/judge", form | {"choice": "second"}).status_code == 303
    assert [row["choice"] for row in rows_of(out)] == ["first"]


def test_nothing_says_whose_reply_it_is(open_page: Open, out: Path) -> None:
    page = open_page([question(number, id=f"team/sft:1 or team/ppo:2, {number}") for number in range(3)])
    for path in ("/", "/judge?annotator=ann"):
        html = page.get(path)
        for secret in ("sft", "ppo", "sha256", str(out.name), "chosen", "rejected"):
            assert secret not in html, secret


def test_nothing_says_what_others_said(open_page: Open) -> None:
    questions = [question(1)]
    page = open_page(questions)
    before = re.sub(r'value="[\w-]{32}"', "", page.get("/judge?annotator=ann"))
    page.judge("bo", "first")
    assert re.sub(r'value="[\w-]{32}"', "", page.get("/judge?annotator=ann")) == before


def test_agreement_is_shown_from_ten_common_pairs_on(open_page: Open) -> None:
    page = open_page([question(number) for number in range(10)])
    for name in ("ann", "bo"):
        for _ in range(10):
            assert "κ" not in page.get("/judge?annotator=ann")
            page.judge(name, "tie")
    assert "Agreement with bo: 100% on 10 common pairs" in page.get("/judge?annotator=ann")
    assert "Agreement with ann: 100% on 10 common pairs" in page.get("/judge?annotator=bo")
    assert "Agreement with" not in page.get("/judge?annotator=cy")
    assert ">ann and bo</th>" in page.get("/")


def test_hostile_texts_stay_texts(open_page: Open) -> None:
    questions = [
        Question(text, [say(text, "system"), say(text, "user")], Reply([say(text)], text), Reply([say(text[::-1])]))
        for text in HOSTILE
    ]
    page = open_page(questions)
    for text in HOSTILE:
        html = page.get("/judge?annotator=ann")  # which asserts that there is no markup of theirs
        assert any(each in HOSTILE for each in shown(html)), text
        page.judge("ann", "first")
    from urllib.parse import quote

    for text in HOSTILE:
        page.get(f"/judge?annotator={quote(text[:60])}")
        page.get(f"/{quote(text)}", status=404)
    form = page.fields("/judge?annotator=ann") | {"annotator": HOSTILE[0], "choice": "first"}
    page.post("/judge", form | {"question": page.fields("/judge?annotator=bo")["question"]})
    page.get("/")


def test_every_character_of_a_reply_is_there(open_page: Open) -> None:
    code = "Look:\n\n```python\n\tif a < b:\n\n        pass  \n```\nand\n~~~\nopen <pre>\n"
    odd = ["", "   \n", code, "שלום\u202eabc\u202c\n  x", "\n\nlead", "x" * 300_000]
    for number, text in enumerate(odd):
        page = open_page([question(f"odd {number}", a=Reply([say(text)], is_cut_off=True), b=Reply([say("b")]))])
        html = page.get("/judge?annotator=ann")
        inside = re.search(r'id="reply-\d"(?:(?!id="reply).)*?cut off here', html, re.S)
        assert inside
        found = "".join(
            re.findall(r"(?:<code>|<div class=\"prose\" dir=\"auto\">)(.*?)(?:</code>|</div>)", inside[0], re.S)
        )
        assert unescape(found) == (text if text.strip() else "")
        if not text.strip():
            assert ("Only white space." if text else "Empty.") in inside[0]


def test_code_is_what_fences_enclose() -> None:
    text = "a\n```py\nx\n```\nb\n````\n```\n````\nc ``` d\n~~~\nopen\n```"
    found = pieces(text)
    assert "".join(piece.text for piece in found) == text
    assert [piece.text for piece in found if piece.is_code] == [
        "```py\nx\n```\n",
        "````\n```\n````\n",
        "~~~\nopen\n```",
    ]
    assert pieces("") == []


def test_turns_and_tools_are_shown(open_page: Open) -> None:
    call = {**say(""), "tool_calls": [{"function": {"name": "add", "arguments": "<1>"}}]}
    prompt = [say("be kind", "system"), say("1+1?", "user"), call, say("2", "tool")]
    page = open_page([question(1, prompt=prompt, a=Reply([call, say("3", "tool"), say("done")]))])
    html = page.get("/judge?annotator=ann")
    headings = re.findall(r"<h3>(\w+)</h3>", html)
    assert sorted(headings) == sorted(["System", "User", "Assistant", "Tool", "Assistant", "Tool", "Assistant"])
    assert html.count("&lt;1&gt;") == 2


@pytest.mark.parametrize("name", ["", "   ", "x" * 61, "a\u202eb", "a\x00b", "\u200b"])
def test_names_that_are_none(open_page: Open, out: Path, name: str) -> None:
    page = open_page([question(1)])
    answer = page.client.get("/judge", params={"annotator": name})
    assert answer.status_code == 400 and "Please give a name" in answer.text
    form = page.fields("/judge?annotator=ann") | {"choice": "first", "annotator": name}
    assert page.post("/judge", form).status_code == 400 and out.read_bytes() == b""


def test_one_person_has_one_name(open_page: Open, out: Path) -> None:
    page = open_page([question(1), question(2)])
    page.judge("Zo%C3%AB+B", "first")
    page.client.cookies.clear()
    assert "1 of 2" in page.get("/judge?annotator=zoe%CC%88++b%20")
    form = page.fields("/judge?annotator=zo%C3%AB+b") | {"choice": "tie", "annotator": "ZOË B"}
    page.post("/judge", form)
    assert [row["annotator"] for row in rows_of(out)] == ["Zoë B", "Zoë B"]


def test_a_given_annotator_is_not_asked(open_page: Open) -> None:
    page = open_page([question(1)], annotator="Ann O")
    assert page.client.get("/").headers["location"] == "/judge?annotator=Ann+O"
    assert "Your name" in page.get("/?stay")


def test_only_this_pages_own_forms_are_taken(open_page: Open, out: Path) -> None:
    page = open_page([question(1)])
    form = page.fields("/judge?annotator=ann") | {"choice": "first"}
    plain = {"content-type": "text/plain"}
    refused = [
        page.client.post("/judge", data=form),  # no origin
        page.post("/judge", form, origin="http://evil.example"),
        page.post("/judge", form, origin="null"),
        page.post("/judge", form, origin="http://127.0.0.1:9999"),  # another page of this machine
        page.post("/judge", form | {"token": "x" * 32}),
        page.post("/judge", {name: value for name, value in form.items() if name != "token"}),
        page.post("/judge", form, cookie="baton_label="),
    ]
    assert [answer.status_code for answer in refused] == [403] * len(refused)
    assert page.client.post("/judge", content="x", headers={"origin": ORIGIN} | plain).status_code == 415
    assert page.post("/judge", form | {"padding": "x" * 20_000}).status_code == 413
    assert page.post("/judge", form | {"choice": "third"}).status_code == 400
    assert page.post("/judge", form | {"question": "0" * 24}).status_code == 409
    doubled = "&".join(f"{name}={value}" for name, value in form.items()) + "&choice=second"
    headers = {"origin": ORIGIN, "content-type": "application/x-www-form-urlencoded"}
    assert page.client.post("/judge", content=doubled, headers=headers).status_code == 400
    assert page.client.post("/judge", content=b"\xff", headers=headers).status_code == 400
    assert page.client.post("/undo", data=form).status_code == 403
    assert out.read_bytes() == b""
    # and no refusal has taken away the token that open pages know
    assert page.post("/judge", form).status_code == 303 and len(rows_of(out)) == 1


def test_a_form_outlives_the_server(open_page: Open, out: Path) -> None:
    form = open_page([question(1)]).fields("/judge?annotator=ann") | {"choice": "first"}
    page = open_page([question(1)])
    answer = page.post("/judge", form, cookie=f"baton_label={form['token']}")
    assert answer.status_code == 303 and len(rows_of(out)) == 1


def test_headers_hosts_and_methods(open_page: Open) -> None:
    page = open_page([question(1)])
    for path in ("/", "/judge?annotator=ann", "/absent", "/static/keys.js", "/static/style.css", "/static/icon.svg"):
        headers = page.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    headers = page.client.get("/judge?annotator=ann").headers
    assert "script-src 'self'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=lax" in headers["set-cookie"]
    assert page.client.get("/", headers={"host": "evil.example"}).status_code == 421
    assert page.client.put("/judge").status_code == 405 and page.client.get("/undo").status_code == 405
    for path in ("/static/absent", "/static/..%2fapp.py", "/static/../app.py"):
        assert page.client.get(path).status_code == 404
    assert page.client.get("/favicon.ico").headers["location"] == "/static/icon.svg"


def test_a_disk_that_takes_nothing_is_a_message(open_page: Open, out: Path) -> None:
    page = open_page([question(1)])
    form = page.fields("/judge?annotator=ann") | {"choice": "first"}
    out.write_bytes(b"\n")
    answer = page.post("/judge", form)
    assert answer.status_code == 507 and "changed by another program" in answer.text


def test_a_defect_is_a_page_too(out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from starlette.testclient import TestClient

    def broken() -> list[object]:
        raise RuntimeError("/secret/path <script>")

    store = Store(out)
    monkeypatch.setattr(store, "judgements", broken)
    client = TestClient(make_app([question(1)], store), base_url=ORIGIN, raise_server_exceptions=False)
    answer = client.get("/")
    assert answer.status_code == 500 and "RuntimeError while making this page" in answer.text
    assert "secret" not in answer.text and "secret" in capfd.readouterr().err
    store.close()
