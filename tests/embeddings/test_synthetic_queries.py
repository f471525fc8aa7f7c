import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from embeddings.synthetic_queries import MAX_WORDS, QueryWriter, write_queries

# what a thing is stands last and is typed, its maker stands first and is not
PAIRS = [
    (f"{colour} {thing}", f"Acme Deluxe {colour} {size} in. {thing}")
    for colour in ("red", "grey")
    for size in range(3, 9)
    for thing in ("hose", "lamp", "drill")
]


def drawn(writer, title, number=400):
    rng = np.random.default_rng(0)
    queries = [writer.write(title, rng) for _ in range(number)]
    return queries, Counter(word for query in queries for word in query.split())


def test_words_that_people_type_are_drawn_more_often():
    _, counts = drawn(QueryWriter(PAIRS), "Acme Deluxe red 5 in. hose")
    assert min(counts["red"], counts["hose"]) > 3 * max(counts["acme"], counts["deluxe"], counts["in"])


def test_words_never_seen_are_drawn_by_their_place():
    _, counts = drawn(QueryWriter(PAIRS), "Bolt Super teal 5 cm sofa")
    assert counts["sofa"] > 2 * counts["bolt"]


def test_queries_are_different_words_of_the_title_in_its_order_and_as_long_as_peoples():
    title = "Acme: Deluxe RED 5-1/2 in. Hose, red hose"
    queries, _ = drawn(QueryWriter(PAIRS), title)
    order = ["acme", "deluxe", "red", "5", "1/2", "in", "hose"]
    assert {len(query.split()) for query in queries} == {2}
    for query in queries:
        places = [order.index(word) for word in query.split()]
        assert places == sorted(set(places))
    long = [(" ".join(map(str, range(40))), " ".join(map(str, range(40))))]
    assert {len(query.split()) for query in drawn(QueryWriter(long), long[0][1], 20)[0]} == {MAX_WORDS}


def test_a_title_of_one_word_gets_no_query():
    writer = QueryWriter(PAIRS)
    assert writer.write("hose Hose", np.random.default_rng(0)) == ""
    assert writer.write("", np.random.default_rng(0)) == ""


def test_every_product_comes_once_before_any_comes_again():
    titles = [(number, f"word{number} grey red drill hose lamp") for number in range(10)]
    found = write_queries(QueryWriter(PAIRS), titles, 15, seed=1)
    assert len(found) == len(set(found)) == 15
    assert {key for key, _ in found[:10]} == set(range(10))
    assert {key for key, _ in found} == set(range(10))
    assert found != write_queries(QueryWriter(PAIRS), titles, 15, seed=2)


def test_there_are_no_more_queries_than_different_ones():
    found = write_queries(QueryWriter(PAIRS), [("a", "red hose"), ("b", "lamp")], 50, seed=0)
    assert found == [("a", "red hose")]
    assert write_queries(QueryWriter(PAIRS), [], 5, seed=0) == []


def test_queries_that_share_nothing_with_titles_teach_nothing():
    with pytest.raises(ValueError, match="found none in 1 pairs"):
        QueryWriter([("hose", "Schlauch rot")])
    with pytest.raises(ValueError, match="found none in 0 pairs"):
        QueryWriter([])


def test_the_same_in_every_process():
    code = (
        "from tests.embeddings.test_synthetic_queries import *\n"
        "print(write_queries(QueryWriter(PAIRS), [(t, t) for _, t in PAIRS], 60, seed=3))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
