"""Checks that the weights that re-score a sample are the weights that sampled it.

If they are not, a ratio of the two log-probs is wrong, and nothing in the numbers shows it. So a sample of
other weights, or of unknown weights, is refused unless the caller allows it.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey

from vllm_kl.batch.origins import origins
from vllm_kl.batch.sample_rows import entries_of
from vllm_kl.errors import OptionError, StaleError, WeightsError
from vllm_kl.types import Origin

OnStale = Literal["raise", "warn", "allow"]


class StaleWarning(UserWarning):
    """Weights re-scored tokens that they are not known to have sampled."""


def check_on_stale(on_stale: str, name: str = "on_stale") -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        OptionError: the value does not exist.
    """
    if on_stale not in get_args(OnStale):
        raise OptionError(f"{name}={on_stale!r} does not exist; choose one of {', '.join(get_args(OnStale))}")


def is_of_other_weights(sampled: Origin, scoring: Origin) -> bool:
    """Return whether a sample is known to be of other weights than the scoring ones."""
    if scoring.adapter is None:
        sampled = sampled._replace(adapter=None)
    return None not in (sampled.version, scoring.version) and sampled != scoring


def check_stale(sampled: list[Origin], scoring: Origin, on_stale: OnStale) -> None:
    """Refuse samples that the scoring weights are not known to have sampled, or warn of them.

    Nothing is checked if no sample has a version and the scoring version is 0 or not known.

    Args:
        sampled: the weights that sampled each sample.
        scoring: the weights that score the samples again.
        on_stale: ``"raise"``, ``"warn"`` or ``"allow"``.

    Raises:
        StaleError: other or unknown weights sampled at least one sample, and ``on_stale="raise"``.
    """
    unknown = scoring.version is None
    stale = [
        i
        for i, origin in enumerate(sampled)
        if unknown or origin.version is None or is_of_other_weights(origin, scoring)
    ]
    nothing_moves = all(origin.version is None for origin in sampled) and scoring.version in (None, 0)
    if on_stale == "allow" or not stale or nothing_moves:
        return
    message = (
        f"{len(stale)} of {len(sampled)} samples are not known to be of the weights that score them: sample "
        f"{stale[0]} was sampled by {sampled[stale[0]]}, scored by {scoring}.\n"
        "Use the log-probs that were recorded at sampling (gen_log_probs='reuse'). If a version is missing "
        "or is not a number, let the collector write versions "
        "(track_policy_version=EnginePolicyVersion(engine)). If you want the log-probs of the scoring "
        "weights, pass on_stale='allow'"
    )
    if on_stale == "raise":
        raise StaleError(message)
    warnings.warn(message, StaleWarning, stacklevel=2)


def check_versions(
    td: TensorDictBase, *, ref_version_key: NestedKey = "ref_version", on_two_references: OnStale = "raise"
) -> dict[str, float]:
    """Return the versions in a batch, for a logger.

    If minimum and maximum differ, the weights were updated while the batch was collected.

    A version is left out if no sample carries it. :class:`~vllm_kl.RetrieveKL` in the env of a collector
    calls this for every batch that leaves the collector, and has the result in its ``metrics``.

    Args:
        td: a batch of any shape from a collector, or several such batches joined.
        ref_version_key: the transform's ``ref_version_key``.
        on_two_references: what to do if the batch has scores of two versions of the reference: ``"raise"``,
            ``"warn"`` or ``"allow"``.

    Returns:
        ``policy_version_min``, ``policy_version_max`` and ``ref_version``. If the batch has two or more
        versions of the reference, ``ref_version`` is the smallest and ``ref_version_max`` the largest.

    Raises:
        WeightsError: the batch has two versions of the reference, and ``on_two_references="raise"``. The
            message names two samples.

    >>> versions = {"policy_version": torch.tensor([3, 4]), "ref_version": torch.tensor([0, 0])}
    >>> check_versions(TensorDict(next=TensorDict(versions, batch_size=2), batch_size=2))
    {'policy_version_min': 3.0, 'policy_version_max': 4.0, 'ref_version': 0.0}
    """
    shape = td.batch_size
    flat = td.reshape(-1) if shape else td.unsqueeze(0)
    versions = entries_of(flat, ref_version_key)
    refs = [(i, version) for i, version in enumerate(versions) if version is not None]
    for i, version in refs:
        if version != refs[0][1]:
            two_references(
                index_in_batch(refs[0][0], shape),
                refs[0][1],
                index_in_batch(i, shape),
                version,
                on_two_references,
            )
            break
    return policy_range(origins(flat)) | ref_range([version for _, version in refs])


def policy_range(sampled: list[Origin]) -> dict[str, float]:
    """Return the smallest and the largest version of the policy, of those that are numbers."""
    told = (version for origin in sampled for version in (origin.version, origin.last_version))
    versions = [float(version) for version in told if isinstance(version, int)]
    return {"policy_version_min": min(versions), "policy_version_max": max(versions)} if versions else {}


def index_in_batch(i: int, shape: torch.Size) -> int | list[int]:
    """Return the index in a batch of this shape of sample i of the flattened batch."""
    return i if len(shape) < 2 else [int(n) for n in torch.unravel_index(torch.tensor(i), shape)]


def ref_range(versions: list[int]) -> dict[str, float]:
    """Return the version of the reference; of several versions the smallest and the largest."""
    figures = {"ref_version": float(min(versions))} if versions else {}
    return figures | ({"ref_version_max": float(max(versions))} if len(set(versions)) > 1 else {})


def two_references(
    one: Any, version: Any, other: Any, other_version: Any, on_two_references: OnStale
) -> None:
    """Refuse a batch with scores of two versions of one reference, or warn of it.

    Raises:
        WeightsError: ``on_two_references="raise"``.
    """
    message = (
        f"two versions of the reference are in one batch: sample {one} was scored by version {version}, "
        f"sample {other} by version {other_version}.\n"
        "Refresh the reference between batches, with no dialog half collected. If you refresh it while a "
        "collector runs, pass on_two_references='allow': each sample carries the version of its scores"
    )
    if on_two_references == "raise":
        raise WeightsError(message)
    if on_two_references == "warn":
        warnings.warn(message, StaleWarning, stacklevel=3)
