"""Checks the arguments of a scorer before they go to an engine, and the results that come back."""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vllm_kl.arrays import chosen_of, listed, sequence_of, starts_of
from vllm_kl.columns import num_columns
from vllm_kl.engines.placeholders import Placeholders
from vllm_kl.errors import InputError, MissingLogProbError, OptionError, ReadoutUnavailableError, shown
from vllm_kl.types import EngineInfo, ScoreRequest, ScoreResult, place_of

TokenIds = Sequence[int] | np.ndarray | torch.Tensor


def make_requests(
    info: EngineInfo,
    token_ids: Sequence[TokenIds],
    start: int | Sequence[int] | None,
    *,
    temperature: float,
    ids: Sequence[Any] | None = None,
    top_k: int | None = None,
    entropy: bool = False,
    hidden_states: bool = False,
    placeholders: Placeholders = "refuse",
) -> list[ScoreRequest]:
    """Return one request per sequence, also for those with nothing to score.

    Raises:
        InputError: a sequence, a start, the temperature, an id or k cannot be scored.
        ReadoutUnavailableError: the read-out cannot do what is asked.
    """
    temperature = check_temperature(temperature)
    if top_k is not None:
        _check_top_k(top_k, info)
    check_can(
        info,
        temperature,
        ids=ids is not None,
        top_k=top_k is not None,
        entropy=entropy,
        hidden_states=hidden_states,
    )
    sequences, starts = check_requests(token_ids, start, info, placeholders)
    chosen = [None] * len(sequences) if ids is None else check_ids(ids, sequences, starts, info)
    request = functools.partial(
        ScoreRequest,
        temperature=temperature,
        top_k=top_k or 0,
        entropy=entropy,
        hidden_size=info.hidden_size or 0 if hidden_states else 0,
    )
    return [
        request(token_ids=sequence, start=first, ids=rows)
        for sequence, first, rows in zip(sequences, starts, chosen, strict=True)
    ]


def check_requests(
    token_ids: Sequence[TokenIds],
    start: int | Sequence[int] | None,
    info: EngineInfo,
    placeholders: Placeholders = "refuse",
) -> tuple[list[np.ndarray], list[int]]:
    """Return the checked sequences and starts: B arrays ``[L]`` int32, and B ints.

    Raises:
        InputError: a sequence is empty, not flat or too long; an id is outside the vocabulary, or stands for
            an image; a start is out of range; the number of starts is not the number of sequences.
    """
    each = listed("token_ids", token_ids)
    sequences = [sequence_of(i, ids) for i, ids in enumerate(each)]
    starts = starts_of(start, len(sequences))
    lengths = [len(ids) for ids in sequences]
    for i, (length, first) in enumerate(zip(lengths, starts, strict=True)):
        if not length:
            raise InputError(
                f"sequence {i} is empty: a sequence needs at least one token. Drop it from the batch"
            )
        if not 1 <= first <= length:
            raise InputError(
                f"sequence {i}: start is {shown(first)}, expected 1 <= start <= {length} (its length). "
                "Token 0 has no log-prob: nothing comes before it."
            )
        if info.max_sequence_len is not None and length > info.max_sequence_len:
            raise InputError(
                f"sequence {i} has {length} tokens, but the engine scores at most {info.max_sequence_len}. "
                "Make the engine with a larger max_model_len, or cut the sequence."
            )
    packed = np.concatenate([np.empty(0, np.int64), *sequences])
    if placeholders == "refuse":
        _check_no_placeholder(packed, lengths, info)
    _check_vocabulary(packed, lengths, info)
    ends = itertools.accumulate(lengths)
    packed = packed.astype(np.int32)
    return [packed[end - length : end] for length, end in zip(lengths, ends, strict=True)], starts


def check_ids(
    ids: Sequence[Any], sequences: Sequence[np.ndarray], starts: Sequence[int], info: EngineInfo
) -> list[np.ndarray]:
    """Return the checked ids: B arrays ``[L - start, K]`` int32, the chosen tokens of each row.

    Raises:
        InputError: an entry has another shape; an id is outside the vocabulary; K differs between sequences.
    """
    top = info.vocab_size if info.vocab_size is not None else np.iinfo(np.int32).max
    arrays = chosen_of(ids, [len(ids) - start for ids, start in zip(sequences, starts, strict=True)])
    num_ids = max((array.shape[1] for array in arrays), default=1)
    if info.max_ids is not None and num_ids > info.max_ids:
        raise InputError(
            f"ids has {num_ids} tokens a row, but this engine returns at most {info.max_ids}: make the "
            "engine with a larger max_logprobs"
        )
    for i, array in enumerate(arrays):
        if (outside := (array < 0) | (array >= top)).any():
            row, column = (int(n) for n in np.argwhere(outside)[0])
            raise InputError(
                f"ids of sequence {i}, row {row}: id {array[row, column]} is outside the vocabulary [0, "
                f"{top})"
            )
    return [array.astype(np.int32) for array in arrays]


