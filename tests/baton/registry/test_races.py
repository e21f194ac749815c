"""Writers at once, quickly: tests/bench/races.py has the full form."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.registry import Registry
from baton.registry.care.fsck import check
from baton.registry.care.gc import collect
from tests.baton.registry.conftest import Folders
from tests.baton.registry.forks import Forks
from tests.bench import races


def test_publishers_and_promoters_at_once(
    forks: Forks, store_kind: str, make_filled: Callable[[str], Registry], made: Folders, tmp_path: Path
) -> None:
    location = make_filled(store_kind).location
    races.race(forks, location, "team/base:1", made.adapter, tmp_path, processes=4, publishes=3)
    races.check_versions(location, tmp_path, processes=4, publishes=3)
    moved = races.race_aliases(forks, location, tmp_path, processes=8, moves=3)
    races.check_history(location, moved)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_collectors_harm_no_publishers(
    forks: Forks, new_location: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    """Publishers bring back what was just deleted, while collectors with no patience delete it."""
    location = Registry(new_location(kind), create=True).location
    publishers = [forks.start("churn", registry=location, writer=str(writer), seconds="1.5") for writer in range(3)]
    reports = [tmp_path / f"{collector}.json" for collector in range(2)]
    collectors = [
        forks.start("collect_often", registry=location, seconds="2", report=str(report)) for report in reports
    ]
    assert [forks.wait(pid) for pid in publishers + collectors] == [0] * 5
    deleted, spared = (sum(found) for found in zip(*(json.loads(r.read_text()) for r in reports), strict=True))
    assert deleted > 0, spared  # or nothing was at stake
    collect(Registry(location), 0)
    report = check(Registry(location))
    assert (report.problems, report.num_orphans) == ([], 0)
    for name in Registry(location).models():
        assert len(Registry(location).versions(name)) == 1
