"""What is read of a body, what is refused at which status, and that nothing else ever comes out."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.sample import Sample
from reward.serving.body import read_samples
from reward.serving.limits import DEEPEST, Limits, RefusedError
from tests.reward.serving.conftest import body_of, row

LIMITS = Limits()


def refused(body: bytes | str, status: int, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_samples(body.encode() if isinstance(body, str) else body, LIMITS)
    assert caught.value.status == status and message in str(caught.value), str(caught.value)


def test_samples_as_they_were_sent() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo?", "name": "Ann"}]
    columns = {"answer": "1", "nested": {"list": [1, None, 2.5, True]}}
    samples = [{"prompt": prompt, "response": "", "columns": columns}, {"prompt": prompt, "response": "😀 \n"}]
    assert read_samples(json.dumps({"samples": samples}, ensure_ascii=False).encode(), LIMITS) == [
        Sample(prompt, [], [], "", columns),
        Sample(prompt, [], [], "😀 \n", {}),
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "Expecting value at character 0"),
        ('{"samples": [', "Expecting value at character 13"),
        (b'{"samples": "\xff"}', "byte 13 is no UTF-8"),
        ('{"samples": [], "samples": []}', "a key is given twice"),
        (body_of("x").decode().replace('"columns": {}', '"columns": {"a": 1, "a": 1}'), "a key is given twice"),
        (body_of("x").decode().replace('"columns": {}', '"columns": {"a": NaN}'), "NaN is no number"),
        (body_of("x").decode().replace('"columns": {}', '"columns": {"a": -Infinity}'), "-Infinity is no number"),
        (body_of("x").decode().replace('"columns": {}', '"columns": {"a": 1e999}'), "a number is too large"),
        ("9" * 5000, "a number or a nesting that is too long"),
        ("[" * 100_000, f"nested deeper than {DEEPEST}"),
        ('{"a":' * 100_000, f"nested deeper than {DEEPEST}"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"nested deeper than {DEEPEST}"),
        ("{" + ",".join(f'"{at}": 0' for at in range(1001)) + "}", "1001 keys in one object"),
        ('"' + '\\"' * 100_000, "Unterminated string"),
    ],
)
def test_what_is_no_json(body: bytes | str, message: str) -> None:
    refused(body, 400, message)


def test_brackets_in_texts_do_not_count() -> None:
    assert len(read_samples(body_of("[" * 100, '\\"' + "{" * 100, '"]'), LIMITS)) == 3
    deep: Any = 0
    for _ in range(DEEPEST - 4):
        deep = [deep]
    body = json.dumps({"samples": [row("x") | {"columns": {"a": deep}}]})
    assert read_samples(body.encode(), LIMITS)[0].columns == {"a": deep}
    refused(body.replace('"a": ', '"a": [').replace("0]", "0]]"), 400, "nested")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": 1}, "samples.0.response: input should be a valid string"),
        ({"response": None}, "samples.0.response: input should be a valid string"),
        ({"prompt": "text"}, "samples.0.prompt: input should be a valid list"),
        ({"prompt": []}, "samples.0.prompt: list should have at least 1 item"),
        ({"prompt": ["text"]}, "samples.0.prompt.0: expected an object"),
        ({"prompt": [{"role": "user"}]}, "samples.0.prompt.0.content is missing"),
        ({"prompt": [{"role": "root", "content": ""}]}, "samples.0.prompt.0.role: input should be 'system', 'user'"),
        (
            {"prompt": [{"role": "user", "content": "", "Name": ""}]},
            "samples.0.prompt.0 has a field that is none of role, content, name",
        ),
        ({"columns": []}, "samples.0.columns: input should be a valid dictionary"),
        ({"weight": 1}, "samples.0 has a field that is none of prompt, response, columns"),
        ({"response": "\ud800"}, "samples.0: half of a surrogate pair"),
        ({"prompt": [{"role": "user", "content": "\udfff"}]}, "samples.0: half of a surrogate pair"),
        ({"prompt": [{"role": "user", "content": "", "tool_calls": [{"\ud800": 1}]}]}, "half of a surrogate pair"),
    ],
)
def test_json_of_another_form(change: dict[str, Any], message: str) -> None:
    refused(json.dumps({"samples": [row("x") | change]}), 422, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[]", "the body: expected an object"),
        ("{}", "samples is missing"),
        ('{"samples": {}}', "samples: input should be a valid list"),
        ('{"samples": [], "model": "x"}', "the body has a field that is none of samples"),
    ],
)
def test_another_body(body: str, message: str) -> None:
    refused(body, 422, message)


def test_too_many_rows() -> None:
    with pytest.raises(RefusedError) as caught:
        read_samples(body_of("a", "b", "c"), Limits(num_rows=2))
    assert caught.value.status == 413
    assert len(read_samples(body_of("a", "b"), Limits(num_rows=2))) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": st.text() | JSON})
NEAR = st.fixed_dictionaries(
    {
        "samples": st.lists(
            st.fixed_dictionaries(
                {"prompt": st.lists(MESSAGE, max_size=2) | JSON, "response": st.text() | JSON},
                optional={"columns": st.dictionaries(st.text(), JSON, max_size=2), "other": JSON},
            ),
            max_size=3,
        )
    }
)
BYTES = st.binary(max_size=200) | st.text(alphabet='[]{}",:\\truenlfas0.5eE-\n', max_size=200).map(str.encode)


@settings(max_examples=100, deadline=None)
@given(st.one_of(BYTES, JSON.map(lambda value: json.dumps(value).encode()), NEAR.map(lambda v: json.dumps(v).encode())))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        samples = read_samples(body, LIMITS)
    except RefusedError as error:
        assert error.status in (400, 413, 422)
        str(error).encode("ascii")
    else:
        sent = json.loads(body)["samples"]
        assert [sample.response for sample in samples] == [one["response"] for one in sent]
        assert [sample.prompt for sample in samples] == [one["prompt"] for one in sent]
        assert [sample.columns for sample in samples] == [one.get("columns", {}) for one in sent]
