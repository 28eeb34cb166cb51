"""Tensordicts with ids, masks and prompts of any layout: the tokens that they hold, or an error."""

from __future__ import annotations

import warnings

import torch
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import Masks, Tokens

from tests.batch.test_layouts import KEYS, SAMPLES, PrefixScorer, layouts, log_prob
from tests.fuzz.strategies import fuzz, told
from vllm_kl.batch.alignment import from_layout, scored_spans, to_layout
from vllm_kl.batch.read_tokens import read_batch
from vllm_kl.transforms.score_batch import score_batch


@fuzz(samples=SAMPLES, is_assistant=st.booleans(), which=st.integers(0, 4), share=0.6)
def test_values_stand_at_their_tokens_and_come_back(samples, is_assistant, which):
    sequences = [prompt + response for prompt, response in samples]
    prompt_lengths = [len(prompt) for prompt, _ in samples]
    _, td = list(layouts(sequences, prompt_lengths))[which]
    batch = read_batch(td, KEYS, assistant_only=is_assistant)
    assert [ids.tolist() for ids in batch.token_ids] == sequences
    values = score_batch(PrefixScorer(), batch).values
    for ids, prompt, row in zip(sequences, prompt_lengths, values.split(batch.lengths), strict=True):
        first = prompt if is_assistant else 1
        want = [log_prob(ids, t) if t >= first else 0.0 for t in range(len(ids))]
        assert torch.allclose(row, torch.tensor(want))
    for pad_output in (False, True):
        for side in ("left", "right"):
            rows = to_layout(values, batch, pad_output=pad_output, padding_side=side)
            if batch.places is not None or not pad_output:
                assert torch.equal(from_layout(rows, batch, what="values"), values)


@fuzz(
    rows=st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4),
    share=2.0,
)
def test_a_span_runs_from_the_first_kept_token_to_the_last(rows):
    rows = [[False, *row[1:]] for row in rows]
    packed = torch.tensor([kept for row in rows for kept in row])
    for row, span in zip(rows, scored_spans(packed, [len(row) for row in rows]), strict=True):
        places = [t for t, kept in enumerate(row) if kept]
        assert span == ((places[0], places[-1] + 1) if places else (len(row), len(row)))


WIDTH = st.integers(1, 4)
IDS_DTYPES = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool])


@st.composite
def stored(draw):
    """A batch whose ids, masks and prompts may fit each other or not."""
    num, width = draw(st.integers(1, 3)), draw(WIDTH)
    dtype = draw(IDS_DTYPES)
    trailing = draw(st.sampled_from([(), (), (), (1,), (2,)]))

    def matrix(most, *shape):
        cells = 1
        for one in shape:
            cells *= one
        return torch.tensor(draw(st.lists(st.integers(0, most), min_size=cells, max_size=cells))).reshape(
            shape
        )

    td = TensorDict(batch_size=(num,))
    tokens = {"full": matrix(3, num, width, *trailing).to(dtype)}
    if draw(st.booleans()):
        tokens["prompt"] = tokens["full"][:, : draw(st.integers(0, width))]
        if draw(st.integers(0, 3)) == 0:
            tokens["prompt"] = matrix(3, num, draw(WIDTH))
    td["tokens"] = Tokens(**tokens, batch_size=(num,))
    masks = {}
    if draw(st.booleans()):
        masks["all_attention_mask"] = matrix(1, num, draw(st.sampled_from([width, width, width, 2]))).bool()
    if draw(st.booleans()):
        masks["all_assistant_mask"] = matrix(1, num, draw(st.sampled_from([width, width, width, 2])))
    if masks:
        td["masks"] = Masks(**masks, batch_size=(num,))
    return td


@fuzz(td=stored(), is_assistant=st.booleans(), is_lazy=st.booleans(), share=0.6, few=100)
def test_masks_and_prompts_of_any_shape_are_read_or_refused(td, is_assistant, is_lazy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mask with a hole is reported
        given = lazy_stack(list(td.unbind(0))) if is_lazy else td
        batch = told(lambda: read_batch(given, KEYS, assistant_only=is_assistant))
    if batch is None:
        return
    full = td["tokens", "full"]
    assert full.dim() == 2
    attention = td.get(("masks", "all_attention_mask"), default=torch.ones_like(full)).bool()
    assistant = td.get(("masks", "all_assistant_mask"), default=None)
    for i, (ids, keep) in enumerate(zip(batch.token_ids, batch.keep, strict=True)):
        assert ids.tolist() == [int(one) for one in full[i][attention[i]].tolist()]
        assert full.dtype not in (torch.float32, torch.bool), "ids that are no ints"
        assert not keep[0]
        if not is_assistant:
            assert keep[1:].all()
        elif assistant is not None:
            assert keep.tolist() == assistant[i][attention[i]].bool().tolist()
