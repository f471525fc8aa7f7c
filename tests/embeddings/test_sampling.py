import pytest

from embeddings.sampling import evenly_spread


@pytest.mark.parametrize(
    ("num_rows", "most", "expected"),
    [(0, 5, []), (1, 5, [0]), (3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (10, 4, [0, 3, 6, 9])],
)
def test_rows_are_spread_from_the_first_to_the_last(num_rows, most, expected):
    assert evenly_spread(num_rows, most).tolist() == expected


def test_no_row_is_taken_twice():
    for num_rows in (7, 100, 1001, 99_991):
        for most in (1, 2, 6, 7, 99, 100, 1000):
            found = evenly_spread(num_rows, most)
            assert len(set(found.tolist())) == min(num_rows, most)
