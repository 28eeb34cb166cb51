"""Computes the exact KL of two models over the vocabulary, from hidden states and LM heads.

The logits of a token are ``scale * weight @ h``, of its hidden state h with H numbers. So H numbers per token
leave each engine, not the V of its logits. V is 152k and H some thousands in usual models. This module
multiplies a part of the rows with a part of both heads at a time, and keeps running sums:

    KL(p || q) = sum_v p(v) (a_v - b_v) - log sum_v exp(a_v) + log sum_v exp(b_v)

with the logits a of p and b of q. Logits are float32, sums over parts float64.

N tokens, H hidden size, V vocabulary. Models p and q may have different H.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_kl import mkl
from vllm_kl.errors import InputError, OptionError

mkl.choose_code()

# Rows and columns of a part: 8 MiB of logits for each model.
_ROWS = 512
_COLUMNS = 4096
# The most numbers of hidden states of one model that this process asks for at a time: 128 MiB.
_MAX_HIDDEN = 1 << 25


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LMHead:
    """A copy of a model's LM head: it makes logits of the rows of ``VLLMScorer.hidden_states``.

    >>> head = scorer.lm_head()
    >>> hidden, = scorer.hidden_states([[5, 6, 7]])
    >>> log_probs = head.logits(hidden).log_softmax(-1)  # [2, V] float32, nats
    >>> torch.testing.assert_close(log_probs[[0, 1], [6, 7]], scorer.score([[5, 6, 7]])[0])
    """

    weight: torch.Tensor  # [V, H] in the model's dtype, CPU
    scale: float  # factor of every logit
    weight_version: int | None  # version of the weights that it belongs to; None: not known

    def logits(self, hidden_N_H: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """Return the logits of some columns of the vocabulary, float32, on the weight's device.

        They are multiplied in float32, also under autocast and where PyTorch may use TF32.

        Args:
            hidden_N_H: hidden states, of any dtype and device. Gradients flow through them; their products
                are those that PyTorch is set to.
            columns: of the vocabulary. All columns of many rows need much memory.
        """
        with _FLOAT32_PRODUCTS.on(self.weight.device):
            weight = self.weight[columns].float()
            return (self.scale * hidden_N_H.to(weight.device, torch.float32)) @ weight.T


class _Float32Products:
    """Multiplies float32 matrices in float32, whatever a trainer has set for its own.

    The settings are the process's. So the first thread that comes saves them, and the last one that leaves
    puts them back; meanwhile they hold for the trainer's products as well. A setting that PyTorch's general
    one decides is put back to "none", which goes on following that one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before: list[str] = []

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        backends: Any = torch.backends  # mypy does not know their attributes
        settings = (backends.cuda.matmul, backends.mkldnn.matmul)
        with self._lock:
            if not self._num_inside:
                found = [setting.fp32_precision for setting in settings]
                self._before = ["none" if one == backends.fp32_precision else one for one in found]
                for setting in settings:
                    setting.fp32_precision = "ieee"
            self._num_inside += 1
        try:
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if not self._num_inside:
                    for setting, before in zip(settings, self._before, strict=True):
                        setting.fp32_precision = before


_FLOAT32_PRODUCTS = _Float32Products()


class Side(NamedTuple):
    """One of the two models."""

    head: LMHead
    hidden: torch.Tensor  # [N, H]
    temperature: float


def common_vocab_size(sizes: Sequence[int], vocab_size: int | None = None) -> int:
    """Return the number of tokens that a KL compares: ``vocab_size``, or the size of all heads.

    Args:
        sizes: of the heads.

    Raises:
        InputError: the heads have different sizes, and ``vocab_size`` is ``None``; or it is no int, or larger
            than a head.
    """
    if vocab_size is None and len(set(sizes)) > 1:
        raise InputError(
            f"the models have heads of {' and '.join(map(str, sizes))} tokens: a KL needs one vocabulary. If "
            f"they have one tokenizer, and their heads differ in padding only, pass vocab_size={min(sizes)}"
        )
    found = sizes[0] if vocab_size is None else vocab_size
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= min(sizes):
        raise InputError(
            f"vocab_size is {found!r}, expected 1 to {min(sizes)}, the tokens of the smaller head"
        )
    return found


