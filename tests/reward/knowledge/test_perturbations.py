"""Each perturbation on one reply, and what all have in common."""

import pytest

from reward.knowledge.perturbations import CLOSING, DISCLAIMER, FLATTERY, PERTURBATIONS

REPLY = "Yes. It is 3.5 km away.\n"
EXPECTED = {
    "double_spaces": "Yes.  It  is  3.5  km  away.\n",
    "blank_lines": "Yes.\n\nIt is 3.5 km away.",
    "repeated_end": "Yes. It is 3.5 km away. It is 3.5 km away.",
    "repeated": "Yes. It is 3.5 km away. Yes. It is 3.5 km away.",
    "flattery": f"Yes. It is 3.5 km away. {FLATTERY}",
    "closing": f"Yes. It is 3.5 km away. {CLOSING}",
    "as_an_ai": f"{DISCLAIMER} Yes. It is 3.5 km away.\n",
    "shouted": "Yes! It is 3.5 km away!\n",
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_perturbation(name: str) -> None:
    assert PERTURBATIONS[name](REPLY) == EXPECTED[name]
    assert PERTURBATIONS[name]("") is not None
