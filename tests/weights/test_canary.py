"""The canary of a model whose log-probs are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_kl.errors import FrozenError
from vllm_kl.types import EngineInfo, ScoreResult
from vllm_kl.weights.canary import Canary


class TestNumbersThatAreNone:
    def canary(self, values):
        """A fake: an engine whose model gives what is asked of it."""
        result = ScoreResult(values=np.array(values, np.float32)[:, None], weight_version=0)
        return Canary(
            lambda request: [result], EngineInfo(readout="pooling", vocab_size=9, max_sequence_len=9)
        )

    def test_a_model_that_gives_nan_is_not_said_to_have_been_changed(self):
        with pytest.raises(
            FrozenError, match="the model gives NaN for 1 of the 2 tokens of the canary, token 2 first.*dtype"
        ) as found:
            self.canary([-1.0, np.nan]).remember()
        assert "changed" not in str(found.value)

    def test_new_weights_that_give_nan_are_refused_and_can_be_replaced(self):
        now = [[-1.0, -2.0]]

        def scores(request):
            return [ScoreResult(values=np.array(now[0], np.float32)[:, None], weight_version=len(now))]

        canary = Canary(scores, EngineInfo(readout="pooling", vocab_size=9, max_sequence_len=9))
        canary.remember()
        with pytest.raises(FrozenError, match="gives NaN"), canary.accepting_new_weights():
            now[:] = [[np.nan, np.nan], None]
        with canary.accepting_new_weights():
            now[:] = [[-1.0, -3.0], None, None]
        assert canary.check() == 0.0
