"""Rules on replies worked by hand."""

import inspect
import sys
from decimal import Decimal
from typing import Any

import pytest

from reward import rules
from reward.callables import GIVEN
from reward.rules import (
    exact_answer,
    json_schema,
    language,
    length_window,
    numbers_in,
    refusal,
    regular_expression,
    repetition,
    script,
    stated_number,
)


def answers(responses: list[str], right: list[Any], **arguments: Any) -> list[float]:
    """`exact_answer` as a run calls it."""
    given = {"prompts": [[] for _ in responses], "token_ids": [[] for _ in responses]}
    return exact_answer(**given, responses=responses, columns={"answer": right}, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", ["72"]),
        ("1,234.50 and 12,345,678", ["1234.50", "12345678"]),
        ("it costs $72.", ["72"]),
        ("-5, $-5, -$5, = −7", ["-5", "-5", "-5", "-7"]),
        ("5-3 is not 5 - 3, nor (4)-2, nor x-1", ["5", "3", "5", "3", "4", "2", "1"]),
        ("x=-3", ["-3"]),
        ("1, 2,3", ["1", "2", "3"]),
        ("1,2345 is two numbers", ["1", "2345"]),
        ("0.5, .5, 3.", ["0.5", "0.5", "3"]),
        ("50% of 1,000,", ["50", "1000"]),
        ("2024-01-05", ["2024", "1", "5"]),
        ("none at all. a.b", []),
    ],
)
def test_numbers_in_a_text(text: str, expected: list[str]) -> None:
    assert numbers_in(text) == [Decimal(number) for number in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### $1,600.00 in 2 months", "1600"),
        ("first #### 3, no: #### 4", "4"),
        ("The answer is 8, since 2 * 4 = 8 and 3 > 2", "8"),
        ("the Answer  is: **-12**. 5", "-12"),
        ("the answer is 3. No, the answer is 6 of 7", "6"),
        ("#### 5, though the answer is 6", "5"),
        ("#### five, so 6, or 7", "6"),
        ("6 or 7\n####", "7"),
        ("the answer is unclear; maybe 9 or 10", "9"),
        ("3 + 4 makes 7.", "7"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_states(text: str, expected: str | None) -> None:
    assert stated_number(text) == (None if expected is None else Decimal(expected))


def test_exact_answers_worked_by_hand() -> None:
    responses = ["So 72 clips.", "#### 72.0", "It is 71", "no number", "1,600", "-3"]
    right = ["24 + 48\n#### 72", "72", "#### 72", "#### 72", "#### $1600", 3]
    assert answers(responses, right) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert answers(responses, right, format_reward=0.1) == [1.0, 1.0, 0.1, 0.0, 1.0, 0.1]


def test_floats_are_compared_as_they_are_written() -> None:
    assert answers(["0.3", "0.30000001"], [0.3, 0.3]) == [1.0, 0.0]


@pytest.mark.parametrize("right", [None, "#### unknown", ""])
def test_a_row_without_a_right_answer_is_an_error(right: Any) -> None:
    with pytest.raises(ValueError, match="column 'answer' gives no number"):
        answers(["1", "2"], ["1", right])


def test_a_missing_column_is_an_error() -> None:
    with pytest.raises(ValueError, match="no column 'solution'; it has answer"):
        answers(["1"], ["1"], column="solution")


def lengths(counts: list[int], **arguments: Any) -> list[float]:
    given: dict[str, Any] = {"prompts": [], "responses": [], "columns": {}}
    return length_window(**given, token_ids=[[5] * count for count in counts], **arguments)


def test_length_windows_worked_by_hand() -> None:
    assert lengths([0, 3, 4, 6, 7], at_least=4, at_most=6) == [0, 0, 1, 1, 0]
    assert lengths([1, 10, 11], at_most=10) == [1, 1, 0]
    # 4 outside of a fade of 8 is a half, 2 is three quarters, 8 and more are nothing
    assert lengths([0, 2, 4, 6, 8, 14, 99], at_least=4, at_most=6, fade=8) == [0.5, 0.75, 1, 1, 0.75, 0, 0]


@pytest.mark.parametrize("arguments", [{"at_most": 3, "at_least": 4}, {"at_most": -1}, {"at_most": 3, "fade": -1}])
def test_an_impossible_window_is_an_error(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= at_least <= at_most"):
        lengths([1], **arguments)


def test_regular_expressions() -> None:
    given: dict[str, Any] = {"prompts": [], "token_ids": [], "columns": {}}
    replies = ["<a>\nx</a>", "say <a>x</a>", "x"]
    assert regular_expression(**given, responses=replies, pattern="<a>.*</a>") == [1, 1, 0]
    assert regular_expression(**given, responses=replies, pattern="<a>.*</a>", whole=True) == [1, 0, 0]


def test_every_rule_has_the_interface_of_a_reward_function() -> None:
    functions = {name: item for name, item in vars(rules).items() if inspect.isfunction(item) and name[0] != "_"}
    public = {name: item for name, item in functions.items() if item.__module__ == rules.__name__}
    shipped = [function for name, function in public.items() if name not in ("stated_number", "numbers_in")]
    assert len(shipped) == 8
    for function in shipped:
        parameters = inspect.signature(function).parameters
        assert tuple(parameters)[:4] == GIVEN
        assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def judged(
    rule: Any, responses: list[str], columns: dict[str, list[Any]] | None = None, **arguments: Any
) -> list[float]:
    """A rule on texts, as a run calls it."""
    given: dict[str, Any] = {"prompts": [[] for _ in responses], "token_ids": [[] for _ in responses]}
    return list(rule(**given, responses=responses, columns=columns or {}, **arguments))


PERSON = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


def test_json_against_a_schema() -> None:
    replies = ['{"age": 3}', ' {"age": 3}\n', '{"age": -1}', "[]", '{"age": 3} yes', "", '{"age": NaN}', "[" * 100_000]
    assert judged(json_schema, replies, schema=PERSON) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert judged(json_schema, replies, schema=PERSON, format_reward=0.25) == [1, 1, 0.25, 0.25, 0, 0, 0, 0]


def test_json_in_a_fence() -> None:
    replies = ['```json\n{"age": 3}\n```', '```\n{"age": 3}\n```\n', 'Here: ```json\n{"age": 3}\n```', '{"age": 3}']
    assert judged(json_schema, replies, schema=PERSON, fenced=True) == [1, 1, 0, 1]
    assert judged(json_schema, replies, schema=PERSON) == [0, 0, 0, 1]


def test_each_row_has_its_own_schema() -> None:
    schemas = [{"type": "integer"}, '{"type": "string"}', {"$schema": "http://json-schema.org/draft-04/schema#"}]
    assert judged(json_schema, ["1", "1", "1"], {"form": schemas}, column="form") == [1, 0, 1]


DEEP = {"type": "array", "items": {"$ref": "#"}}


def test_a_document_nested_too_deeply_for_its_schema_is_not_valid() -> None:
    assert judged(json_schema, ["[[]]", "[" * 900 + "]" * 900], schema=DEEP) == [1, 0]


SCHEMA_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "either `schema`"),
    ({"schema": PERSON, "column": "form"}, "either `schema`"),
    ({"schema": {"type": "number of legs"}}, "no JSON schema"),
    ({"schema": {"$ref": "http://localhost:1/schema"}}, "refers to what is not in it"),
    ({"schema": {"$ref": "#"}}, "without end"),
    ({"column": "other"}, "no column 'other'"),
    ({"column": "form"}, "column 'form' is empty"),
    ({"column": "text"}, "no JSON:"),
]


@pytest.mark.parametrize(("arguments", "message"), SCHEMA_MISTAKES)
def test_mistakes_in_schemas(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(json_schema, ["1"], {"form": [None], "text": ["{"]}, **arguments)


def test_which_language_a_reply_is_in() -> None:
    replies = ["Der Bäcker wohnt am Fluss.", "The baker lives there.", "パン屋は旧市街に住んでいます。", "12 + 3", ""]
    assert judged(language, replies, wanted="de") == [1, 0, 0, 0, 0]
    assert judged(language, replies, wanted="ja", among=["ja", "en"]) == [0, 0, 1, 0, 0]
    columns = {"answer_in": ["de", "de", "ja", "en", "en"]}
    assert judged(language, replies, columns, column="answer_in") == [1, 0, 1, 0, 0]


def test_languages_that_do_not_come_into_question_are_not_found() -> None:
    # Danish or Norwegian; of Swedish and Japanese it is Swedish by far
    assert judged(language, ["Ja, det er det."], wanted="sv", among=["sv", "ja"]) == [1]
    assert judged(language, ["Ja, det er det."], wanted="sv") == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `wanted`"),
        ({"wanted": "english"}, "'english' is no language"),
        ({"wanted": "en", "among": ["de", "fr"]}, "not `among` de, fr"),
        ({"wanted": "en", "among": ["en", "xx"]}, "'xx' is no language"),
        ({"column": "tongue"}, "no column 'tongue'"),
    ],
)
def test_mistakes_in_languages(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(language, ["yes"], **arguments)


@pytest.mark.parametrize(
    ("rule", "library", "arguments"),
    [
        (language, "py3langid", {"wanted": "en"}),
        (json_schema, "jsonschema", {"schema": {"title": "never seen before"}}),
    ],
)
def test_a_missing_library_is_named(
    rule: Any, library: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"needs the {library} library: pip install \"baton\[rules\]\""):
        judged(rule, ["yes"], **arguments)


def test_shares_of_scripts() -> None:
    # 4 letters of 4; 2 of 4; hiragana and one character of Chinese origin; no letter
    replies = ["Abcé!", "ab бв 12", "はい町", "12 + 3"]
    assert judged(script, replies, wanted=["latin"]) == [1, 0.5, 0, 0]
    assert judged(script, replies, wanted=["Hiragana", "katakana", "cjk"]) == [0, 0, 1, 0]
    for wanted in ([], ["latin", "elvish"]):
        with pytest.raises(ValueError, match="expected scripts"):
            judged(script, replies, wanted=wanted)


def repeated(token_ids: list[list[int]], **arguments: Any) -> list[float]:
    given: dict[str, Any] = {"prompts": [], "responses": [], "columns": {}}
    return repetition(**given, token_ids=token_ids, **arguments)


def test_repetition_worked_by_hand() -> None:
    # pairs of 1 2 1 2 1: 12, 21, 12, 21, of which two of four were there before; of 1 1 1 1: 11 three times
    replies = [[1, 2, 3, 4], [1, 2, 1, 2, 1], [1, 1, 1, 1], [1], []]
    assert repeated(replies, size=2) == pytest.approx([1, 0.5, 1 / 3, 1, 1])
    assert repeated(replies, size=1) == pytest.approx([1, 0.4, 0.25, 1, 1])
    assert repeated(replies) == [1, 1, 1, 1, 1]
    # half is repeated, a quarter is free: a quarter of the three quarters that are left
    assert repeated(replies, size=2, free=0.25) == pytest.approx([1, 2 / 3, 4 / 9, 1, 1])


@pytest.mark.parametrize("arguments", [{"size": 0}, {"free": 1.0}, {"free": -0.1}])
def test_impossible_repetitions(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected size >= 1"):
        repeated([[1]], **arguments)


REFUSING = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I cannot assist with that request.",
    "I cannot provide instructions for this.",
    "I won't help you do that.",
    "Sorry, I can't do that.",
    "As an AI language model, I am unable to browse.",
    "I must respectfully decline.",
    "Unfortunately I'm not able to answer.",
    "It is not appropriate to joke about this.",
    "That goes against our guidelines.",
    "I do not feel comfortable writing this.",
]
ANSWERING = [
    "Sorry to hear that! Have you tried tea?",
    "I'm sorry for your loss.",
    "I can't wait to hear more.",
    "I can't help but smile at that.",
    "I couldn't recommend it more.",
    "As an AI, I find chess fascinating.",
    "It is illegal to park there, so use the garage.",
    "The door is unable to close.",
    "",
]


@pytest.mark.parametrize("text", REFUSING)
def test_refusals_are_found(text: str) -> None:
    assert judged(refusal, [text], wanted=True) == [1] and judged(refusal, [text]) == [0]


@pytest.mark.parametrize("text", ANSWERING)
def test_answers_are_no_refusals(text: str) -> None:
    assert judged(refusal, [text], wanted=True) == [0] and judged(refusal, [text]) == [1]


def test_settings_of_refusals() -> None:
    late = "Here is how it goes. " * 20 + "I can't help with more."
    assert judged(refusal, [late, "Das geht nicht."]) == [1, 1]
    assert judged(refusal, [late, "Das geht nicht."], within=1000, phrases=["das geht nicht"]) == [0, 0]
    columns = {"harmful": [True, True, False]}
    assert judged(refusal, ["I refuse to.", "Sure!", "Sure!"], columns, column="harmful") == [1, 0, 1]
    with pytest.raises(ValueError, match="true or false"):
        judged(refusal, ["Sure!"], {"harmful": ["yes"]}, column="harmful")
    with pytest.raises(ValueError, match="within >= 1"):
        judged(refusal, ["Sure!"], within=0)
