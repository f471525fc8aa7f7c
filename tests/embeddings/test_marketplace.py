import gzip
import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.load import ConfigError, load
from embeddings.marketplace import MarketplaceRecipe, write_marketplace
from embeddings.marketplace_words import TYPES
from embeddings.marketplace_world import Intent, build_products, related_types, true_grade

SMALL = MarketplaceRecipe(num_products=600, num_queries=80, num_sessions=3000, broken_row_share=0.05)


def read_lines(folder):
    return [
        line
        for path in sorted(folder.glob("*.gz"))
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]


def read_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    folder = tmp_path_factory.mktemp("market")
    counts = write_marketplace(SMALL, folder / "raw", folder / "truth")
    return folder, counts


def type_id_of(leaf):
    return next(index for index, kind in enumerate(TYPES) if kind.leaf == leaf)


def test_taxonomy_has_three_levels_and_twelve_families():
    assert len({(kind.department, kind.family) for kind in TYPES}) >= 12
    assert len({kind.leaf for kind in TYPES}) == len(TYPES)
    assert {kind.complement for kind in TYPES} <= {kind.leaf for kind in TYPES}


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, market):
    folder, _ = market
    write_marketplace(SMALL, tmp_path / "raw", tmp_path / "truth")
    assert read_bytes(tmp_path / "raw") == read_bytes(folder / "raw")
    assert read_bytes(tmp_path / "truth") == read_bytes(folder / "truth")
    other = load(MarketplaceRecipe, {"num_products": 600, "num_queries": 80, "num_sessions": 0, "seed": 8})
    write_marketplace(other, tmp_path / "other", tmp_path / "truth")
    assert read_lines(tmp_path / "other" / "catalog") != read_lines(folder / "raw" / "catalog")
    assert not (tmp_path / "other" / "events").exists()


def test_rows_do_not_depend_on_the_size_of_the_files(tmp_path, market):
    folder, _ = market
    write_marketplace(SMALL, tmp_path / "raw", tmp_path / "truth", products_per_file=70)
    assert len(list((tmp_path / "raw" / "catalog").iterdir())) == 9
    assert read_lines(tmp_path / "raw" / "catalog") == read_lines(folder / "raw" / "catalog")


def test_counts_are_those_of_the_files(market):
    folder, counts = market
    lines = read_lines(folder / "raw" / "catalog")
    assert len(lines) == 600 + counts["broken_rows"]
    assert 10 < counts["broken_rows"] < 60
    assert len(read_lines(folder / "raw" / "queries")) == 81
    assert pq.read_metadata(folder / "raw" / "annotations" / "part-00000.parquet").num_rows == counts["marks"]
    kinds = Counter(json.loads(line)["kind"] for line in read_lines(folder / "raw" / "events"))
    assert kinds == {kind: counts[kind] for kind in ("impression", "click", "cart", "purchase")}
    assert counts["impression"] == 3000 * 10


def test_true_grade_counts_departures_from_the_intent():
    products = build_products(20_000, seed=1, near_duplicate_share=0.0)
    shoes, trail, socks, drill = map(
        type_id_of, ("Running Shoes", "Trail Running Shoes", "Running Socks", "Power Drills")
    )
    intent = Intent(shoes, (("color", "red"), ("size", "9")))
    assert {trail, socks} <= set(related_types(shoes))

    def grades(type_id, color, size):
        kind, rows = TYPES[type_id], products.of_type(type_id)
        is_match = np.ones(len(rows), bool)
        for slot, attribute in enumerate(kind.attributes):
            wanted = {"color": color, "size": size}.get(attribute.name)
            if wanted:
                is_match &= products.value_NA[rows, slot] == attribute.values.index(wanted)
        assert is_match.any()
        return set(true_grade(intent, products, rows[is_match], type_id).tolist())

    assert grades(shoes, "red", "9") == {2}
    assert grades(shoes, "blue", "9") == {1}
    assert grades(shoes, "blue", "8") == {0}
    assert grades(trail, "red", "9") == {1}
    assert grades(trail, "blue", "9") == {0}
    assert grades(drill, "red", None) == {0}
    no_constraint = Intent(shoes)
    assert set(true_grade(no_constraint, products, products.of_type(socks), socks).tolist()) == {1}


