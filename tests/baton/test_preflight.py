"""What is printed before fine-tuning, and what must not be trained."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton.chat import install_template
from baton.dialogues import Encoded, encode_dialogues
from baton.errors import UserError
from baton.preflight import check, preflight
from tests.baton.hand_marked import family_tokenizer, with_own_tokens


@pytest.fixture
def tokenizer() -> Any:
    made = family_tokenizer("chatml")
    install_template(made, "chatml", Path())
    return made


def talk(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


def shown(tokenizer: Any, encoded: Encoded, terminal: bool = False) -> str:
    console = Console(
        file=StringIO(), width=100, force_terminal=terminal, color_system="standard" if terminal else None
    )
    preflight(tokenizer, encoded, "train", console)
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue()


ROWS = [talk("Who?", "The fox."), talk("Where?", "In Redcliff."), talk("And?", "Ada"), talk("Fourth?", "no")]


def test_three_samples_are_shown_with_what_is_trained_in_brackets(tokenizer: Any) -> None:
    text = shown(tokenizer, encode_dialogues(tokenizer, [*ROWS, talk("a", "<|im_end|>")], 1000))
    assert "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦The fox.<|im_end|>⟧\n" in text
    assert "⟦In Redcliff.<|im_end|>⟧" in text and "⟦Ada<|im_end|>⟧" in text and "Fourth?" not in text
    assert "4 of 5" in text and "dropped: they spell out a special token" in text


def test_a_terminal_shows_it_in_colour(tokenizer: Any) -> None:
    text = shown(tokenizer, encode_dialogues(tokenizer, ROWS, 1000), terminal=True)
    assert "\x1b[1;4;32mThe fox.<|im_end|>\x1b[0m" in text and "⟦" not in text


def test_escape_sequences_of_the_data_do_not_reach_the_terminal(tokenizer: Any) -> None:
    text = shown(tokenizer, encode_dialogues(tokenizer, [talk("Who?", "\x1b[2J[bold]red")], 1000))
    assert "\x1b" not in text and "⟦\\x1b[2J[bold]red<|im_end|>⟧" in text


def test_a_long_sample_is_shown_without_its_middle(tokenizer: Any) -> None:
    text = shown(tokenizer, encode_dialogues(tokenizer, [talk("Who?", "The fox. " * 200 + "the end")], 10_000))
    assert " tokens … " in text and "the end<|im_end|>⟧" in text.replace("\n", "") and text.count("fox") < 100


def test_statistics(tokenizer: Any) -> None:
    encoded = encode_dialogues(tokenizer, ROWS, 1000)
    lengths = [len(ids) for ids, _ in encoded.documents]
    text = " ".join(shown(tokenizer, encoded).split())
    trained = sum(sum(is_said) for _, is_said in encoded.documents)
    assert f"{sum(lengths):,}, {trained:,} of them trained ({trained / sum(lengths):.1%})" in text
    assert f"{sum(lengths) / 4:,.0f} on average; the longest had {max(lengths)}" in text


def test_no_stop_left_anywhere_is_refused(tokenizer: Any) -> None:
    encoded = encode_dialogues(tokenizer, [talk("a", "The fox. " * 60)], 32)
    with pytest.raises(
        UserError, match=r"no dialogue trains the token that ends a turn \(<\|im_end\|>\).*1 of 1 dialog"
    ):
        preflight(tokenizer, encoded, "train", None)


def test_stops_lost_to_the_cut_are_warned_of_from_one_in_twenty(tokenizer: Any) -> None:
    long = talk("a", "The fox. " * 60)
    (warning,) = check(tokenizer, encode_dialogues(tokenizer, [long, *[ROWS[0]] * 19], 64), "train")
    assert "in 5% of the dialogues no end of a turn is left" in warning and "on_long: drop" in warning
    assert check(tokenizer, encode_dialogues(tokenizer, [long, *[ROWS[0]] * 20], 64), "train") == []


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501


def checked(tokenizer: Any, template: str, folder: Path) -> list[str]:
    (folder / "mine.jinja").write_text(template)
    tokenizer.eos_token = "<|im_end|>"
    install_template(tokenizer, "mine.jinja", folder)
    return check(tokenizer, encode_dialogues(tokenizer, ROWS, 1000), "train")


def test_a_text_that_begins_twice_is_refused_and_one_that_never_does_is_warned_of(tmp_path: Path) -> None:
    base = with_own_tokens("<|im_start|>", "<|im_end|>", bos=True)
    (warning,) = checked(base, CHATML, tmp_path)
    assert "the base begins every text with <s>, and the chat template writes none" in warning
    assert checked(base, "{{ bos_token }}" + CHATML, tmp_path) == []
    with pytest.raises(UserError, match="4 of 4 dialogues begin with <s> twice"):
        checked(base, "{{ bos_token }}{{ bos_token }}" + CHATML, tmp_path)
    assert checked(with_own_tokens("<|im_start|>", "<|im_end|>"), CHATML, tmp_path) == []


def test_a_header_that_is_trained_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    early = "{% for m in messages %}{% generation %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501
    (warning,) = checked(tokenizer, early, tmp_path)
    assert "trains" in warning and "which the prompt already holds" in warning


def test_a_generation_prompt_that_replies_do_not_follow_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    other = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>model\n{% endif")
    (warning,) = checked(tokenizer, other, tmp_path)
    assert "opens the assistant's turn with another text" in warning
