"""Computes log-probs of hidden rows as the model itself would, without the model's logits if possible.

Most LM heads are a matrix and a factor. For these the kernel computes the log-probs. For all other heads
(soft cap, bias, quantised or adapted weights, the model's own code) the model's ``compute_logits`` does, a
few rows at a time. There is no list of architectures: :func:`find_head` records the call that
``compute_logits`` makes to vLLM's ``LogitsProcessor``, and chooses the kernel only if it returns the same
numbers.

N rows, H hidden size, V vocabulary of this rank's shard, K tokens per row, k best tokens.

Source: ``LogitsProcessor``, ``model_executor/layers/logits_processor.py``, vLLM 0.32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_kl.plugin import kernel

logger = init_logger("vllm.vllm_kl")  # below vLLM's root logger: its level and handlers apply

# The most bytes of logits that ModelHead makes at a time.
_MAX_LOGITS_BYTES = 48 << 20
# Rounding may make a log-prob positive. Up to so many nats it becomes 0, above it becomes NaN.
_ROUNDING = 0.05
# Its exponential is 0 in float64; unlike -inf, 0 times this is 0.
_LEAST = -1e4


# LoRA's wrappers of a model's LogitsProcessors, each with its module's name.
Adapters = list[tuple[str, torch.nn.Module]]


class Head(Protocol):
    """An LM head as the pooler sees it."""

    def read(
        self,
        hidden_N_H: torch.Tensor,
        ids_N_K: torch.Tensor,
        *,
        top_k: int,
        temperature: float,
        entropy: bool = False,
    ) -> torch.Tensor:
        """Return ``[N, K + 2 * top_k]`` float32: log-probs of K tokens, then ids and log-probs of the best.

        With ``entropy`` there is one column more, the last: the entropy of the distribution. Log-probs and
        entropy are those of ``softmax(logits / temperature)``, in nats. Ids are whole numbers below 2 ** 24,
        which float32 holds exactly.
        """
        ...


@dataclass(frozen=True)
class MatrixHead:
    """A head with ``logits = scale * hidden @ weight.T``.

    Each tensor-parallel rank sums over its shard of the vocabulary.

    The entropy is put together of groups: that of the groups' probabilities, plus the mean of the entropies
    inside of them. The groups are the sequence's own token and the others; and of the others the shards.
    """

    lm_head: torch.nn.Module  # the module, not its weight, because a push may replace the weight
    scale: float
    num_tokens: int  # tokens of this rank's shard; the matrix's further rows are padding
    first_token: int  # id of the shard's first token

    def read(
        self,
        hidden_N_H: torch.Tensor,
        ids_N_K: torch.Tensor,
        *,
        top_k: int,
        temperature: float,
        entropy: bool = False,
    ) -> torch.Tensor:
        weight_V_H = self.lm_head.weight[: self.num_tokens]
        scale = self.scale / temperature
        is_sharded = get_tensor_model_parallel_world_size() > 1
        local = ids_N_K - self.first_token
        is_here = (local >= 0) & (local < self.num_tokens)
        logits = torch.zeros(ids_N_K.shape, dtype=torch.float64, device=ids_N_K.device)
        if self.num_tokens:  # 0: the vocabulary is so small that this rank's shard is empty
            places = local.clamp(0, self.num_tokens - 1)
            logits = kernel.token_logits(hidden_N_H, weight_V_H, places) * is_here
        own = logits[:, :1]
        if is_sharded:
            logits = tensor_model_parallel_all_reduce(logits.float()).double()
            own = own.where(is_here[:, :1], logits[:, :1])
        of_others = own.new_empty(len(own)) if entropy else None
        sums = {"scale": scale, "left_out_N": local[:, 0].where(is_here[:, 0], -1), "entropy_N": of_others}
        top_ids = top_logits = None
        if top_k:
            top_ids, top_logits, others = kernel.top_tokens(hidden_N_H, weight_V_H, top_k, **sums)
        else:
            others = kernel.log_normalizer(hidden_N_H, weight_V_H, **sums)
        # Relative to the logit of the sequence's own token: numbers near 0 lose nothing.
        others = others[:, None] - own * scale
        if is_sharded:
            others, of_others = _joined(others, of_others)
        normalizer = torch.logaddexp(others, torch.zeros_like(others))
        base = logits[:, :1]
        columns = [_log_probs((logits - base) * scale, normalizer)]
        if top_k:
            if is_sharded:
                mine = torch.stack([(top_ids + self.first_token).float(), top_logits.float()], dim=1)
                # All ranks gather top_k columns. A shard of the vocabulary may have fewer tokens.
                mine = F.pad(mine, (0, top_k - mine.shape[-1]), value=-torch.inf)
                top_ids, top_logits = tensor_model_parallel_all_gather(mine, dim=-1).unbind(1)
                top_logits, order = top_logits.topk(top_k, dim=-1)
                top_ids = top_ids.gather(-1, order)
            columns += [top_ids.float(), _log_probs((top_logits - base) * scale, normalizer)]
        if of_others is not None:
            columns.append(_entropy(others, of_others[:, None], normalizer))
        return torch.cat(columns, dim=1)


def _joined(
    others_N_1: torch.Tensor, entropy_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the log-normalizer, ``[N, 1]``, and the entropy of all ranks' shards, ``[N]`` float64."""
    mine = others_N_1 if entropy_N is None else torch.cat([others_N_1, entropy_N[:, None]], dim=1)
    gathered = tensor_model_parallel_all_gather(mine.float(), dim=-1).double()
    if entropy_N is None:
        return gathered.logsumexp(-1, True), None
    others_N_R, entropies_N_R = gathered.unflatten(-1, (-1, 2)).unbind(-1)
    joined = others_N_R.logsumexp(-1, True)
    weights = (others_N_R - joined).exp()
    entropy = (torch.special.entr(weights) + weights * entropies_N_R).sum(-1)
    return joined, entropy.masked_fill_(joined[:, 0] == -torch.inf, 0)  # no other token