def check_device(device: torch.device | str | int | None) -> torch.device:
    """Return the device to compute on; ``None`` is the CPU.

    Raises:
        OptionError: it is neither the CPU nor a GPU that PyTorch can use here through CUDA.
    """
    try:
        found = torch.empty(0, device="cpu" if device is None else device).device
    except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
        raise OptionError(f"device={device!r} cannot be used here: {error}") from error
    if found.type not in ("cpu", "cuda"):  # others have no float64, or no numbers
        raise OptionError(f"device={device!r} cannot be used here: pass 'cpu' or 'cuda'")
    return found


def groups(num_rows: Sequence[int], hidden_size: int) -> Iterator[slice]:
    """Cut sequences into groups whose hidden states fit the memory; a long sequence is a group of its own.

    Args:
        num_rows: of each sequence.
        hidden_size: numbers of a row.

    >>> list(groups([20_000, 10_000, 40_000, 1], 1024))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    begin, size = 0, 0
    for i, rows in enumerate(num_rows):
        size += rows * hidden_size
        if size > _MAX_HIDDEN and i > begin:
            yield slice(begin, i)
            begin, size = i, rows * hidden_size
    if begin < len(num_rows):
        yield slice(begin, len(num_rows))


def exact_kl(p: Side, q: Side, vocab_size: int) -> torch.Tensor:
    """Return ``[N]`` float32 on the CPU: ``KL(p || q)`` of each token in nats, not below 0.

    Logits are rounded to float32: the error is below 2e-6 times the largest logit, divided by the
    temperature, or 1e-6.

    Args:
        p: the model whose expectation it is.
        q: the other model, with its head on the same device.
        vocab_size: the distributions are those over the first so many tokens.

    >>> heads = [LMHead(weight=torch.randn(1000, 8), scale=1.0, weight_version=0) for _ in range(2)]
    >>> hidden = torch.randn(3, 8)
    >>> a, b = (head.logits(hidden).double().log_softmax(-1) for head in heads)
    >>> found = exact_kl(*(Side(head, hidden, 1.0) for head in heads), 1000)
    >>> torch.testing.assert_close(found.double(), (a.exp() * (a - b)).sum(-1), rtol=1e-5, atol=1e-5)
    """
    parts = [_of_rows(p, q, rows, vocab_size) for rows in _slices(len(p.hidden), _ROWS)]
    return torch.cat(parts) if parts else torch.empty(0)


class _LogSum:
    """The log of a sum of exponentials, to which each row of logits is added part by part."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        # The largest logit until now, and the sum of exp(logit - top): [N] float64.
        self._top = torch.full((num_rows,), -torch.inf, dtype=torch.float64, device=device)
        self._mass = torch.zeros_like(self._top)

    def add(self, logits_N_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``exp(logits - top)``, and the factor of what was summed in units of the top before."""
        top = torch.maximum(self._top, logits_N_C.amax(1))
        factor = (self._top - top).exp()
        powers = (logits_N_C - top.float()[:, None]).exp_()
        self._top, self._mass = top, self._mass * factor + powers.sum(1)
        return powers, factor

    def mean(self, sum_N: torch.Tensor) -> torch.Tensor:
        """Return the mean of what was summed with the exponentials as weights."""
        return sum_N / self._mass

    def total(self) -> torch.Tensor:
        return self._top + self._mass.log()


def _of_rows(p: Side, q: Side, rows: slice, vocab_size: int) -> torch.Tensor:
    device = p.head.weight.device
    scaled = [side.hidden[rows].to(device, torch.float32) / side.temperature for side in (p, q)]
    of_p, of_q = (_LogSum(rows.stop - rows.start, device) for _ in range(2))
    # The sum of exp(a - top) * (a - b).
    distance = torch.zeros(rows.stop - rows.start, dtype=torch.float64, device=device)
    for columns in _slices(vocab_size, _COLUMNS):
        a, b = (side.head.logits(hidden, columns) for side, hidden in zip((p, q), scaled, strict=True))
        powers, factor = of_p.add(a)
        of_q.add(b)
        distance = distance * factor + powers.mul_(a - b).sum(1)
    kl = of_p.mean(distance) - of_p.total() + of_q.total()
    return kl.clamp(min=0).float().cpu()


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(low, min(low + step, length)) for low in range(0, length, step))
