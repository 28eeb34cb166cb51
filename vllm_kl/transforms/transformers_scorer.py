"""``TransformersScorer`` computes log-probs with a transformers model in this process.

It is the scorer of a KL side that is a ``TransformersWrapper``. Unlike TorchRL's own path it cuts rows by
length, so it also scores a pad or EOS id inside a sequence. It keeps the graph if gradients are enabled. If
RoPE depends on the longest row of a batch, only rows with the same RoPE go into one batch, so each row has
the numbers that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_kl.checks import check_requests
from vllm_kl.engines.length_dependence import Lengths
from vllm_kl.engines.placeholders import Placeholders, placeholder_ids
from vllm_kl.types import EngineInfo

# The model gets sequences in slices whose logits have fewer elements than this (1 GiB in float32).
_MAX_LOGITS = 2**28


class TransformersScorer:
    """Scores with ``model(input_ids, attention_mask).logits``.

    Args:
        model: a causal language model of transformers, on any device, in any dtype.
        placeholders: as in :class:`~vllm_kl.VLLMScorer`.
    """

    def __init__(self, model: torch.nn.Module, placeholders: Placeholders = "refuse") -> None:
        self.model = model
        self._placeholders = placeholders
        whole: Any = model.config
        config = whole.get_text_config()
        self._lengths = Lengths(model)
        self._vocab_size: int = config.vocab_size
        self._info = EngineInfo(
            readout="logits",
            vocab_size=self._vocab_size,
            # "dynamic" RoPE works beyond max_position_embeddings.
            max_sequence_len=None
            if self._lengths.is_dynamic
            else getattr(config, "max_position_embeddings", None),
            length_side=self._lengths.side,
            placeholders=placeholder_ids(whole),
        )

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats, on the model's device.

        They have a graph if gradients are enabled.

        Raises:
            InputError: as :meth:`vllm_kl.VLLMScorer.score`.
        """
        check_requests(token_ids, start, self._info, self._placeholders)
        out: dict[int, torch.Tensor] = {}
        for rows in self._lengths.alike([len(ids) for ids in token_ids]):
            while rows:
                scored = self._score_slice([token_ids[i] for i in rows], [start[i] for i in rows])
                out.update(zip(rows, scored, strict=False))  # only the first sequences
                rows = rows[len(scored) :]
        return [out[i] for i in range(len(token_ids))]

    def _score_slice(self, token_ids: Sequence[torch.Tensor], start: Sequence[int]) -> list[torch.Tensor]:
        """Score the first sequences, as many as fit into one slice."""
        longest, rows = 0, 0
        for one in token_ids:
            longest = max(longest, len(one))
            if rows and (rows + 1) * longest * self._vocab_size > _MAX_LOGITS:
                break
            rows += 1
        ids, start = list(token_ids[:rows]), start[:rows]
        device = next(self.model.parameters()).device
        # Padding on the right changes no positions and, with a causal mask, no real row.
        input_ids = pad_sequence(ids, batch_first=True).to(device)
        attention_mask = pad_sequence([torch.ones_like(t) for t in ids], batch_first=True).to(device)
        self._lengths.forget()
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        out = []
        for row, t, s in zip(logits, ids, start, strict=True):
            # Row t - 1 has the distribution of token t.
            log_probs = row[s - 1 : len(t) - 1].float().log_softmax(-1)
            out.append(log_probs.gather(-1, t[s:].to(device)[:, None])[:, 0])
        return out
