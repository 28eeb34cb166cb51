"""Reads and writes the origin of each row of a batch: the weights that sampled the row.

The engine records the origin, or a transform stamps it.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase

from vllm_kl.batch.sample_rows import entries_of
from vllm_kl.types import Origin

# Keys of the stamps: TorchRL's PolicyVersion transform writes the first, EnginePolicyVersion writes both.
POLICY_VERSION, POLICY_ADAPTER = "policy_version", "policy_adapter"
# A watched policy writes this tensordict of int64 "version", "last_version" and "adapter"; -1 means unknown.
GENERATED_BY = "generated_by"

UNKNOWN = -1


def set_generated_by(out: TensorDictBase, origins: list[Origin]) -> None:
    """Write which weights generated each row of a batch of any shape."""
    if len(origins) != out.numel():  # the policy calls its engine in another way
        origins = [Origin(None, None)] * out.numel()
    known = torch.tensor([[UNKNOWN if n is None else n for n in origin] for origin in origins])
    version, adapter, last = (column.reshape(out.batch_size) for column in known.to(out.device).unbind(1))
    told = TensorDict(version=version, last_version=last, adapter=adapter, batch_size=out.batch_size)
    out.set(GENERATED_BY, told)


def generated_by(td: TensorDictBase) -> list[Origin] | None:
    """Return which weights generated each row of a one-dimensional batch, or ``None`` without a record."""
    told = td.get(GENERATED_BY, default=None)
    if told is None:
        return None
    columns = (told[name].reshape(-1).tolist() for name in ("version", "adapter", "last_version"))
    return [Origin(*(None if n == UNKNOWN else n for n in row)) for row in zip(*columns, strict=True)]


def origins(td: TensorDictBase) -> list[Origin]:
    """Return which weights sampled each row of a one-dimensional batch, as the engine or a stamp recorded it.

    If the two disagree, for instance because weights were pushed between generation and stamp, the returned
    origin holds both versions.
    """
    told = generated_by(td)
    if told is not None and "next" not in td.keys():
        return told  # a step of an env: the stamp at the root belongs to the previous step
    stamps = [None if version == UNKNOWN else version for version in entries_of(td, POLICY_VERSION)]
    if told is None and all(version is None for version in stamps):
        return [Origin(None)] * len(stamps)
    if told is None:
        return [
            Origin(*pair)
            for pair in zip(stamps, (a or 0 for a in entries_of(td, POLICY_ADAPTER)), strict=True)
        ]
    return [
        origin if stamp in (None, origin.version) else Origin(stamp, origin.adapter, origin.version)
        for origin, stamp in zip(told, stamps, strict=True)
    ]
