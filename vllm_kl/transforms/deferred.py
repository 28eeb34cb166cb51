"""Scores a step with the reference in a thread, while the policy already generates the next step.

    env step: gen side, mask, reward -> Deferral.submit -> the thread scores one step after another
        next: a handle for each sample, and a reward of NaN if the KL will be subtracted
    batch leaves the collector, or enters a replay buffer -> fill_deferred -> results instead of handles

The thread scores one step at a time, in order. So the reference's engine gets the same calls in the same
order as without deferring, and the numbers are the same bit for bit. ``fill_deferred`` finishes whole steps,
oldest first, with the code of an immediate step. So layout, coefficient schedules and metrics are the same
too.

A handle keeps its step alive. A step without handles is not scored: somebody dropped its batch, or shut the
collector down in the middle of a batch. A step with handles can be filled in after a shutdown. The thread
ends when no step is left.

The module knows nothing of KLs, masks or layouts.

Deferring is faster if both engines have cores, or a GPU, of their own and a batch has several steps. If the
policy generates a step in G seconds and the reference scores it in S, a step of a batch of K steps takes
about max(G, S) + min(G, S) / K instead of G + S. With ``"buffer"``, filled in after the next batch was
collected, it takes about max(G, S). Measured on a CPU at K=4: 1.39 times as fast as without deferring, and
1.59 times with ``"buffer"``.

Deferring gains nothing in batches of one step (1.01 times as fast). It loses if both engines share their
cores: at K=4 0.76 times as fast as without, and 0.64 to 0.70 times with ``"buffer"``.
``benchmarks/README.md`` has the figures and tells how they were measured.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, get_args

import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, lazy_stack
from torchrl.envs import Transform

from vllm_kl.batch.read_tokens import rows_of
from vllm_kl.batch.write_entries import set_rows
from vllm_kl.engines.generate import GenerateEngine
from vllm_kl.errors import CollectorError, OptionError, VLLMKLError, WeightsError
from vllm_kl.transforms.choose_scorer import is_same_temperature, scorer_for
from vllm_kl.transforms.model_side import Side
from vllm_kl.transforms.pools import where_to_stand
from vllm_kl.transforms.postproc import on_leaving
from vllm_kl.transforms.tokens_transform import TokensTransform, side_log_probs
from vllm_kl.types import Scored, TokenBatch
from vllm_kl.weights.versions import OnStale, index_in_batch, two_references

Deferred = Literal[False, True, "buffer"]

# Where ``next`` has the handles. The specs leave them out: handles are no input of the next step.
PENDING = "kl_pending"

# Writes a step's results, from the reference's scores, into a tensordict ``[B]``; returns it.
Write = Callable[[TensorDictBase, Scored], TensorDictBase]

# Changes a whole batch that has its results; returns it.
Finish = Callable[[TensorDictBase], TensorDictBase]


class Step:
    """One env step whose reference log-probs were requested. Steps finish oldest first, each once."""

    def __init__(
        self,
        number: int,
        owner: Deferral,
        future: Future[Scored],
        write: Callable[..., TensorDictBase],
        previous: Step | None,
    ) -> None:
        self.number = number
        self.owner = owner  # the same for all steps of a transform
        self.version: int | str | None = None  # of the reference's weights
        self._future: Future[Scored] | None = future
        self._write = write
        # The unfinished step before. It is kept even if its batch is gone: a coefficient schedule counts it.
        self._previous = previous
        self._outcome: list[TensorDictBase] | Exception = []
        weakref.finalize(self, future.cancel)  # no effect while the thread scores the step

    @property
    def is_finished(self) -> bool:
        """Whether the step has its results, or an error."""
        return self._future is None

    def results(self) -> list[TensorDictBase]:
        """Wait for the step; return the results of each sample.

        Raises:
            Exception: scoring the step failed.
        """
        with self.owner.finishing:
            unfinished: list[Step] = []
            step: Step | None = self
            while step is not None and not step.is_finished:
                unfinished.append(step)
                step = step._previous
            for step in reversed(unfinished):
                step._finish()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def _finish(self) -> None:
        try:
            assert self._future is not None, "a step finishes once"
            scored = self._future.result()
            self.version = scored.origin.version
            self._outcome = list(self._write(scored).unbind(0))
        except Exception as error:
            self._outcome = error
        self._future = self._previous = None


class Handle:
    """One sample of a :class:`Step`, in a batch."""

    def __init__(self, step: Step, row: int) -> None:
        self.step = step
        self.row = row

    def __repr__(self) -> str:
        return f"<row {self.row} of env step {self.step.number}, not filled in>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self  # a copied batch shares the scores

    def __reduce__(self) -> Any:
        raise OptionError(
            f"this batch waits for scores of this process ({self!r}) and cannot be pickled or sent to "
            "another process: call vllm_kl.fill_deferred(batch) first"
        )


class Deferral:
    """Submits the steps of one transform to a thread. A copied or unpickled one starts empty.

    Args:
        until: ``True``: the collector fills a batch in when the batch leaves it. ``"buffer"``: the user calls
            :func:`fill_deferred`.
        on_two_references: see :class:`~vllm_kl.RetrieveKL`.
        finish: called with every batch that is filled in. It holds no transform and no env.
    """

    def __init__(
        self, until: Literal[True, "buffer"], on_two_references: OnStale, finish: Finish | None
    ) -> None:
        self.on_two_references = on_two_references
        self.finish = finish
        self.finishing = threading.Lock()  # several threads may fill batches in
        self._until = until
        self._worker = _Worker()
        self._last: Callable[[], Step | None] = lambda: None
        self._num_steps = 0

    @classmethod
    def of(
        cls,
        deferred: Deferred,
        ref_model: Any,
        *,
        detach: bool,
        on_two_references: OnStale,
        finish: Finish | None,
    ) -> Deferral | None:
        """Return the deferral that ``RetrieveKL(deferred=...)`` asks for; ``None`` for ``False``.

        Raises:
            OptionError: ``deferred`` does not exist or would have no effect: the reference uses a
                ``vllm.LLM`` of this process, or the user wants a graph.
        """
        if not any(deferred is choice for choice in (True, False)) and deferred != "buffer":
            choices = ", ".join(map(repr, get_args(Deferred)))
            raise OptionError(f"deferred={deferred!r} does not exist; choose one of {choices}")
        if deferred is False:
            return None
        if not detach:
            raise OptionError("deferred results have no graph: pass detach=True, or deferred=False")
        engine = getattr(scorer_for(ref_model), "_engine", None)
        if isinstance(engine, GenerateEngine) and engine.weights is not None:
            # vLLM 0.32: LLM.generate is not safe in two threads, and a process has one forward context.
            raise OptionError(
                "deferred has no effect with a reference on a vllm.LLM of this process: it cannot score "
                "while this or another vllm.LLM here generates.\nGive the reference an engine of its own "
                "(VLLMReference(path)), or pass deferred=False"
            )
        return cls(deferred, on_two_references, finish)

    def __reduce__(self) -> tuple[type[Deferral], tuple[Any, ...]]:
        return Deferral, (self._until, self.on_two_references, self.finish)

    def submit(
        self,
        transform: TokensTransform,
        next_td: TensorDictBase,
        side: Side,
        batch: TokenBatch,
        *,
        temperature: float,
        expected_version: int | None,
        reward_waits: bool,
        write: Write,
    ) -> TensorDictBase:
        """Let the thread score a step; return ``next_td``, ``[B]``, with handles instead of results.

        Args:
            transform: whose step it is.
            next_td: the step's ``next``.
            side: the reference.
            batch: the tokens.
            temperature: of the log-probs.
            expected_version: the version of the reference's weights now. The thread refuses another version
                when it scores. ``None``: not known.
            reward_waits: the KL will be subtracted from the reward, so the reward is NaN until then.
            write: writes the results into a tensordict that has the reward, if there is one.

        Raises:
            CollectorError: no collector could fill the batch in.
            OptionError: this is no env's step, or a later transform of the env would read the reward too
                early.
        """
        if not transform._is_step:
            raise OptionError(
                "deferred has an effect at an env's steps only: a batch is filled in by "
                "vllm_kl.fill_deferred(batch)"
            )
        collector = transform._collector()
        if self._until is True and not on_leaving(collector, fill_deferred):
            what = (
                "there is no collector"
                if collector is None
                else f"a {type(collector).__name__} has no postproc"
            )
            raise CollectorError(
                f"deferred=True fills in the batches that leave a collector, but {what}.\n"
                f"{where_to_stand()}; or pass deferred='buffer' and call vllm_kl.fill_deferred(batch); or "
                "pass deferred=False"
            )
        if reward_waits:
            _check_later(transform)
        reward = rows_of(next_td, "reward") if reward_waits else None
        previous = self._last()
        step = Step(
            self._num_steps,
            self,
            self._worker.submit(
                functools.partial(
                    _score_step,
                    side,
                    batch,
                    temperature,
                    expected_version if self.on_two_references == "raise" else None,
                )
            ),
            functools.partial(_write_apart, write, reward, len(batch), next_td.device),
            None if previous is None or previous.is_finished else previous,
        )
        self._num_steps += 1
        self._last = weakref.ref(step)
        waiting = [row.get_non_tensor(PENDING, default=()) for row in next_td.unbind(0)]
        handles = [NonTensorData((*others, Handle(step, i))) for i, others in enumerate(waiting)]
        next_td = set_rows(next_td, PENDING, handles)
        if reward is not None:
            next_td = set_rows(
                next_td, "reward", [torch.full_like(row, torch.nan, dtype=torch.float32) for row in reward]
            )
        return next_td


class _Worker:
    """Runs tasks in one thread, in order. The thread ends when no task is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._is_running = False

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._work.append((future, work))
            if not self._is_running:
                threading.Thread(target=self._run, name="vllm_kl-deferred", daemon=True).start()
                self._is_running = True
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._is_running = False
                    return
                future, work = self._work.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # the caller that waits must get any error
                    future.set_exception(error)
            del future, work  # else they live until the next task comes


