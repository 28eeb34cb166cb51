"""``WrapperScorer`` scores with any TorchRL wrapper, in the wrapper's own ``tokens`` mode."""

from __future__ import annotations

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.modules.llm.policies import LLMWrapperBase, Tokens

from vllm_kl.batch.read_tokens import nested, rows_of
from vllm_kl.engines.length_dependence import Lengths
from vllm_kl.errors import MissingLogProbError


class WrapperScorer:
    """Scores with any :class:`~torchrl.modules.llm.policies.LLMWrapperBase`, in its own ``tokens`` mode.

    The wrapper must return one value per id. A wrapper that drops ids (TorchRL's drop pad ids) is refused.
    """

    def __init__(self, model: LLMWrapperBase) -> None:
        self._model = model.get_new_version(
            generate=False, return_log_probs=True, input_mode="tokens", pad_output=False, inplace=False
        )
        self._lengths = Lengths(getattr(model, "model", None))

    def score(self, token_ids: list[torch.Tensor], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 tensors ``[L - start]``, nats."""
        out: dict[int, torch.Tensor] = {}
        for samples in self._lengths.alike([len(ids) for ids in token_ids]):
            self._lengths.forget()
            rows = self._score_together(samples, [token_ids[i] for i in samples])
            out.update(zip(samples, rows, strict=True))
        return [out[i][s:].float() for i, s in enumerate(start)]

    def _score_together(self, samples: list[int], token_ids: list[torch.Tensor]) -> list[torch.Tensor]:
        td = lazy_stack(
            [
                TensorDict(tokens=Tokens(full=ids), masks=TensorDict(all_attention_mask=ids >= 0))
                for ids in token_ids
            ]
        )
        rows = rows_of(self._model(td), nested(self._model.log_probs_key, "full")) or []
        for i, row, ids in zip(samples, rows, token_ids, strict=True):
            if len(row) != len(ids):
                raise MissingLogProbError(
                    f"{type(self._model).__name__} returned {len(row)} log-probs for the {len(ids)} tokens "
                    f"of sample {i}, because it drops pad ids. Give its tokenizer a pad token that no "
                    "sequence contains."
                )
        return rows
