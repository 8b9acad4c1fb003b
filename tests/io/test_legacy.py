"""Names of 0.1 become those of today; what already has today's stays."""

from cosae.io.legacy import upgrade_evaluation


def test_an_evaluation_of_0_1_gets_one_spelling_of_sinks():
    old = {
        "probing": {"n_train": 1},
        "probing_sinks_in": {"n_train": 2},
        "paired_fve": [{"sinks": "in", "low": 1}, {"sinks": "out"}, None],
    }
    new = {
        "probing": {"sinks_out": {"n_train": 1}, "sinks_in": {"n_train": 2}},
        "paired_fve": [{"sinks": "sinks_in", "low": 1}, {"sinks": "sinks_out"}, None],
    }
    assert upgrade_evaluation(old) == new
    assert upgrade_evaluation(new) == new


def test_a_run_that_was_not_probed():
    assert upgrade_evaluation({"probing": None, "probing_sinks_in": None})["probing"] is None
    assert upgrade_evaluation([]) == []