def fill_deferred(td: TensorDictBase) -> TensorDictBase:
    """Wait for the results of ``RetrieveKL(..., deferred=...)`` and put them in the place of the handles.

    With ``deferred=True`` the collector calls this for every batch. With ``deferred="buffer"`` call it
    yourself, or append it to a replay buffer: ``buffer.append_transform(fill_deferred, invert=True)``.
    Samples without handles stay as they are.

    Args:
        td: a batch of any shape, from a collector or ``env.rollout``.

    Returns:
        The batch with results.

    Raises:
        VLLMKLError: scoring failed; the error has its original type and names the sample and the env step.
            ``td`` is as it was.
        WeightsError: the batch would have scores of two versions of the reference, or the reference was
            refreshed between submitting a step and scoring it.

    >>> fill_deferred(TensorDict(tokens=[[5, 6]], batch_size=1))["tokens"]  # has no handles
    tensor([[5, 6]])
    """
    next_td = td.get("next", default=None)
    filled, owners = _fill(td if next_td is None else next_td)
    if next_td is None:
        return filled
    td = td.set("next", filled)
    for owner in owners:
        td = td if owner.finish is None else owner.finish(td)
    return td


def _fill(td: TensorDictBase) -> tuple[TensorDictBase, list[Deferral]]:
    """Fill in the tensordict that has the handles; return it, and whose handles it had."""
    shape = td.batch_size
    samples = list((td.reshape(-1) if shape else lazy_stack([td])).unbind(0))
    waiting: list[tuple[Handle, ...]] = [sample.get_non_tensor(PENDING, default=()) for sample in samples]
    if not any(waiting):
        return td, []
    results = [
        [_result(handle, i, shape, waiting) for handle in handles] for i, handles in enumerate(waiting)
    ]
    _check_one_version(waiting, shape)
    for i, entries in enumerate(results):
        if entries:
            samples[i] = samples[i].exclude(PENDING)
            for entry in entries:
                samples[i].update(entry)
    owners = list(dict.fromkeys(handle.step.owner for handles in waiting for handle in handles))
    return lazy_stack(samples).view(shape) if shape else samples[0], owners


