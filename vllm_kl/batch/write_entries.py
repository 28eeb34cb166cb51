"""Writes the rows of a batch as entries of a tensordict, dense or ragged, and declares the entries in specs.

A reader gets a dense entry with ``td.get(key)``, and a ragged entry with ``td.get(key, as_list=True)``: B
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, is_tensorclass, unravel_key
from tensordict.utils import NestedKey
from torchrl.data import Composite, Unbounded
from torchrl.modules.llm.policies import LogProbs

from vllm_kl.batch.read_tokens import read_rows
from vllm_kl.errors import InputError, OptionError
from vllm_kl.types import Rows


def set_rows(td: TensorDictBase, key: NestedKey, rows: Rows, data_cls: Any = None) -> TensorDictBase:
    """Set a dense ``[B, ...]`` or ragged (list of B) entry of a one-dimensional batch; return the result.

    The result is ``td``, unless ragged rows go to the top level of a dense tensordict: then the result is a
    lazy stack of the same entries. If the parent of a nested key is missing, a ``data_cls`` becomes the
    parent.
    """
    is_nested = isinstance(key, tuple) and len(key) > 1
    if isinstance(td, LazyStackedTensorDict) and not isinstance(rows, torch.Tensor):
        for sample, row in zip(td.unbind(0), rows, strict=True):
            if is_nested and data_cls is not None and sample.get(key[:-1], default=None) is None:
                parent = TensorDict({key[-1]: row}, batch_size=sample.batch_size, device=sample.device)
                sample.set(key[:-1], data_cls._from_tensordict(parent))
            else:
                sample.set(key, row)
        return td
    if is_nested:
        parent_key, name = key[:-1], key[-1]
        parent = td.get(parent_key, default=None)
        if parent is None:
            parent = td.empty() if isinstance(rows, torch.Tensor) else td.empty().to_lazystack(0)
            if data_cls is not None:
                parent = data_cls._from_tensordict(parent)
            td.set(parent_key, parent)
            parent = td.get(parent_key)
        inner = parent._tensordict if is_tensorclass(parent) else parent
        written = set_rows(inner, name, rows)
        if written is not inner:
            td.set(parent_key, data_cls._from_tensordict(written) if data_cls is not None else written)
        return td
    if isinstance(rows, torch.Tensor):
        return td.set(key, rows)
    return set_rows(td.to_lazystack(0), key, rows)


def check_distinct(keys: Sequence[NestedKey]) -> None:
    """Check that no key replaces the entry of another key.

    Raises:
        OptionError: two keys are equal, or one is the parent of the other.

    >>> check_distinct(["kl_penalty", ("log_probs", "full"), ("ref_log_probs", "full")])
    """
    paths = [unravel_key(key) for key in keys]
    paths = [(path,) if isinstance(path, str) else path for path in paths]
    for n, path in enumerate(paths):
        for other in paths[:n]:
            shared = min(len(path), len(other))
            if path[:shared] == other[:shared]:
                raise OptionError(
                    f"two results would be written to one key: {other if len(other) > 1 else other[0]!r} and "
                    f"{path if len(path) > 1 else path[0]!r}, of {', '.join(map(repr, keys))}"
                )


def declare(
    spec: Composite,
    key: NestedKey,
    data_cls: Any = None,
    *,
    trailing: tuple[int, ...] = (-1,),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Declare an entry ``[*batch, *trailing]`` in an observation or reward spec."""
    leaf = Unbounded(shape=(*spec.shape, *trailing), device=spec.device, dtype=dtype)
    if isinstance(key, tuple) and len(key) > 1 and key[0] not in spec.keys():
        spec[key[0]] = Composite(shape=spec.shape, device=spec.device, data_cls=data_cls)
    spec[key] = leaf


def write_kl(
    next_td: TensorDictBase,
    entries: dict[NestedKey, Rows],
    *,
    kl_key: NestedKey,
    coeff: float | None,
    log_probs: dict[NestedKey, Rows] | None = None,
) -> TensorDictBase:
    """Write log-probs, entries and the shaped reward; return the resulting tensordict.

    If ``coeff`` is given and there is a reward, ``coeff`` times ``entries[kl_key]`` is subtracted from the
    reward. Everything is computed before the first entry is written, so that an error leaves the tensordict
    as it was.
    """
    kl = entries[kl_key]
    reward = None if coeff is None else read_rows(next_td, "reward")
    if reward is not None and coeff is not None:
        shaped = _shaped_reward(reward, kl, coeff)
    if not isinstance(kl, torch.Tensor) and not isinstance(next_td, LazyStackedTensorDict):
        next_td = next_td.to_lazystack(0)  # before the first entry, so that one tensordict holds all results
    for key, rows in (log_probs or {}).items():
        next_td = set_rows(next_td, key, rows, LogProbs)
    for key, rows in entries.items():
        next_td = set_rows(next_td, key, rows)
    return next_td if reward is None else set_rows(next_td, "reward", shaped)


def _shaped_reward(reward: Rows, kl: Rows, coeff: float) -> Rows:
    """Return ``[T, 1]`` of each sample: the reward per sequence or token, minus ``coeff`` times the KL."""
    for i, (r, k) in enumerate(zip(reward, kl, strict=True)):
        if r.numel() not in (1, len(k)):
            raise InputError(
                f"sample {i}: its reward has shape {list(r.shape)}, expected one value or one per token "
                f"({len(k)})"
            )
    if isinstance(reward, torch.Tensor) and isinstance(kl, torch.Tensor):
        return _minus(reward.reshape(len(kl), -1), kl, coeff)
    shaped = [_minus(r.reshape(-1), k, coeff) for r, k in zip(reward, kl, strict=True)]
    return torch.stack(shaped) if isinstance(kl, torch.Tensor) else shaped


def _minus(reward: torch.Tensor, kl: torch.Tensor, coeff: float) -> torch.Tensor:
    return torch.sub(reward.float(), kl.to(reward.device), alpha=coeff).unsqueeze(-1)