def test_red_running_shoes_have_exact_matches_in_the_catalogue(market):
    folder, _ = market
    facts = [json.loads(line) for line in read_lines(folder / "raw" / "catalog") if line.endswith("}")]
    shoes = [row for row in facts if row["category"].endswith("> Running Shoes")]
    assert any("color: red" in (row["attributes"] or "") for row in shoes)


def test_near_duplicates_and_incomplete_rows_exist(market):
    folder, _ = market
    rows = [json.loads(line) for line in read_lines(folder / "raw" / "catalog") if line.endswith("}")]
    assert all(any(row[name] is None for row in rows) for name in ("description", "brand", "attributes"))
    assert len({row["category"].count(" > ") for row in rows}) == 1
    products = build_products(600, SMALL.seed, near_duplicate_share=0.5)
    distinct = np.unique(
        np.column_stack([products.type_N, products.brand_N, products.line_N, products.value_NA]), axis=0
    )
    assert len(distinct) < 450


def test_every_query_has_an_exact_match_and_all_grades_are_annotated(market):
    folder, _ = market
    truth = pq.read_table(folder / "truth" / "pair_grade.parquet").to_pylist()
    best = defaultdict(int)
    for row in truth:
        best[row["query_id"]] = max(best[row["query_id"]], row["grade"])
    assert len(best) == 80
    assert set(best.values()) == {2}
    marks = pq.read_table(folder / "raw" / "annotations" / "part-00000.parquet").to_pylist()
    assert {row["mark"] for row in marks} == {"0", "1", "2"}
    assert all(row["mark"] == str(row["grade"]) for row in marks)


def test_annotators_err_at_their_rates_and_planted_pairs_are_wrong_throughout(market):
    folder, counts = market
    truth = {
        (row["query_id"], row["product_id"]): row["grade"]
        for row in pq.read_table(folder / "truth" / "pair_grade.parquet").to_pylist()
    }
    planted = {
        (row["query_id"], row["product_id"]): row
        for row in pq.read_table(folder / "truth" / "planted_error.parquet").to_pylist()
    }
    assert len(planted) == counts["planted_errors"] == round(0.05 * counts["annotated_pairs"])
    wrong, total, annotators = Counter(), Counter(), defaultdict(list)
    for row in pq.read_table(folder / "raw" / "annotations" / "part-00000.parquet").to_pylist():
        key = (row["query_id"], row["product_id"])
        annotators[key].append(row["annotator"])
        if key in planted:
            assert planted[key]["true_grade"] == truth.get(key, 0) != planted[key]["planted_grade"]
            assert row["grade"] == planted[key]["planted_grade"]
            continue
        total[row["annotator"]] += 1
        wrong[row["annotator"]] += row["grade"] != truth.get(key, 0)
    assert all(len(set(names)) == 3 for names in annotators.values())
    for name, rate in zip(sorted(total), SMALL.annotator_error_rates, strict=True):
        assert wrong[name] / total[name] == pytest.approx(rate, abs=0.035)


