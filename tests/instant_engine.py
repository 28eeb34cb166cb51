"""An engine that computes nothing, for counts of what others do."""

from __future__ import annotations

import numpy as np

from vllm_kl.types import EngineInfo, ScoreResult


class InstantEngine:
    """Has every answer; a fake, because an engine's own work must not count."""

    info = EngineInfo(readout="pooling", vocab_size=200, max_sequence_len=None)
    weights = None

    def score(self, requests, **_):
        return [
            ScoreResult(values=np.full((len(r.token_ids) - r.start, 1), -1.5, np.float32)) for r in requests
        ]

    def close(self):
        pass
