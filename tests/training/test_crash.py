"""A run that is killed with -9, inside saving too, goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import python, start


@pytest.mark.slow
def test_three_kills_of_a_two_rank_run_leave_no_trace(tmp_path: Path) -> None:
    """scripts/crash_test.py: to the bit; it exits with 1 if anything differs."""
    done = start(python("scripts/crash_test.py", "--kills", 3, "--out", tmp_path))
    assert "3 of 3 equal to the bit" in done.stdout
