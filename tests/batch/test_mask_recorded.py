"""``mask_recorded`` on batches of any shape and layout."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import LogProbs

from vllm_kl import mask_recorded

WIDTHS = [3, 4, 5, 3]


def sample(width):
    """A sample whose first two tokens are outside the mask."""
    return TensorDict(
        log_probs=LogProbs(full=-1.0 - torch.arange(width)),
        next=TensorDict(kl_mask=torch.arange(width) > 1),
    )


def check(masked, width):
    full = masked["log_probs", "full"]
    assert full.isnan().tolist() == [True, True] + [False] * (width - 2)
    assert full[2:].tolist() == [-1.0 - t for t in range(2, width)]


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4, 1)])
def test_ragged_batches(shape):
    td = lazy_stack([sample(width) for width in WIDTHS]).reshape(shape)
    assert mask_recorded(td) is td
    for masked, width in zip(td.reshape(-1).unbind(0), WIDTHS, strict=True):
        check(masked, width)


def test_one_sample():
    check(mask_recorded(sample(4)), 4)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_dense_batches_keep_what_others_hold(shape):
    td = torch.stack([sample(5) for _ in range(4)]).reshape(shape)
    before = td["log_probs", "full"]
    assert mask_recorded(td) is td
    assert before.isfinite().all()
    assert td["log_probs", "full"].shape == (*shape, 5)
    assert isinstance(td["log_probs"], LogProbs)
    for masked in td.reshape(-1).unbind(0):
        check(masked, 5)


@pytest.mark.parametrize("missing", ["mask", "log-probs", "width"])
def test_a_batch_without_both_stays_as_it_was(missing):
    td = lazy_stack([sample(4), sample(5)])
    if missing == "mask":
        td = td.exclude(("next", "kl_mask"))
    elif missing == "log-probs":
        td = td.exclude("log_probs")
    else:
        td[1]["next", "kl_mask"] = torch.ones(7, dtype=torch.bool)
    mask_recorded(td)
    if missing != "log-probs":
        assert all(row.isfinite().all() for row in td.get(("log_probs", "full"), as_list=True))