def check_temperature(temperature: float) -> float:
    """Return the temperature as a float.

    Raises:
        InputError: the temperature is not a positive, finite number.
    """
    # 1e-30 is a bound of float32, which the engine divides logits by.
    if not isinstance(temperature, numbers.Real) or not 1e-30 <= temperature <= 1e30:
        raise InputError(
            f"temperature must be positive and finite, between 1e-30 and 1e30, got {shown(temperature)}. "
            "Greedy sampling has no log-probs to compare."
        )
    return float(temperature)


def _check_top_k(k: Any, info: EngineInfo) -> None:
    if not isinstance(k, (int, np.integer)) or k < 1 or (info.vocab_size or k) < k:
        raise InputError(f"k is {shown(k)}, expected 1 <= k <= {info.vocab_size or 'the vocabulary'}")


def check_timeout(timeout_s: float | None) -> float | None:
    """Return the time to wait.

    Raises:
        OptionError: ``timeout_s`` is neither ``None`` nor a positive number.
    """
    if timeout_s is None or (isinstance(timeout_s, numbers.Real) and timeout_s > 0):
        return timeout_s
    raise OptionError(
        f"timeout_s must be a positive number of seconds, or None to wait for ever; got {timeout_s!r}"
    )


def check_lora_request(lora_request: Any) -> Any:
    """Return the adapter's request.

    Raises:
        OptionError: ``lora_request`` is not a ``LoRARequest``, or has ``load_inplace=True``.
    """
    if lora_request is None:
        return None
    if not all(hasattr(lora_request, name) for name in ("lora_name", "lora_int_id", "lora_path")):
        raise OptionError(
            "lora_request must be a vllm.lora.request.LoRARequest(name, id, path), got "
            f"{type(lora_request).__name__}"
        )
    if lora_request.load_inplace:
        raise OptionError(
            "load_inplace=True would read the adapter from disk at every step of the engine, also in the "
            "middle of a call (vLLM 0.32): pass the LoRARequest without load_inplace"
        )
    return lora_request


def _check_no_placeholder(packed: np.ndarray, lengths: Sequence[int], info: EngineInfo) -> None:
    if not info.placeholders:
        return
    found = np.isin(packed, list(info.placeholders))
    if found.any():
        i, t = place_of(torch.from_numpy(found), lengths)
        placeholder = int(packed[found.argmax()])
        num_found = int(found[sum(lengths[:i]) : sum(lengths[: i + 1])].sum())
        raise InputError(
            f"sequence {i}, token {t}: id {placeholder} is the model's placeholder for "
            f"{info.placeholders[placeholder]} ({num_found} such tokens in the sequence). The scorer sends "
            "ids only, no pixels and no sound, so the model would give other log-probs from there on than "
            "when it sampled.\n"
            "Leave the sample out; or pass placeholders='as_text' (VLLMScorer, VLLMReference, "
            "FromCollector) to score the id as an ordinary token"
        )


def _check_vocabulary(packed: np.ndarray, lengths: Sequence[int], info: EngineInfo) -> None:
    top = info.vocab_size if info.vocab_size is not None else np.iinfo(np.int32).max
    if not len(packed) or (packed.min() >= 0 and packed.max() < top):
        return
    outside = (packed < 0) | (packed >= top)
    i, t = place_of(torch.from_numpy(outside), lengths)
    found = packed[outside.argmax()]
    cure = (
        "Padding and ignored labels such as -100 must be cut off before scoring"
        if found < 0
        else f"The model's head has {top} rows. The tokenizer that made the id has more tokens, or is of "
        "another model: use this model's tokenizer, or resize the model's embeddings"
    )
    raise InputError(f"sequence {i}, token {t}: id {found} is outside the vocabulary [0, {top}).\n{cure}.")


