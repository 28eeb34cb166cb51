"""``RetrieveLogProb`` writes the log-probs that one model gives to the tokens of a batch.

The class is a drop-in for TorchRL's ``RetrieveLogProb`` (``torchrl.envs.llm.transforms``, 0.14): it has the
same arguments, defaults and keys.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data import Composite
from torchrl.modules.llm.policies import LLMWrapperBase, LogProbs

from vllm_kl.batch.alignment import PaddingSide
from vllm_kl.batch.read_tokens import InputKeys, keys_of, nested, rows_of
from vllm_kl.batch.write_entries import check_distinct, declare, set_rows
from vllm_kl.diagnostics import MismatchWarning
from vllm_kl.errors import InputError
from vllm_kl.transforms.from_collector import (
    TEMPERATURES,
    policy_of,
    recorded_distribution,
    why_not_at_temperature,
)
from vllm_kl.transforms.model_side import ModelSide, Side, check_side, warn_unless_full
from vllm_kl.transforms.tokens_transform import TokenOptions, TokensTransform, side_log_probs
from vllm_kl.transforms.vllm_reference import VLLMReference
from vllm_kl.types import Rows
from vllm_kl.weights.versions import OnStale, check_stale


class RetrieveLogProb(TokensTransform):
    """Writes the log-probs of one model: of the assistant's tokens, or of every token but the first.

    Args:
        model: a ``VLLMReference``, ``vLLMWrapper``, ``TransformersWrapper`` or another ``LLMWrapperBase``,
            with ``generate=False``.

    Keyword Args:
        log_probs_full_key: where the log-probs are written; default ``(model.log_probs_key, "full")``.
        assistant_only: ``True`` keeps the assistant's tokens, including the token that ends a turn; the model
            needs ``input_mode="history"``. ``False`` keeps every token but the first.
        tokenizer_kwargs: passed to the chat template (``chat_template_name``, ...) when a history is
            tokenized.
        detach: ``True`` writes log-probs without a graph.
        device: where to move a transformers model; a vLLM engine stays where it runs. Results are on the
            device of the tensordict.
        tokenizer: used if the tensordict has no ids; default: the model's.
        padding_side: where rows of different lengths are padded, if ``model.pad_output``.
        mask_key: where the mask is written, bool, for :class:`KLComputation`, losses and averages: ``True``
            at kept tokens. ``None``: no mask is written.
        on_stale: as in :class:`RetrieveKL`. It has an effect if the log-probs go to ``("log_probs",
            "full")``, the model is no ``VLLMReference`` and its weights have versions: then readers take the
            log-probs for those of the policy that sampled.
        ref_version_key: where the version of a ``VLLMReference``'s weights is written, int64 ``[B]``;
            ``None``: it is not written.
        mask_recorded: as in :class:`RetrieveKL`.
        entropy_key: where the entropy of the model's distribution at each token is written, such as
            ``("ref_entropy", "full")``; see :meth:`VLLMScorer.score`. ``None``: it is not computed.

    Writes ``[B, T]`` float32, nats (or B ragged rows ``[L]``): finite at kept tokens, exactly 0.0 elsewhere.
    Entropies have the shape, dtype, unit and padding of the log-probs; they have no graph.
    Beside a history that is tokenized here, ``("masks", "all_assistant_mask")`` and ``("masks",
    "all_attention_mask")`` are written, if the batch has no masks: ``SFTLoss`` and ``DistillationLoss`` read
    them. At an env's step they are not written.

    In the env of a collector the transform warns once if the policy records log-probs at another temperature
    than the model's, or after a ``top_p`` or penalties: the difference of the two is no KL. In a stored batch
    nothing tells how the samples were drawn, so there is no warning.

    Raises:
        ValueError: the model generates, returns no log-probs, or cannot tell the assistant's tokens.
        OptionError: with ``entropy_key``: the model's scorer returns no entropy. Only an engine of the
            reference's own does, in this process or in a Ray service.
        InputError: when called: there is nothing to score, a mask does not fit the ids, or ``mask_key``
            already holds a mask that keeps other tokens.
        MissingLogProbError: when called: a kept token has no finite log-prob.
        StaleError: when called: ``on_stale="raise"``, and the model's weights are not known to have sampled
            the tokens.

    >>> td = TensorDict(tokens=TensorDict(prompt=[[5, 6]], full=[[5, 6, 7, 8]], batch_size=1), batch_size=1)
    >>> td = RetrieveLogProb(reference)(td)
    >>> (td["ref_log_probs", "full"] != 0).tolist()  # the two tokens after the prompt
    [[False, False, True, True]]
    >>> td = RetrieveLogProb(reference, entropy_key=("ref_entropy", "full"))(td)
    >>> (td["ref_entropy", "full"] > 0).tolist()
    [[False, False, True, True]]
    """

    def __init__(
        self,
        model: Any,
        *,
        log_probs_full_key: NestedKey | None = None,
        assistant_only: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        detach: bool = True,
        device: torch.device | None = None,
        tokenizer: Any = None,
        padding_side: PaddingSide = "left",
        mask_key: NestedKey | None = "kl_mask",
        on_stale: OnStale = "raise",
        ref_version_key: NestedKey | None = "ref_version",
        mask_recorded: bool = True,
        entropy_key: NestedKey | None = None,
    ) -> None:
        options = TokenOptions(
            assistant_only, tokenizer, tokenizer_kwargs, detach, padding_side, on_stale, mask_recorded
        )
        if log_probs_full_key is None:
            log_probs_full_key = (model.log_probs_key, "full")
        else:
            warn_unless_full(log_probs_full_key)
        check_side(model, assistant_only)
        model = model if device is None else model.to(device)
        side = ModelSide(model, entropy=entropy_key is not None)
        is_reference = isinstance(model, VLLMReference)
        if not is_reference or not side.has_versions:
            ref_version_key = None
        written = (log_probs_full_key, mask_key, ref_version_key, entropy_key)
        out_keys = [key for key in written if key is not None]
        check_distinct(out_keys)
        super().__init__(
            options, ref_version_key=ref_version_key, in_keys=list(model.in_keys), out_keys=out_keys
        )
        self.model = model
        self._side = side
        self._has_warned = False
        # Under this key readers take log-probs for those of the policy that sampled.
        self._is_policy = not is_reference and log_probs_full_key == ("log_probs", "full")
        self.mask_key = mask_key
        self.log_probs_full_key = log_probs_full_key
        self.entropy_key = entropy_key

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the chat template, ``template_...``, as in :attr:`RetrieveKL.metrics`."""
        return self._texts.metrics

    def temperature_at(self, key: NestedKey) -> float | None:
        return self._side.temperature if key == self.log_probs_full_key else None

    def _keys(self) -> InputKeys:
        return keys_of(self.model, tokenizer=self.tokenizer, template_kwargs=self.tokenizer_kwargs)

    @property
    def pad_output(self) -> bool:  # type: ignore[override]  # the base class only reads it
        """The model's ``pad_output``."""
        return self.model.pad_output

    @property
    def _written_mask(self) -> NestedKey | None:
        return self.mask_key

    def _policy_side(self) -> Side | None:
        return self._side if self._is_policy else None

    def _model(self) -> Any:
        return self.model

    def _warn_of_recorded(self, td: TensorDictBase) -> None:
        """Warn if the collector's policy records log-probs of another distribution than the model's."""
        policy = policy_of(self._collector())
        if self._has_warned or not isinstance(policy, LLMWrapperBase) or not policy.return_log_probs:
            return
        key = nested(policy.log_probs_key, "full")
        is_scored = any(transform.temperature_at(key) is not None for transform in self._neighbours())
        if is_scored or rows_of(td, key) is None:
            return
        if why := why_not_at_temperature(recorded_distribution(policy), self._side.temperature):
            self._has_warned = True
            warnings.warn(f"{why}. {TEMPERATURES}", MismatchWarning, stacklevel=2)

    def _write(self, td: TensorDictBase, next_td: TensorDictBase) -> TensorDictBase:
        self._warn_of_recorded(td)
        batch = self._read(td)
        scored = side_log_probs(
            self._side, batch, td, None, temperature=self._side.temperature, detach=self.detach
        )
        if self._is_policy and scored.origin.version is not None:
            check_stale(self._sampled(td), scored.origin, self.on_stale)
        rows, masks = (self._to_rows(side, batch, td.device) for side in (scored.values, batch.packed_keep))
        if self.mask_key is not None:
            self._check_mask(next_td, masks)
        is_flat = next_td is td
        next_td = set_rows(next_td, self.log_probs_full_key, rows, LogProbs)
        if scored.entropies is not None:
            next_td = set_rows(next_td, self.entropy_key, self._to_rows(scored.entropies, batch, td.device))
        if self.mask_key is not None:
            next_td = set_rows(next_td, self.mask_key, masks)
        if self.ref_version_key is not None:
            version: Any = scored.origin.version
            next_td.set(self.ref_version_key, torch.full((len(batch),), version, device=td.device))
        self._write_masks(next_td if is_flat else td, batch)
        return next_td

    def _check_mask(self, next_td: TensorDictBase, masks: Rows) -> None:
        """Refuse to replace a stored mask that keeps other tokens than this one."""
        for i, (stored, mask) in enumerate(zip(rows_of(next_td, self.mask_key) or masks, masks, strict=True)):
            stored, mask = stored.cpu().bool(), mask.cpu()
            if stored.shape != mask.shape:
                raise InputError(
                    f"sample {i}: the tensordict has a {self.mask_key} of shape {list(stored.shape)}, but "
                    f"these log-probs have shape {list(mask.shape)}. Give both sides one pad_output and one "
                    "padding_side"
                )
            if (differs := (stored != mask).nonzero()).numel():
                t = int(differs[0])
                raise InputError(
                    f"sample {i}, token {t}: the tensordict's {self.mask_key} "
                    f"{'keeps' if stored[t] else 'leaves out'} the token, but the mask of these log-probs "
                    f"{'keeps' if mask[t] else 'leaves out'} it. Give both sides one assistant_only, or each "
                    "side a mask_key of its own"
                )

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        declare(observation_spec, self.log_probs_full_key, LogProbs)
        if self.entropy_key is not None:
            declare(observation_spec, self.entropy_key)
        if self.mask_key is not None:
            declare(observation_spec, self.mask_key, dtype=torch.bool)
        if self.ref_version_key is not None:
            declare(observation_spec, self.ref_version_key, trailing=(), dtype=torch.int64)
        return observation_spec
