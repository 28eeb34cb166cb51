"""``TwoSidedTransform``, the base class of ``RetrieveKL``, lets policy and reference score the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.batch.read_tokens import InputKeys, keys_of
from vllm_kl.errors import OptionError
from vllm_kl.transforms.from_collector import FromCollector
from vllm_kl.transforms.model_side import Side, warn_unless_full
from vllm_kl.transforms.postproc import on_leaving
from vllm_kl.transforms.tokens_transform import TokenOptions, TokensTransform
from vllm_kl.transforms.two_sides import TwoSides
from vllm_kl.weights.versions import OnStale, check_on_stale, check_versions


@dataclass(frozen=True)
class Written:
    """Where log-probs, and the reference's version and entropies, are written, as in ``RetrieveKL``.

    Raises:
        OptionError: both sides have one key, or ``on_two_references`` does not exist.
    """

    gen_log_probs_full_key: NestedKey
    ref_log_probs_full_key: NestedKey
    ref_version_key: NestedKey | None
    ref_entropy_key: NestedKey | None
    on_two_references: OnStale

    def __post_init__(self) -> None:
        check_on_stale(self.on_two_references, "on_two_references")
        for key in (self.gen_log_probs_full_key, self.ref_log_probs_full_key):
            warn_unless_full(key, stacklevel=5)  # the caller of RetrieveKL
        if self.gen_log_probs_full_key == self.ref_log_probs_full_key:
            raise OptionError(
                f"both sides would be written to {self.gen_log_probs_full_key}: give each a key of its own"
            )


class TwoSidedTransform(TokensTransform):
    """Has two sides, which score the same tokens, and knows the versions of their weights.

    Args:
        options: see :class:`TokensTransform`.
        sides: the policy's side and the reference's side. The models become attributes.
        written: becomes attributes.
        history_key: as in :class:`~vllm_kl.RetrieveKL`.
        kwargs: passed to the next base class.
    """

    on_two_references: OnStale

    def __init__(
        self,
        options: TokenOptions,
        sides: TwoSides,
        written: Written,
        *,
        history_key: NestedKey,
        **kwargs: Any,
    ) -> None:
        ref_version_key = written.ref_version_key if sides.ref.has_versions else None
        log_probs = (written.gen_log_probs_full_key, written.ref_log_probs_full_key)
        keys = (*log_probs, ref_version_key, written.ref_entropy_key)
        super().__init__(
            options,
            ref_version_key=ref_version_key,
            in_keys=sides.in_keys(history_key),
            out_keys=[key for key in keys if key is not None],
            **kwargs,
        )
        self.gen_model, self._gen, self.ref_model, self._ref, self.pad_output = sides
        self.history_key = history_key
        self.gen_log_probs_full_key = written.gen_log_probs_full_key
        self.ref_log_probs_full_key = written.ref_log_probs_full_key
        self.ref_entropy_key = written.ref_entropy_key
        self.on_two_references = written.on_two_references
        # Figures of the last batch, for ``metrics``.
        self._versions: dict[str, float] = {}
        self._rescored: dict[str, float] = {}

    def temperature_at(self, key: NestedKey) -> float | None:
        is_written = key in (self.gen_log_probs_full_key, self.ref_log_probs_full_key)
        return self._ref.temperature if is_written else None

    def counts(self) -> dict[str, Any]:
        audit = self._gen.audit.state if isinstance(self._gen, FromCollector) else None
        return {**super().counts(), "audit": audit}

    def set_counts(self, counts: dict[str, Any]) -> None:
        super().set_counts(counts)
        if isinstance(self._gen, FromCollector) and counts["audit"] is not None:
            self._gen.audit.state = counts["audit"]

    def _keys(self) -> InputKeys:
        return keys_of(
            self.ref_model,
            tokenizer=self.tokenizer
            or self.ref_model.tokenizer
            or getattr(self.gen_model, "tokenizer", None),
            template_kwargs=self.tokenizer_kwargs,
            history_key=self.history_key,
            ids_of=self._gen.policy(self._collector()) if isinstance(self._gen, FromCollector) else None,
        )

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        written = super()._step(tensordict, next_tensordict)
        on_leaving(self._collector(), self._check_batch)  # a step does not see its whole batch
        return written

    def _check_batch(self, td: TensorDictBase) -> TensorDictBase:
        self._versions = check_versions(
            td,
            ref_version_key=self.ref_version_key or "ref_version",
            on_two_references=self.on_two_references,
        )
        return td

    def _policy_side(self) -> Side:
        return self._gen

    def _model(self) -> Any:
        return self.ref_model
