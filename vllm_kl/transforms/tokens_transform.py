"""``TokensTransform`` is the base class of the transforms that read tokens and let a model score them."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.llm.policies import Masks

from vllm_kl.batch.alignment import PaddingSide, to_layout
from vllm_kl.batch.mask_recorded import mask_recorded
from vllm_kl.batch.origins import generated_by, origins
from vllm_kl.batch.read_tokens import InputKeys, nested, read_batch
from vllm_kl.batch.tokenize_texts import TextWatch
from vllm_kl.batch.write_entries import set_rows
from vllm_kl.transforms.from_collector import policy_of
from vllm_kl.transforms.model_side import Side
from vllm_kl.transforms.next_transform import NextTransform
from vllm_kl.transforms.pools import tell_envs_inside
from vllm_kl.transforms.postproc import on_leaving
from vllm_kl.transforms.watched_policy import engine_of, watch
from vllm_kl.types import Origin, Rows, Scored, TokenBatch
from vllm_kl.weights.collector_errors import follow
from vllm_kl.weights.live_weights import lock_of
from vllm_kl.weights.versions import OnStale, check_on_stale


@dataclass(frozen=True)
class TokenOptions:
    """Options of every transform that reads tokens, as in :class:`~vllm_kl.RetrieveKL`.

    Raises:
        OptionError: ``on_stale`` does not exist.
    """

    assistant_only: bool
    tokenizer: Any
    tokenizer_kwargs: dict[str, Any] | None
    detach: bool
    padding_side: PaddingSide
    on_stale: OnStale
    mask_recorded: bool

    def __post_init__(self) -> None:
        check_on_stale(self.on_stale)


class TokensTransform(NextTransform):
    """Reads tokens and lets a model score them.

    The transform reports what it finds in the texts, and knows whether the policy generated the tokens just
    now. If it asks the policy's engine to score a step, the engine keeps its weights until the step is scored
    (:mod:`vllm_kl.weights.engine_lock`).

    Args:
        options: become attributes.
        ref_version_key: where the version of the reference's weights is written; ``None``: it is not written.
        kwargs: passed to the next base class.
    """

    on_stale: OnStale
    pad_output: bool  # of the models

    def __init__(self, options: TokenOptions, *, ref_version_key: NestedKey | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        tell_envs_inside()
        self.assistant_only = options.assistant_only
        self.tokenizer = options.tokenizer
        self.tokenizer_kwargs = dict(options.tokenizer_kwargs or {})
        self.detach = options.detach
        self.padding_side = options.padding_side
        self.on_stale = options.on_stale
        self.mask_recorded = options.mask_recorded
        self.ref_version_key = ref_version_key
        self._texts = TextWatch()
        self._is_step = False  # True while an env's step is written: the policy has just generated it

    def __setstate__(self, state: dict[str, Any]) -> None:
        tell_envs_inside()  # the transform came from another process, and was not made here
        super().__setstate__(state)

    @abstractmethod
    def _keys(self) -> InputKeys:
        """Return where the ids and masks are."""

    @property
    @abstractmethod
    def _written_mask(self) -> NestedKey | None:
        """Where the mask of kept tokens is written; ``None``: it is not written."""

    @abstractmethod
    def _policy_side(self) -> Side | None:
        """Return the side whose log-probs stand for those of the policy that sampled, if there is one."""

    @abstractmethod
    def _model(self) -> Any:
        """Return the model that scores beside the policy."""

    def _read(self, td: TensorDictBase) -> TokenBatch:
        """Return the tokens of a one-dimensional batch."""
        batch = read_batch(td, self._keys(), assistant_only=self.assistant_only)
        self._texts.see(batch.report)
        if self._is_step and (is_stepped := td.get("_step", default=None)) is not None:
            # A dialog that has ended waits for the others (torchrl 0.14: rollout(break_when_all_done=True)).
            # TorchRL replaces its step by a copy of its last one.
            of_token = torch.repeat_interleave(is_stepped.flatten().cpu(), torch.tensor(batch.lengths))
            batch = dataclasses.replace(batch, packed_keep=batch.packed_keep & of_token)
        return batch

    def _to_rows(self, values: torch.Tensor, batch: TokenBatch, device: torch.device | None) -> Rows:
        """Return packed values in the layout of the transform's entries."""
        rows = to_layout(values, batch, pad_output=self.pad_output, padding_side=self.padding_side)
        return to_device(rows, device)

    def _write_masks(self, td: TensorDictBase, batch: TokenBatch) -> None:
        """Write the masks of ids that were tokenized here, unless the batch has masks or an env makes a step.

        TorchRL's ``SFTLoss`` and ``DistillationLoss`` (0.14) read them. Without them, the losses render the
        history by a template of their choice, and leave out the token that ends a turn.
        """
        if self._is_step or batch.stored or batch.packed_assistant is None or "masks" in td.keys():
            return
        assistant = batch.packed_assistant
        for name, mask in {
            "all_assistant_mask": assistant,
            "all_attention_mask": torch.ones_like(assistant),
        }.items():
            set_rows(td, ("masks", name), self._to_rows(mask, batch, td.device), Masks)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._mask_recorded(super().forward(tensordict))

    def _mask_recorded(self, td: TensorDictBase) -> TensorDictBase:
        """Let TorchRL's losses leave out the tokens that a batch with ``"next"`` has no log-probs of."""
        if not self.mask_recorded or self._written_mask is None or td.get("next", default=None) is None:
            return td
        log_probs = getattr(policy_of(self._collector()), "log_probs_key", "log_probs")
        return mask_recorded(td, mask_key=self._written_mask, log_probs_key=nested(log_probs, "full"))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._is_step = True
        try:
            written = super()._step(tensordict, next_tensordict)
        except BaseException:
            self._close_step(is_last=True)
            raise
        finally:
            self._is_step = False
        self._close_step()
        # TorchRL 0.14 leaves the entries of a step as they were: what a transform sets there is lost.
        on_leaving(self._collector(), self._mask_recorded)
        return written

    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        collector = self._collector()
        policy = policy_of(collector)
        watch(policy)  # remembers sampling parameters from the policy's first call on
        if (engine := self._policy_engine()) is not None:
            lock_of(engine).score_here()
        follow(collector, engine_of(policy), getattr(self._model(), "scorer", None))
        return super()._reset_env_preprocess(tensordict)

    def _scores_with_policy(self) -> bool:
        side = self._policy_side()
        return side is not None and side.scores_with(policy_of(self._collector()))

    def _policy_engine(self) -> Any:
        """Return the policy's ``LLMEngine`` if this transform asks it to score; else ``None``."""
        return engine_of(policy_of(self._collector())) if self._scores_with_policy() else None

    def _close_step(self, is_last: bool = False) -> None:
        """Allow new weights, unless a later transform of this env still asks the same engine."""
        if (engine := self._policy_engine()) is None:
            return
        asking = [
            it
            for it in self._neighbours()
            if isinstance(it, TokensTransform) and it._policy_engine() is engine
        ]
        if is_last or asking[-1] is self:
            lock_of(engine).close_step()

    def _sampled(self, td: TensorDictBase) -> list[Origin]:
        """Return the weights that sampled each row, as far as they are known.

        At an env's step they are only read if this transform scores with the policy's engine.
        """
        if not self._is_step:
            return origins(td)
        return (generated_by(td) or []) if self._scores_with_policy() else []

    def clone(self) -> Self:
        twin = super().clone()
        twin._texts = TextWatch()  # torchrl's copies are shallow
        return twin


def side_log_probs(
    side: Side, batch: TokenBatch, td: TensorDictBase, collector: Any, *, temperature: float, detach: bool
) -> Scored:
    """Return a side's log-probs at a temperature."""
    with torch.set_grad_enabled(not detach and torch.is_grad_enabled()):
        scored = side.log_probs(batch, td, collector, temperature)
    return dataclasses.replace(scored, values=scored.values.detach()) if detach else scored


def to_device(rows: Rows, device: torch.device | None) -> Rows:
    """Move rows to the device of a tensordict, if it has one."""
    if device is None:
        return rows
    return rows.to(device) if isinstance(rows, torch.Tensor) else [row.to(device) for row in rows]
