"""References and names: what is accepted, and what the refusals say."""

import pytest

from baton.errors import UserError
from baton.registry.reference import Reference, check_alias, check_name, is_reference, parse

HEX = "0123456789abcdef" * 4


def test_the_three_forms() -> None:
    assert parse("team/name:7") == Reference("team/name", number=7)
    assert parse("team/name:0000007") == Reference("team/name", number=7)
    assert parse("team/na.me-2_x:prod") == Reference("team/na.me-2_x", alias="prod")
    assert parse(f"team/name@sha256:{HEX}") == Reference("team/name", digest=f"sha256:{HEX}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "team",
        "team/name",
        "team/name:",
        "team/name:Prod",
        "team/name:a b",
        "team/name:../x",
        "team/name:12345678",
        "team/name:-x",
        "Team/name:1",
        "../name:1",
        "team/..:1",
        "/etc/passwd:1",
        "team/name/more:1",
        "team//name:1",
        ".team/name:1",
        "team/name:1\n",
        "team/näme:1",
        f"team/name@{HEX}",
        f"team/name@sha256:{HEX[:-1]}",
        f"team/name@sha256:{HEX.upper()}",
        f"team/name@sha256:{HEX}\n",
        "team/name@md5:1",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse(text)
    assert not is_reference(text)


def test_a_name_without_version_says_how_to_find_one() -> None:
    with pytest.raises(UserError, match="says no version.*baton list team/name"):
        parse("team/name")


@pytest.mark.parametrize("alias", ["7", "007", "", "A", "a/b", ".."])
def test_bad_aliases(alias: str) -> None:
    with pytest.raises(UserError, match="bad alias"):
        check_alias(alias)


def test_bad_name_says_the_form() -> None:
    with pytest.raises(UserError, match="bad name 'base'.*team/name"):
        check_name("base")