def check_can(
    info: EngineInfo,
    temperature: float,
    *,
    ids: bool = False,
    top_k: bool = False,
    entropy: bool = False,
    hidden_states: bool = False,
) -> None:
    """Refuse a call that the read-out cannot do.

    Raises:
        ReadoutUnavailableError: the read-out cannot apply the temperature, or return these log-probs, the
            entropy or hidden states.
    """
    for is_wanted, is_able, what in (
        (
            temperature != 1.0,
            "temperature" in info.can,
            f"apply temperature={temperature}: vLLM's prompt log-probs ignore it",
        ),
        (ids, "ids" in info.can, "return log-probs of chosen ids"),
        (top_k, "top_k" in info.can, "return the most likely tokens"),
        (entropy, "entropy" in info.can, "return the entropy, which needs the log-probs of all tokens"),
        (hidden_states, info.hidden_size is not None, "return hidden states"),
    ):
        if is_wanted and not is_able:
            raise ReadoutUnavailableError(
                f"the read-out {info.readout!r} cannot {what}. An engine that the scorer owns "
                "(VLLMScorer(path)) can"
            )


def check_kl(kl: Sequence[torch.Tensor], starts: Sequence[int], first: int = 0) -> None:
    """Refuse a KL that is no number.

    Args:
        kl: of each sequence, ``[len - start]``.
        starts: of each sequence, as in ``VLLMScorer.score``.
        first: the number of the first sequence, for the message.

    Raises:
        MissingLogProbError: a KL is NaN or infinite. The message names the sequence and the token.
    """
    for i, (values, start) in enumerate(zip(kl, starts, strict=True), first):
        is_wrong = ~values.isfinite()
        if is_wrong.any():
            row = int(is_wrong.nonzero()[0])
            raise MissingLogProbError(
                f"sequence {i}, token {start + row}: the KL is {values[row]:g} ({int(is_wrong.sum())} such "
                "tokens of the sequence): logits overflow float32. Look at the models' LM heads, and at the "
                "temperature"
            )


def check_results(requests: Mapping[int, ScoreRequest], results: Sequence[ScoreResult]) -> list[torch.Tensor]:
    """Return the checked values of each sequence.

    -inf is a log-prob; NaN and numbers above 0 are not. An entropy is a finite number, and not below 0.
    Hidden states are finite numbers.

    Args:
        requests: by the number of the sequence; all with the same number of columns.
        results: one per request, in the same order.

    Raises:
        MissingLogProbError: a result has too few rows, or a log-prob or an entropy is not valid.
    """
    if not requests:
        return []
    columns = num_columns(*next(iter(requests.values())).asked)
    for (i, request), result in zip(requests.items(), results, strict=True):
        want, got = (len(request.token_ids) - request.start, columns), result.values.shape
        if got != want:
            raise MissingLogProbError(
                f"sequence {i}: expected {list(want)} log-probs, the engine returned {list(got)}"
            )
    lengths = [len(result.values) for result in results]
    values = np.concatenate([result.values for result in results])
    largest = np.full(values.shape[1], 1e-3, np.float32)  # rounding cannot make a log-prob that large
    are_ids = slice(1 + request.num_ids, 1 + request.num_ids + request.top_k)
    largest[are_ids] = np.finfo(np.float32).max
    hidden = values.shape[1] - request.hidden_size
    largest[hidden:] = np.finfo(np.float32).max
    if request.entropy:
        largest[hidden - 1] = np.finfo(np.float32).max
    is_wrong = ~(values <= largest)  # also True for NaN
    is_wrong[:, hidden:] |= np.isinf(values[:, hidden:])
    if request.entropy:
        is_wrong[:, hidden - 1] |= values[:, hidden - 1] < 0
    if is_wrong.any():
        is_wrong_row = is_wrong.any(axis=1)
        n, row = place_of(torch.from_numpy(is_wrong_row), lengths)
        at = int(is_wrong_row.argmax())
        i, request = list(requests.items())[n]
        value = values[at][is_wrong[at]][0]
        is_entropy = request.entropy and not is_wrong[at, : hidden - 1].any()
        what = "an entropy" if is_entropy else "a log-prob"
        cause = "No log-prob is above 0: the model overflows in the engine's dtype, or these are logits."
        if is_entropy:
            cause = "An entropy is finite and not below 0: the model overflows in the engine's dtype."
        if not is_wrong[at, :hidden].any():
            what = "a hidden state"
            cause = "Its numbers are finite: the model overflows in the engine's dtype."
        if np.isnan(value):
            cause = (
                "Either the model gives NaN, because its activations overflow in the engine's dtype or its "
                "checkpoint has NaN; or the engine lost a row.\n"
                "For a model that was trained in bfloat16 and runs in float16, pass dtype='bfloat16' or "
                "'float32'."
            )
        raise MissingLogProbError(
            f"sequence {i}, token {request.start + row}: the engine returned {value} instead of {what} "
            f"({int(is_wrong_row[at : at - row + lengths[n]].sum())} such tokens). {cause}"
        )
    return list(torch.from_numpy(values).split(lengths))