def test_planted_annotators_err_in_their_ways_and_leave_the_others_marks_as_they_were(tmp_path, market):
    crew = {"annotator_kinds": ["careful", "spammer", "high", "low", "careful"]}
    crew["annotator_error_rates"] = [0.05, 1.0, 0.5, 0.5, 0.2]
    plain = load(MarketplaceRecipe, {"num_products": 600, "num_queries": 80, "num_sessions": 0})
    recipe = load(MarketplaceRecipe, {"num_products": 600, "num_queries": 80, "num_sessions": 0, **crew})
    marks = {}
    for name, one in (("plain", plain), ("crew", recipe)):
        write_marketplace(one, tmp_path / name, tmp_path / "truth")
        rows = pq.read_table(tmp_path / name / "annotations" / "part-00000.parquet").to_pylist()
        marks[name] = {(row["query_id"], row["product_id"], row["annotator"]): row["grade"] for row in rows}
    truth = {
        (row["query_id"], row["product_id"]): row["grade"]
        for row in pq.read_table(tmp_path / "truth" / "pair_grade.parquet").to_pylist()
    }
    planted = {
        (row["query_id"], row["product_id"])
        for row in pq.read_table(tmp_path / "truth" / "planted_error.parquet").to_pylist()
    }
    assert marks["plain"].keys() == marks["crew"].keys()
    first = {key for key in marks["crew"] if key[2] == "A01"}  # of the same kind and rate as before
    assert all(marks["plain"][key] == marks["crew"][key] for key in first)
    given = defaultdict(Counter)
    for (query, product, who), grade in marks["crew"].items():
        if (query, product) not in planted:
            given[who][truth.get((query, product), 0), grade] += 1
    shares = {
        who: {key: number / sum(n for other, n in found.items() if other[0] == key[0]) for key, number in found.items()}
        for who, found in given.items()
    }
    for true in range(3):
        for grade in range(3):
            assert shares["A02"][true, grade] == pytest.approx(1 / 3, abs=0.1)
    assert shares["A03"].keys() == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)}
    assert shares["A04"].keys() == {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)}
    assert shares["A03"][1, 2] == pytest.approx(0.5, abs=0.1)
    assert shares["A04"][1, 0] == pytest.approx(0.5, abs=0.1)


def test_clicks_follow_grade_and_position_and_expose_planted_errors(market):
    folder, _ = market
    truth = {
        (row["query_id"], row["product_id"]): row["grade"]
        for row in pq.read_table(folder / "truth" / "pair_grade.parquet").to_pylist()
    }
    shown, clicked, shown_at, clicked_at = Counter(), Counter(), Counter(), Counter()
    for line in read_lines(folder / "raw" / "events"):
        event = json.loads(line)
        grade = truth.get((event["query_id"], event["product_id"]), 0)
        if event["kind"] == "impression":
            shown[grade] += 1
            shown_at[event["position"]] += 1
        elif event["kind"] == "click":
            clicked[grade] += 1
            clicked_at[event["position"]] += 1
    rate = [clicked[grade] / shown[grade] for grade in range(3)]
    assert rate[2] > 2 * rate[1] > 4 * rate[0] > 0
    assert clicked_at[1] / shown_at[1] > 2 * clicked_at[10] / shown_at[10]
    planted = pq.read_table(folder / "truth" / "planted_error.parquet").to_pylist()
    kinds = Counter((row["true_grade"], row["planted_grade"]) for row in planted)
    assert kinds[2, 0] > 5
    assert kinds[0, 2] > 5


def test_too_few_annotators_and_a_rate_above_one_are_refused(tmp_path):
    recipe = load(MarketplaceRecipe, {"marks_per_pair": 3, "annotator_error_rates": [0.1]})
    with pytest.raises(ValueError, match="annotator_error_rates: expected at least"):
        write_marketplace(recipe, tmp_path / "raw", tmp_path / "truth")
    kinds = load(MarketplaceRecipe, {"annotator_kinds": ["careful", "spammer"]})
    with pytest.raises(ValueError, match="annotator_kinds: expected one for each of the 5"):
        write_marketplace(kinds, tmp_path / "raw", tmp_path / "truth")
    with pytest.raises(ConfigError, match="annotator_error_rates"):
        load(MarketplaceRecipe, {"annotator_error_rates": [1.5]})
    assert not (tmp_path / "raw").exists()
