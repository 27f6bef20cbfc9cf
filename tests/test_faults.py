"""Two thousand faults: every one ends in one line or is done; see fault_battery."""

import warnings

import pytest
from fault_battery import COMMANDS, damaged_files, wrong_flags


def check(battery, folder, seed, count):
    """Run a battery; returns the kinds that it met."""
    kinds, defects = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
        for kind, case, ended, what in battery(folder, seed, count):
            kinds.add(kind)
            if ended == "defect":
                defects.append((kind, case, repr(what)[:300]))
            if ended == "refused":
                assert "\n" not in what and what.isprintable() and 0 < len(what) < 4100, (kind, case, what)
    assert not defects, "\n".join(map(str, defects))
    return kinds


@pytest.mark.slow
def test_wrong_flags_of_every_command(tmp_path, caplog):
    assert check(wrong_flags, tmp_path, 1, 1000) == set(COMMANDS)


@pytest.mark.slow
def test_damaged_files_of_every_kind(tmp_path, caplog):
    assert len(check(damaged_files, tmp_path, 1, 1000)) == 15
