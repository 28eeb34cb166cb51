"""``mask_recorded`` makes TorchRL's losses leave out the tokens that have no reference log-prob."""

from __future__ import annotations

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm.policies import LogProbs

from vllm_kl.batch.read_tokens import read_rows
from vllm_kl.batch.write_entries import set_rows
from vllm_kl.types import Rows


def mask_recorded(
    td: TensorDictBase,
    *,
    mask_key: NestedKey = "kl_mask",
    log_probs_key: NestedKey = ("log_probs", "full"),
) -> TensorDictBase:
    """Set the log-probs that the policy recorded to NaN outside the mask; return the batch.

    TorchRL's ``GRPOLoss``, ``DAPO`` and ``CISPOLoss`` (0.14.1) leave out every token whose recorded log-prob
    is NaN, whatever their ``masking_strategy``. So loss and KL count the same tokens. Without this, a loss
    with ``masking_strategy="generic"`` takes the 0.0 that stands outside the mask for a log-prob of the
    reference.

    :class:`~vllm_kl.RetrieveKL` and :class:`~vllm_kl.RetrieveLogProb` call this for every batch that leaves
    their collector, and for every batch with ``"next"`` that they score. Call it yourself if neither sees
    the batch: after ``env.rollout``, or for an env in another process. On a replay buffer:
    ``buffer.append_transform(mask_recorded, invert=True)``.

    Args:
        td: a batch of any shape.
        mask_key: where the transform wrote the mask, bool ``[*batch, T]``, under ``"next"`` if there is one.
        log_probs_key: where the policy recorded its log-probs, float ``[*batch, T]``, nats.

    Returns:
        ``td`` itself. It is as it was if it has no mask, no recorded log-probs, or the two have different
        widths: then TorchRL's losses raise.

    >>> td = TensorDict(
    ...     log_probs=TensorDict(full=torch.tensor([[0.0, -1.0, -2.0]]), batch_size=1),
    ...     next=TensorDict(kl_mask=torch.tensor([[False, False, True]]), batch_size=1),
    ...     batch_size=1,
    ... )
    >>> mask_recorded(td)["log_probs", "full"]
    tensor([[nan, nan, -2.]])
    """
    flat = td.reshape(-1) if td.batch_dims else td.unsqueeze(0)
    next_td = flat.get("next", default=None)
    masks = read_rows(flat if next_td is None else next_td, mask_key)
    recorded = read_rows(flat, log_probs_key)
    if masks is None or recorded is None:
        return td
    if any(row.shape != mask.shape for row, mask in zip(recorded, masks, strict=True)):
        return td
    rows: Rows
    if isinstance(recorded, torch.Tensor) and isinstance(masks, torch.Tensor):
        rows = recorded.where(masks, torch.nan)
    else:
        rows = [row.where(mask, torch.nan) for row, mask in zip(recorded, masks, strict=True)]
    written = set_rows(flat, log_probs_key, rows, LogProbs)
    if not isinstance(td, LazyStackedTensorDict):  # a stack's samples are those of the flat batch
        name = log_probs_key[0] if isinstance(log_probs_key, tuple) else log_probs_key
        td.set(name, written.get(name).reshape(td.batch_size))
    return td
