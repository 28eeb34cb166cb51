"""What no engine is asked about: arguments that are of no kind that can be scored. No engine, no model."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from vllm_kl.checks import check_temperature, make_requests
from vllm_kl.errors import InputError
from vllm_kl.types import EngineInfo

INFO = EngineInfo(
    readout="pooling", vocab_size=10, max_sequence_len=6, can=frozenset({"temperature", "ids", "top_k"})
)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (None, "token_ids is None, expected ints for each"),
        (torch.tensor(3), "token_ids is tensor"),
        ([torch.tensor([1.0, 2.0], dtype=torch.bfloat16)], "sequence 0 must be an array of ints"),
        ([[1, 2], torch.tensor([1, 2], device="meta")], "sequence 1 must be an array of ints"),
        ([torch.tensor([1, 0]).to_sparse()], "sequence 0 must be an array of ints"),
        ([np.array([2**64 - 3], np.uint64)], "sequence 0 has the id 18446744073709551613"),
    ],
)
def test_sequences_of_no_kind_that_can_be_scored_are_refused_by_name(token_ids, message):
    with pytest.raises(InputError, match=message):
        make_requests(INFO, token_ids, None, temperature=1.0)


@pytest.mark.parametrize("ids", [5, torch.tensor(3), [torch.tensor([[1.0]], dtype=torch.bfloat16)]])
def test_chosen_ids_of_no_kind_that_can_be_scored_are_refused(ids):
    with pytest.raises(InputError, match=r"ids( of sequence 0)? (is|must be)"):
        make_requests(INFO, [[1, 2]], None, temperature=1.0, ids=ids)


@pytest.mark.parametrize("temperature", [10**400, 1e-320, Fraction(1, 10**400), 1e300])
def test_a_temperature_that_no_float_holds_is_refused(temperature):
    """The last three would become 0 or infinity in float32."""
    with pytest.raises(InputError, match="temperature must be positive and finite, between 1e-30 and 1e30"):
        check_temperature(temperature)


def test_numbers_of_thousands_of_digits_are_refused_with_a_message():
    with pytest.raises(InputError, match=r"start is an int of 33220 bits, expected 1 <= start <= 2"):
        make_requests(INFO, [[1, 2]], 10**10_000, temperature=1.0)
    with pytest.raises(InputError, match=r"k is an int of 33220 bits, expected 1 <= k <= 10"):
        make_requests(INFO, [[1, 2]], 1, temperature=1.0, top_k=10**10_000)
