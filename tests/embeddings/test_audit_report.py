import math

import pytest

from embeddings.audit_report import ReviewedPair, audit_page, report_rows
from embeddings.intervals import wilson


def pairs(*groups):
    """Groups of (traffic, stratum size, is random, [(grade, verdict) ...], fields of all)."""
    return [
        ReviewedPair("b", ("s", traffic, "A|B", "doubtful"), size, is_random, grade, verdict, **fields)
        for traffic, size, is_random, told, fields in groups
        for grade, verdict in told
    ]


def rows_by(found):
    return {(row["part"], row["slice"], row["name"]): row for row in found}


HEAD = ("head", 90, True, [(2, 0)] * 2 + [(2, 2)] * 8 + [(2, None)] * 5, {"guideline": "v1"})
TAIL = ("tail", 10, True, [(0, 2)] * 3 + [(1, 0)] + [(1, 1)], {"guideline": "v2"})
FIRST = ("head", 90, False, [(2, 0)] * 6 + [(0, 1)] * 2 + [(2, 2)] * 2 + [(2, None)] * 10, {"guideline": "v1"})


def test_the_random_part_weighs_strata_by_size_and_the_priority_part_is_a_hit_rate():
    found = rows_by(report_rows(pairs(HEAD, TAIL, FIRST), num_conflicts=200, num_labels=4000))
    everything = found["random", "all", ""]
    assert (everything["num_queued"], everything["num_judged"], everything["num_changed"]) == (20, 15, 6)
    assert everything["share"] == pytest.approx(0.9 * 0.2 + 0.1 * 0.8)
    assert everything["stands_for"] == 100
    # of the changed 90 x .2 went down in the head, 10 x .6 up and 10 x .2 down in the tail
    assert everything["up_share"] == pytest.approx(6 / (18 + 6 + 2))
    head = found["random", "traffic", "head"]
    # ten of ninety, as 10 x 89 / 80 of an endless stratum
    assert (head["low"], head["high"]) == pytest.approx(wilson(0.2, 10 * 89 / 80))
    assert found["random", "stratum", "s / tail / A|B / doubtful"]["share"] == 0.8
    assert (
        head["low"]
        < everything["low"]
        < everything["share"]
        < everything["high"]
        < found["random", "traffic", "tail"]["high"]
    )
    assert found["random", "guideline", "v1"]["share"] == 0.2
    assert found["random", "guideline", "v2"]["num_up"] == 3

    hits = found["priority", "all", ""]
    assert (hits["share"], hits["num_queued"], hits["num_judged"], hits["stands_for"]) == (0.8, 20, 10, None)
    assert (hits["low"], hits["high"]) == pytest.approx(wilson(0.8, 10))
    assert hits["up_share"] == 0.25

    expected = found["random", "figure", "labels_changed"]
    assert expected["share"] == pytest.approx(0.26 * 200 / 4000)
    assert expected["low"] == pytest.approx(everything["low"] / 20)
    assert found["all", "figure", "labels_changed_so_far"]["share"] == 14 / 4000
    assert found["random", "figure", "judges_differ"]["share"] is None


def test_a_slice_by_two_guidelines_shares_the_stratum_out():
    told = [
        ("head", 60, True, [(2, 0)] * 2 + [(2, 2)] * 2, {"guideline": "v1"}),
        ("head", 60, True, [(2, 0)] + [(2, 2)] * 1, {"guideline": "v2"}),
        ("tail", 40, True, [(2, 2)] * 4, {"guideline": "v1"}),
    ]
    found = rows_by(report_rows(pairs(*told), 100, 100))
    # under v1 two thirds of the head's 60, half of them changed, and the tail's 40
    assert found["random", "guideline", "v1"]["stands_for"] == pytest.approx(80)
    assert found["random", "guideline", "v1"]["share"] == pytest.approx(0.25)
    assert found["random", "guideline", "v2"]["stands_for"] == pytest.approx(20)


def test_pairs_that_labellers_kept_count_in_the_share_in_which_the_others_are_judged():
    told = [
        ("head", 1000, True, [(2, None)] * 20, {"is_kept": True, "joint_grade": 2}),
        ("head", 1000, True, [(2, 0)] * 4 + [(2, 2)], {"joint_grade": 0}),
        ("head", 1000, True, [(2, None)] * 5, {"joint_grade": 0}),
    ]
    found = rows_by(report_rows(pairs(*told), 1000, 10_000))
    # half of the other ten are judged, four of five changed: 8 of 10, and of all 30 pairs 8
    everything = found["random", "all", ""]
    assert everything["share"] == pytest.approx(8 / 30)
    assert (everything["num_judged"], everything["num_queued"]) == (25, 30)
    assert everything["high"] == pytest.approx(wilson(8 / 30, 15 * 999 / 985)[1])

    assert found["random", "figure", "judges_differ"]["share"] == pytest.approx(10 / 30)
    against = found["all", "figure", "settled_against"]
    assert (against["share"], against["num_queued"], against["num_changed"]) == (0.8, 5, 4)
    by_labellers = [("head", 1000, True, [(2, 0)] * 4, {"joint_grade": 0, "is_by_person": False})]
    assert rows_by(report_rows(pairs(*by_labellers), 1, 1))["all", "figure", "settled_against"]["share"] is None


def test_without_verdicts_shares_are_unknown_and_the_page_says_so():
    waiting = pairs(("head", 90, True, [(2, None)] * 3, {}))
    found = report_rows(waiting, 0, 0)
    everything = rows_by(found)["random", "all", ""]
    assert (everything["num_judged"], everything["share"], everything["up_share"]) == (0, None, None)
    page = audit_page("now", found, 0, 0)
    assert "| all |  | 3 | 0 (0%) | 0 | unknown |  |  |" in page
    assert "None of it was drawn." in page
    assert not any(math.isnan(row["share"]) for row in found if row["share"] is not None)


def test_the_page_holds_our_figures_beside_the_paper_s():
    page = audit_page("now", report_rows(pairs(HEAD, TAIL, FIRST), 200, 4000), 200, 4000)
    lines = page.splitlines()
    assert "200 conflicts among 4,000 human grades. Intervals are 95 %." in lines
    assert next(line for line in lines if line.startswith("| traffic | tail")).startswith(
        "| traffic | tail | 5 | 5 (100%) | 4 | 80.0% ["
    )
    assert any(line.startswith("| category | A\\|B | 20 | 15 (75%) | 6 | 26.0% [") for line in lines)
    assert any("would change if all" in line and "| 1.30% [" in line and line.endswith("| 5.74% |") for line in lines)
    assert any("labellers' joint grade" in line and line.endswith("| unknown | 23.40% |") for line in lines)
    assert any("so far" in line and "| 0.35% |" in line for line in lines)
