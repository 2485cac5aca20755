"""The table of the lab's benchmarks. What they measure needs the lab."""

from __future__ import annotations

import pytest

from tests.lab import bench
from tests.lab.errors import LabError


def test_the_ratio_is_that_of_pairs_and_not_of_medians() -> None:
    taken = {"pyhv": [{"total": 1.0}, {"total": 4.0}, {"total": 9.0}], "QEMU": [{"total": t} for t in (2.0, 5.0, 3.0)]}
    row = bench.ROWS["linux"]._replace(names=("total",))
    head, line = bench.table("linux", row, taken)
    assert head.startswith("linux: live migration, Linux") and head.endswith("3 times")
    assert "pyhv 4.00 s (1.00 s..9.00 s)  QEMU 3.00 s (2.00 s..5.00 s)" in line
    assert "ratio 0.80 (0.50..3.00), goal 1" in line


@pytest.mark.parametrize(
    ("kinds", "rows"),
    [(["amd-epyc"], []), (["amd-epyc", "intel-penryn"], []), (["amd-epyc", "amd-epyc"], ["boot", "walk"])],
)
def test_what_cannot_be_measured_is_refused_before_a_host_starts(kinds: list[str], rows: list[str]) -> None:
    with pytest.raises(LabError, match="bench: "):
        bench.run(kinds, rows, 1, lambda text: pytest.fail(text))
