import numpy as np
import pytest
import torch

from embeddings.lanes import run_in_lanes, split_by_length


def padded(lengths, *, side="right"):
    width = max(lengths)
    mask = torch.stack([torch.arange(width) < length for length in lengths]).long()
    ids = (torch.arange(len(lengths))[:, None] + 1) * mask
    if side == "left":
        mask, ids = mask.flip(1), ids.flip(1)
    return {"input_ids": ids, "attention_mask": mask, "prompt_length": 2}


@pytest.mark.parametrize("side", ["right", "left"])
def test_full_batches_hold_one_length_and_every_text_comes_once(side):
    lengths = [3, 5, 3, 5, 1, 3, 5, 3]
    batches = list(split_by_length(padded(lengths, side=side), batch_tokens=10))
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(8))
    for rows, features in batches:
        assert features["attention_mask"].all()
        assert features["input_ids"].tolist() == [[row + 1] * lengths[row] for row in rows]
        assert features["input_ids"].numel() <= 10
        assert features["prompt_length"] == 2


def test_few_texts_of_a_length_are_padded_to_share_a_batch():
    (batch,) = split_by_length(padded([4, 3, 2]), batch_tokens=4096)
    assert batch[0].tolist() == [0, 1, 2]
    assert batch[1]["attention_mask"].sum(dim=1).tolist() == [4, 3, 2]


def test_a_text_longer_than_a_batch_is_a_batch():
    assert [rows.tolist() for rows, _ in split_by_length(padded([9, 2]), batch_tokens=4)] == [[0], [1]]


def test_masks_with_holes_keep_all_their_columns():
    features = {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 0]])}
    ((rows, batch),) = split_by_length(features, batch_tokens=100)
    assert torch.equal(batch["attention_mask"], features["attention_mask"][rows])


def test_lanes_share_the_items_and_leave_torchs_threads_as_they_were():
    before, seen = torch.get_num_threads(), []

    def work(items):
        seen.extend((item, torch.get_num_threads()) for item in items)

    run_in_lanes(iter(range(20)), work, 2)
    assert sorted(item for item, _ in seen) == list(range(20))
    assert {threads for _, threads in seen} == {1}
    assert torch.get_num_threads() == before


def test_a_lane_s_error_reaches_the_caller():
    def work(items):
        for item in items:
            raise ValueError(f"item {item}")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="item"):
        run_in_lanes(iter([1]), work, 2)
    assert torch.get_num_threads() == before
