import csv
import io
from datetime import UTC, date, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embeddings.review_records import (
    argilla_answers,
    argilla_record,
    evidence_in_words,
    guarded_cell,
    is_argilla,
    parse_grade,
    parse_time,
    place_of,
    plain_cell,
    record_id,
    table_answer,
)

ROW = {
    "batch": "b/1",
    "rank": 3,
    "dataset": "s",
    "query_id": "q 1",
    "product_id": "p/1%",
    "query": "=red",
    "title": "shoe",
    "brand": None,
    "category": "A > B",
    "description": None,
    "human_grade": 2,
    "human_grade_name": "exact",
    "guideline": "v1",
    "kind": "ignored_but_exact",
    "evidence": "words",
    "impressions": 40,
    "clicks": 2,
    "purchases": 0,
    "corrected_rate": 0.25,
    "click_rate": 0.05,
    "click_rate_low": 0.01,
    "click_rate_high": 0.1,
    "num_marks": 3,
    **{f"p{grade}": None for grade in range(3)},
    "posterior_0": 0.7,
    "posterior_1": 0.2,
    "posterior_2": 0.1,
}
ANSWER = {"batch": "b/1", "dataset": "s", "query_id": "q 1", "product_id": "p/1%", "guideline": "v1"}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "'=1", "''-x", "\uff1d1"])
def test_a_cell_that_a_spreadsheet_would_run_begins_with_an_apostrophe(text):
    assert guarded_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "'", "'quoted'", "1-2", "5' long", " x"])
def test_other_cells_stay_as_they_are(text):
    assert guarded_cell(text) == plain_cell(text) == text


@given(st.text(st.sampled_from("'=+-@ \t\r\n\"a1,"), max_size=8) | st.text())
@example("'=")
def test_every_cell_comes_back_from_a_spreadsheet_s_file(text):
    assert plain_cell(guarded_cell(text)) == text
    stream = io.StringIO(newline="")
    csv.writer(stream).writerow([guarded_cell(text), "end"])
    ((cell, _),) = csv.reader(io.StringIO(stream.getvalue(), newline=""))
    assert plain_cell(cell) == text


@given(st.fixed_dictionaries({name: st.text() for name in ("batch", "dataset", "query_id", "product_id")}))
def test_an_external_id_says_which_pair_of_which_batch_it_is(place):
    assert place_of(record_id(place)) == place


def test_evidence_is_told_in_words():
    assert evidence_in_words(ROW) == (
        "Shoppers pass it over, though people call it exact. Shown 40 times, 2 clicks, 0 purchases: 0.2 times the "
        "clicks of an average product at its places. Clicks per look 0.05 (95 % interval 0.01 to 0.10). All evidence: "
        "irrelevant 70%, partial 20%, exact 10%. Raters behind the grade: 3."
    )
    unseen = ROW | {"impressions": 0, "click_rate": None, "num_marks": None, "kind": "new_kind", "posterior_0": None}
    assert evidence_in_words(unseen) == "New_kind. No shopper was shown it."


def test_a_record_suggests_what_all_evidence_makes_most_probable():
    record = argilla_record(ROW)
    assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    assert record["suggestions"] == {"grade": {"value": "irrelevant", "score": 0.7, "agent": "audit"}}
    assert record["fields"]["human_grade"] == "2 exact"
    assert (record["fields"]["brand"], record["fields"]["query"]) == ("", "=red")
    assert argilla_record(ROW | {"posterior_0": None})["suggestions"] == {}


RESPONSES = {
    "by question": {
        "responses": {
            "grade": [{"value": "exact", "user_id": "u1"}, {"value": "partial", "user_id": "u2"}],
            "note": [{"value": "worn", "user_id": "u2"}],
        }
    },
    "flattened": {
        "grade.responses": ["exact", "partial", "irrelevant"],
        "grade.responses.users": ["u1", "u2", "u3"],
        "grade.responses.status": ["submitted", "submitted", "draft"],
        "note.responses": ["worn"],
        "note.responses.users": ["u2"],
        **ANSWER,
    },
    "from the server": {
        "responses": [
            {"values": {"grade": {"value": "exact"}}, "user_id": "u1", "status": "submitted"},
            {"values": {"grade": {"value": "partial"}, "note": {"value": "worn"}}, "user_id": "u2"},
            {"values": {"grade": {"value": "exact"}}, "user_id": "u3", "status": "discarded"},
        ]
    },
}


@pytest.mark.parametrize("shape", RESPONSES)
def test_every_user_s_submitted_response_is_an_answer(shape):
    record = argilla_record(ROW) | RESPONSES[shape]
    if shape == "flattened":
        record = RESPONSES[shape] | {"id": record["id"]}
    assert is_argilla(record)
    first, second = argilla_answers(record)
    assert first == ANSWER | {"verdict": "exact", "expert": "u1", "note": None, "decided_at": None}
    assert second == ANSWER | {"verdict": "partial", "expert": "u2", "note": "worn", "decided_at": None}


def test_a_response_s_own_time_goes_before_the_record_s_and_a_server_calls_the_id_external():
    response = {"values": {"grade": {"value": "exact"}}, "user_id": "u1", "status": "submitted"}
    record = {"id": "0f", "external_id": record_id(ROW), "updated_at": "2026-01-01", "responses": [response]}
    ((answer),) = argilla_answers(record)
    assert (answer["decided_at"], answer["product_id"]) == ("2026-01-01", "p/1%")
    timed = record | {"responses": [response | {"updated_at": "2026-01-02"}]}
    assert [answer["decided_at"] for answer in argilla_answers(timed)] == ["2026-01-02"]


def test_a_record_nobody_answered_and_a_row_left_blank_are_no_answers():
    assert list(argilla_answers(argilla_record(ROW))) == []
    assert table_answer(ANSWER | {"verdict": " ", "note": None, "expert": "eva"}) is None
    assert table_answer(ANSWER | {"verdict": None, "note": "cannot tell"})["note"] == "cannot tell"


@pytest.mark.parametrize(("value", "grade"), [(0, 0), ("1", 1), ("2.0", 2), (2.0, 2), (" Exact ", 2), ("partial", 1)])
def test_a_grade_is_its_number_or_its_name(value, grade):
    assert parse_grade(value) == grade


@pytest.mark.parametrize("value", [3, -1, "", "exactly", 1.5, True, None, "nan", "1.0.0"])
def test_anything_else_is_no_grade(value):
    with pytest.raises(ValueError, match=r"is none of 0, 1, 2, irrelevant, partial, exact"):
        parse_grade(value)


@pytest.mark.parametrize(
    ("value", "hour"),
    [
        ("2026-01-31", 0),
        (date(2026, 1, 31), 0),
        ("2026-01-31T12:00:00Z", 12),
        (" 2026-01-31 12:00 ", 12),
        ("2026-01-31T12:00:00+02:00", 10),
        (datetime(2026, 1, 31, 12), 12),
    ],
)
def test_a_time_without_a_zone_is_utc(value, hour):
    assert parse_time(value) == datetime(2026, 1, 31, hour, tzinfo=UTC)


@pytest.mark.parametrize("value", ["31.01.2026", "soon", "", 46053, "0001-01-01T00:00:00+14:00"])
def test_other_times_are_named(value):
    with pytest.raises(ValueError, match="is no time as in 2026-01-31"):
        parse_time(value)