def _result(handle: Handle, i: int, shape: torch.Size, waiting: list[tuple[Handle, ...]]) -> TensorDictBase:
    """Return the results of one sample; an error names the sample and the env step."""
    try:
        return handle.step.results()[handle.row]
    except Exception as error:
        rows = {h.row: i for i, handles in enumerate(waiting) for h in handles if h.step is handle.step}
        where = (
            f"env step {handle.step.number}, of which this batch has sample {index_in_batch(i, shape)} and "
            "maybe more"
        )
        row = getattr(error, "sample", None)
        if row is not None:
            at = rows.get(row)
            found = "not in this batch" if at is None else f"sample {index_in_batch(at, shape)} of this batch"
            where = f"row {row} of env step {handle.step.number}: {found}"
        if isinstance(error, VLLMKLError):
            raise type(error)(f"{where}: {error}") from error
        error.add_note(f"vllm_kl: {where}")
        raise error from None


def _check_one_version(waiting: list[tuple[Handle, ...]], shape: torch.Size) -> None:
    """Refuse a batch with scores of two versions of one reference."""
    first: dict[object, tuple[int, int | str | None]] = {}
    for i, handle in ((i, handle) for i, handles in enumerate(waiting) for handle in handles):
        before, version = first.setdefault(handle.step.owner, (i, handle.step.version))
        if version != handle.step.version:
            owner = handle.step.owner
            two_references(
                index_in_batch(before, shape),
                version,
                index_in_batch(i, shape),
                handle.step.version,
                owner.on_two_references,
            )
            return


