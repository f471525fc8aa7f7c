"""The draw of the review queue: strata, shares of the budget, chances, and what is not asked again."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lake.schemas import AUDIT_CONFLICT
from spark_etl.audit import with_found_at
from spark_etl.recipes import ReviewRecipe
from spark_etl.review import allocate, draw_pairs, plan_strata, query_traffic, waiting_conflicts, with_stratum

PAIR = "dataset string, query_id string, product_id string"
DAY = {number: datetime(2026, 1, number, 3, tzinfo=UTC) for number in range(1, 10)}


def conflicts(spark, rows):
    """Rows of (query, product, kind, priority) or with found_at."""
    names = [column.name for column in AUDIT_CONFLICT.columns]
    fixed = {"dataset": "d", "grade": 2, "impressions": 5, "clicks": 1, "purchases": 0, "corrected_rate": 1.0}
    full = [
        fixed | dict(zip(("query_id", "product_id", "kind", "priority", "found_at"), row, strict=False)) for row in rows
    ]
    types = {"string": "string", "int8": "tinyint", "int32": "int", "int64": "bigint", "double": "double"}
    kinds = [f"{column.name} {types.get(str(column.type), 'timestamp')}" for column in AUDIT_CONFLICT.columns]
    return spark.createDataFrame([tuple(row.get(name) for name in names) for row in full], ", ".join(kinds))


def with_strata(spark, rows, traffic=(), categories=()):
    return with_stratum(
        conflicts(spark, rows),
        spark.createDataFrame([("d", *row) for row in traffic], "dataset string, query_id string, traffic string"),
        spark.createDataFrame(
            [("d", *row) for row in categories], "dataset string, product_id string, category string"
        ),
    )


def drawn(waiting, recipe, batch_number=0):
    return draw_pairs(waiting, plan_strata(waiting, recipe), batch_number, recipe).orderBy("rank").collect()


def test_the_head_is_the_queries_that_carry_the_first_half_of_the_impressions(spark):
    seen = {"most": 40, "second": 30, "third": 20, "fourth": 10, "never": 0}
    rows = [("d", query, f"p{half}", number // 2) for query, number in seen.items() for half in range(2)]
    rows += [("other", "only", "p", 1)]
    engagement = spark.createDataFrame(rows, f"{PAIR}, impressions bigint")
    found = {row["query_id"]: row["traffic"] for row in query_traffic(engagement, ReviewRecipe()).collect()}
    # before them stand 0, 40, 70 and 90 of 100
    assert found == {"most": "head", "second": "head", "third": "torso", "fourth": "tail", "only": "head"}


def test_a_conflict_s_stratum_has_the_first_level_of_its_category_and_the_tail_where_nobody_saw_the_query(spark):
    rows = [("q1", "p1", "doubtful", 1.0), ("q2", "p2", "doubtful", 1.0), ("q2", "p3", "doubtful", 1.0)]
    categories = [("p1", "Garden > Tools > Rakes"), ("p2", None), ("p3", "Garden")]
    found = with_strata(spark, rows, [("q1", "head")], categories).collect()
    assert {row["product_id"]: (row["traffic"], row["category"]) for row in found} == {
        "p1": ("head", "Garden"),
        "p2": ("tail", ""),
        "p3": ("tail", "Garden"),
    }


@pytest.mark.parametrize(
    ("sizes", "weights", "floors", "budget", "shares"),
    [
        ([100, 100, 100], [6, 3, 1], [0, 0, 0], 10, [6, 3, 1]),
        ([100, 100, 100], [8, 1, 1], [2, 2, 2], 10, [6, 2, 2]),
        ([3, 100, 100], [8, 1, 1], [0, 0, 0], 9, [3, 3, 3]),
        ([5, 5, 5], [1, 3, 2], [2, 2, 2], 4, [1, 2, 1]),
        ([5, 5, 5], [1, 3, 2], [2, 2, 2], 2, [0, 1, 1]),
        ([2, 1], [0, 0], [0, 0], 9, [2, 1]),
        ([4, 4], [0, 1], [0, 0], 5, [1, 4]),
        ([], [], [], 5, []),
    ],
)
def test_a_budget_is_shared_by_floor_then_weight_then_room(sizes, weights, floors, budget, shares):
    assert allocate(sizes, weights, floors, budget) == shares


@given(
    st.lists(st.tuples(st.integers(0, 30), st.floats(0, 100, allow_subnormal=False), st.integers(-2, 5)), max_size=12),
    st.integers(0, 150),
)
def test_a_share_is_never_above_its_stratum_and_the_budget_is_used_up(strata, budget):
    sizes, weights, floors = ([one[part] for one in strata] for part in range(3))
    shares = allocate(sizes, weights, floors, budget)
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert sum(shares) == min(budget, sum(sizes))
    least = [max(0, min(floor, size)) for floor, size in zip(floors, sizes, strict=True)]
    if sum(least) <= budget:
        assert all(share >= floor for share, floor in zip(shares, least, strict=True))
    elif budget >= sum(floor > 0 for floor in least):
        assert all(share > 0 for share, floor in zip(shares, least, strict=True) if floor)


ROWS = [(f"q{number % 4}", f"p{number}", "doubtful", float(number)) for number in range(40)]
TRAFFIC = [("q0", "head"), ("q1", "torso")]


def test_the_batch_holds_a_random_part_with_its_chance_and_the_largest_priorities_beside_it(spark):
    recipe = ReviewRecipe(budget=20, random_share=0.4, min_per_stratum=2, seed=3)
    rows = drawn(with_strata(spark, ROWS, TRAFFIC).persist(), recipe)
    assert [row["rank"] for row in rows] == list(range(1, 21))
    at_random = [row for row in rows if row["inclusion_probability"] is not None]
    assert len(at_random) == 8
    by_priority = [row for row in rows if row["inclusion_probability"] is None]
    for traffic, size in (("head", 10), ("torso", 10), ("tail", 20)):
        random = [row for row in at_random if row["traffic"] == traffic]
        assert len(random) >= 2
        assert {row["stratum_size"] for row in rows if row["traffic"] == traffic} == {size}
        assert {row["inclusion_probability"] for row in random} == {len(random) / size}
        taken = {row["priority"] for row in by_priority if row["traffic"] == traffic}
        held = {row[3] for row in ROWS if dict(TRAFFIC).get(row[0], "tail") == traffic}
        left = held - {row["priority"] for row in random}
        assert taken == set(sorted(left, reverse=True)[: len(taken)])
    # any beginning holds both parts in their shares
    for end in (5, 10, 15):
        assert sum(row["inclusion_probability"] is not None for row in rows[:end]) == pytest.approx(end * 0.4, abs=1)


def test_the_draw_hangs_on_seed_and_batch_and_not_on_the_order_of_the_rows(spark):
    def names(rows, recipe, batch_number=0):
        return [row["product_id"] for row in drawn(with_strata(spark, rows, TRAFFIC), recipe, batch_number)]

    recipe = ReviewRecipe(budget=8, order="random")
    first = names(ROWS, recipe)
    assert first == names(ROWS[::-1], recipe)
    assert set(first) != set(names(ROWS, ReviewRecipe(budget=8, order="random", seed=1)))
    assert set(first) != set(names(ROWS, recipe, 1))


def test_the_random_part_has_no_liking_for_priority_place_or_what_another_seed_drew(spark):
    rows = [("q", f"p{number:04d}", "doubtful", float(number)) for number in range(2000)]
    waiting = with_strata(spark, rows).persist()
    drawn_by = [
        {int(row["priority"]) for row in drawn(waiting, ReviewRecipe(budget=500, order="random", seed=seed))}
        for seed in (1, 2)
    ]
    # the mean of 500 of 0 .. 1999 without repetition: 999.5, its deviation 577 x sqrt(1 / 500 x 3 / 4) = 22
    assert all(abs(sum(found) / 500 - 999.5) < 4 * 22 for found in drawn_by)
    # both draw a pair with a chance of 1 / 16: 125, its deviation sqrt(500 / 4 x 3 / 4 x 3 / 4) = 8
    assert abs(len(drawn_by[0] & drawn_by[1]) - 125) < 4 * 8


def test_what_was_settled_since_or_waits_in_an_open_batch_is_not_queued_again(spark):
    rows = [(f"q{number}", "p", "doubtful", 1.0, DAY[4]) for number in range(7)] + [("q7", "p", "doubtful", 1.0)]
    found = conflicts(spark, rows)
    queue = spark.createDataFrame(
        [("d", f"q{number}", "p", batch, DAY[day]) for number, batch, day in QUEUED],
        f"{PAIR}, batch string, created_at timestamp",
    )
    settled = spark.createDataFrame(
        [("d", f"q{number}", "p", DAY[day]) for number, day in SETTLED], f"{PAIR}, settled_at timestamp"
    )

    def left(*tables, **recipe):
        rows = waiting_conflicts(found, *tables, ReviewRecipe(**recipe)).collect()
        return sorted(row["query_id"] for row in rows)

    # q1 was settled after it came up, q2 before, q7 at some time; q3 waits; q4 waits again
    # q5 was answered and came up anew
    assert left(queue, settled) == ["q0", "q2", "q5", "q6"]
    assert left(queue, settled, abandoned=("lost",)) == ["q0", "q2", "q3", "q4", "q5", "q6"]
    assert left(None, settled) == ["q0", "q2", "q3", "q4", "q5", "q6"]
    assert left(queue, None) == ["q0", "q1", "q2", "q6", "q7"]
    assert left(None, None) == [f"q{number}" for number in range(8)]
    # a lake of before does not say since when, so any verdict settles
    older = waiting_conflicts(found.drop("found_at"), None, settled, ReviewRecipe())
    assert sorted(row["query_id"] for row in older.collect()) == ["q0", "q3", "q6"]


QUEUED = [(3, "lost", 5), (4, "first", 1), (4, "lost", 5), (5, "first", 1)]
SETTLED = [(1, 5), (2, 3), (4, 2), (5, 2), (7, 1)]


def test_a_pair_is_in_doubt_since_the_first_run_that_found_it_without_a_break(spark):
    first = with_found_at(conflicts(spark, [("q1", "p", "doubtful", 1.0), ("q2", "p", "doubtful", 1.0)]), DAY[1])
    again = conflicts(spark, [("q1", "p", "ignored_but_exact", 2.0), ("q3", "p", "doubtful", 1.0)])
    found = with_found_at(again, DAY[2], first)
    assert found.columns == AUDIT_CONFLICT.column_names
    since = {row["query_id"]: row["found_at"].day for row in found.collect()}
    assert since == {"q1": 1, "q3": 2}
    older = with_found_at(again, DAY[2], first.drop("found_at"))
    assert {row["found_at"].day for row in older.collect()} == {2}