def _entropy(others: torch.Tensor, of_others: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
    """Return the entropy of a distribution, ``[N, 1]`` float32, in nats; NaN where there is none.

    It is the log-normalizer minus the mean logit, both relative to the logit of the sequence's own token. So
    both go to 0 with the other tokens' probability, and keep their digits.

    Args:
        others: the log-normalizer of the other tokens, relative to the own token's logit, ``[N, 1]``.
        of_others: the entropy of the other tokens' distribution, ``[N, 1]``.
        normalizer: the log-normalizer of all tokens, relative to the own token's logit, ``[N, 1]``.
    """
    finite = others.clamp_min(_LEAST)
    entropy = normalizer + finite.sigmoid() * (of_others - finite)
    return torch.where(normalizer.isfinite(), entropy.clamp_min_(0), torch.nan).float()


def _log_probs(logits: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
    """Return ``logits - normalizer``, float32; NaN, which the scorer refuses, where that is impossible."""
    log_probs = logits - normalizer
    is_sound = normalizer.isfinite() & (log_probs <= _ROUNDING)
    return torch.where(is_sound, log_probs.clamp_(max=0), torch.nan).float()


@dataclass(frozen=True)
class ModelHead:
    """A head that calls the model's own ``compute_logits``, in slices of rows."""

    model: torch.nn.Module
    vocab_size: int
    adapters: Adapters
    reason: str  # why there is no MatrixHead

    def read(
        self,
        hidden_N_H: torch.Tensor,
        ids_N_K: torch.Tensor,
        *,
        top_k: int,
        temperature: float,
        entropy: bool = False,
    ) -> torch.Tensor:
        num_columns = ids_N_K.shape[1] + 2 * top_k + entropy
        values = hidden_N_H.new_full((len(ids_N_K), num_columns), torch.nan, dtype=torch.float32)
        bytes_per_row = 12 * self.vocab_size  # the model's logits, a float32 copy, the log-softmax
        step = max(16, _MAX_LOGITS_BYTES // bytes_per_row // 16 * 16)
        for low in range(0, len(ids_N_K), step):
            rows = slice(low, low + step)
            hidden = hidden_N_H[rows]
            num_rows = len(hidden)
            # Pad the rows to a few different heights: oneDNN compiles every height.
            with _base_weights(self.model, self.adapters):
                logits = self.model.compute_logits(F.pad(hidden, (0, 0, 0, -num_rows % 16)))[:num_rows]
            log_probs = (logits.float() / temperature).log_softmax(-1)
            columns = [log_probs.gather(1, ids_N_K[rows])]
            if top_k:
                top_log_probs, top_ids = log_probs.topk(top_k, dim=1)
                columns += [top_ids.float(), top_log_probs]
            if entropy:
                probs = log_probs.exp()
                columns.append(-probs.mul_(log_probs.clamp_min_(_LEAST)).sum(1, keepdim=True))
            values[rows] = torch.cat(columns, dim=1)
        return values


def find_head(model: torch.nn.Module, hidden_states: torch.Tensor) -> Head:
    """Return the fastest head that returns what ``model.compute_logits`` returns."""
    generator = torch.Generator().manual_seed(0)  # the same rows on every rank
    probe = torch.randn(6, hidden_states.shape[1], generator=generator) * torch.tensor(
        [[0.2], [1], [1], [1], [5], [5]]
    )
    probe = probe.to(hidden_states)
    adapters = [(name, m) for name, m in model.named_modules() if isinstance(m, LogitsProcessorWithLoRA)]
    logits, call = _watch_logits(model, probe, adapters)
    reason, head = _as_matrix(call, probe)
    if head is not None and not torch.equal(call.logits, logits):
        reason, head = "the model changes the logits after its LogitsProcessor", None
    if head is not None:
        ids = torch.arange(3, device=probe.device).repeat(len(probe), 1)
        mine = head.read(probe, ids, top_k=0, temperature=1.0)
        # compute_logits rounds to the model's dtype.
        allowed = 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max()) + 1e-4
        if not torch.allclose(mine, logits.float().log_softmax(-1)[:, :3], rtol=0, atol=allowed):
            reason, head = "its logits are not those of its head's matrix", None
    if head is None:
        logger.info("vllm_kl: log-probs go through the model's compute_logits: %s", reason)
        return ModelHead(model, logits.shape[-1], adapters, reason)
    return head


@contextlib.contextmanager
def _base_weights(model: torch.nn.Module, adapters: Adapters) -> Iterator[None]:
    """Take LoRA's wrapper off the LogitsProcessor, so that the head is the base model's.

    The wrapper knows the adapter of each *sampled* row (``sampler_indices``), one row per request. A scoring
    request has many rows.
    """
    try:
        for name, module in adapters:
            model.set_submodule(name, module.base_layer)
        yield
    finally:
        for name, module in adapters:
            model.set_submodule(name, module)


@dataclass(frozen=True)
class _LogitsCall:
    """A call of vLLM's ``LogitsProcessor`` by ``compute_logits``."""

    processor: Any
    logits: torch.Tensor  # the result of the call
    arguments: dict[str, Any]  # by the parameter names of LogitsProcessor.forward


def _watch_logits(
    model: torch.nn.Module, probe: torch.Tensor, adapters: Adapters
) -> tuple[torch.Tensor, _LogitsCall | None]:
    """Run ``compute_logits``; return its logits, and its call of a ``LogitsProcessor`` if there is one."""
    calls: list[_LogitsCall] = []

    def note(processor: Any, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        names = ("lm_head", "hidden_states", "embedding_bias")
        calls.append(_LogitsCall(processor, output, {**dict(zip(names, args, strict=False)), **kwargs}))

    processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in processors]
    try:
        with _base_weights(model, adapters):
            logits = model.compute_logits(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, calls[0] if len(calls) == 1 else None


def _as_matrix(call: _LogitsCall | None, probe: torch.Tensor) -> tuple[str, MatrixHead | None]:
    """Return the matrix head behind a call; or the reason why there is none, and ``None``."""
    if call is None:
        return "it does not call vLLM's LogitsProcessor exactly once", None
    processor, lm_head = call.processor, call.arguments.get("lm_head")
    if type(processor) is not LogitsProcessor or processor.logits_as_input:
        return f"its {type(processor).__name__} is not vLLM's LogitsProcessor", None
    if processor.soft_cap is not None:
        return "it has a soft cap", None
    if call.arguments.get("embedding_bias") is not None:
        return "it has a bias", None
    method = getattr(lm_head, "quant_method", None)
    if not isinstance(method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        return f"its head is computed by {type(method).__name__}", None
    if not torch.equal(call.arguments["hidden_states"], probe):
        return "the model changes hidden states before its head", None
    shard = getattr(lm_head, "shard_indices", None)
    if shard is None or lm_head.weight.dim() != 2 or lm_head.weight.dtype != probe.dtype:
        return "its head is no matrix in the model's dtype", None
    return "", MatrixHead(
        lm_head=lm_head,
        scale=float(processor.scale),
        num_tokens=shard.num_org_elements,
        first_token=shard.org_vocab_start_index,
    )