def _score_step(side: Side, batch: TokenBatch, temperature: float, expected_version: int | None) -> Scored:
    """Score a step, in the thread.

    The function gets no transform and no env, so that none of them is deleted in the thread.
    """
    now = getattr(side, "temperature", temperature)
    if not is_same_temperature(now, temperature):
        raise OptionError(
            f"the reference's temperature was changed from {temperature:g} to {now:g} after this step was "
            "submitted and before it was scored. Fill batches in (fill_deferred) before you change it"
        )
    scored = side_log_probs(side, batch, TensorDict(), None, temperature=temperature, detach=True)
    if expected_version is not None and scored.origin.version != expected_version:
        raise WeightsError(
            f"the reference was refreshed after this step was submitted for version {expected_version}: it "
            f"was scored by version {scored.origin.version}. Fill batches in (fill_deferred) before a refresh"
        )
    return scored


def _write_apart(
    write: Write,
    reward: list[torch.Tensor] | None,
    num_samples: int,
    device: torch.device | None,
    scored: Scored,
) -> TensorDictBase:
    """Write a step's results into a new tensordict that has the step's reward."""
    rows = [{} if reward is None else {"reward": reward[i]} for i in range(num_samples)]
    return write(lazy_stack([TensorDict(row, device=device) for row in rows]), scored)


def _check_later(transform: Transform) -> None:
    """Refuse an env whose later transforms use the reward: they would see it without the KL."""
    transforms = [
        module for module in transform.container.transform.modules() if isinstance(module, Transform)
    ]
    for other in transforms[transforms.index(transform) + 1 :]:
        if "reward" in (*other.in_keys, *other.out_keys):
            raise OptionError(
                f"{type(other).__name__} uses the reward and comes after a deferred KL that changes the "
                "reward: it would see the reward without the KL.\nAppend it before the KL, make it the "
                "collector's postproc, or pass add_to_reward=False or deferred=False"
            )
