"""A short run of the fuzzer; `python tests/fuzz.py` is the long one."""

from fuzz import fuzz


def test_mutated_parts_are_refused_or_merged_whole(tmp_path):
    counts = fuzz(300, seed=1, folder=tmp_path)
    outcomes = {outcome for _, outcome in counts}
    assert counts.total() == 300 and outcomes == {"refused", "merged", "loaded"}
