"""``RayScorer`` scores through a Ray actor, which holds the reference's engine: a service.

The caller sends token ids and gets log-probs back. Ray places, names and restarts the actor:

    a named service     one in a cluster: all processes that give the name share its engine
        lives           while a process uses it, and ``idle_timeout_s`` longer; or until it is closed
        dies            Ray restarts it; its users check that the new one serves the same weights
    an actor without a name has one user, and ends with it
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import ray
import torch

from vllm_kl.errors import EngineError, FrozenError, OptionError
from vllm_kl.ray_address import check_address
from vllm_kl.transforms.reference_settings import Proof, Served, differences
from vllm_kl.transforms.service_options import IDLE_TIMEOUT_S, ServiceOptions
from vllm_kl.types import EngineInfo, Scorer, ScoreStats

logger = logging.getLogger("vllm_kl")

NAMESPACE = "vllm_kl"  # of all named services: without one, each driver has a namespace of its own
DEFAULTS = {
    "num_cpus": 1,
    "num_gpus": 0,
    "max_concurrency": 16,  # calls that share the engine's batches
    "max_restarts": 3,
    "idle_timeout_s": IDLE_TIMEOUT_S,
}
_GIVE_UP_S = 20.0  # how long a name may belong to an actor that is ending
_BEATS = 4  # per idle_timeout_s
_NOTE_AFTER_S = 60.0


class Build(Protocol):
    """Makes the reference of a service, in the service's process."""

    def __call__(self) -> Served: ...

    def settings_beside(self, running: Served) -> dict[str, Any] | None:
        """Return the settings of what this would make; ``None``: they cannot be known."""
        ...


class _Welcome(NamedTuple):
    """What a service tells a new user."""

    attributes: dict[str, Any]
    life: str
    proof: Proof
    idle_timeout_s: float | None
    differ: list[str]  # how it differs from what the user asked for
    unknown: str | None  # the class of a scorer whose settings cannot be compared


class _Service:
    """Runs in the actor's process and holds the scorer.

    Args:
        build: makes the reference; called by the first call, and again after the engine or the actor died.
        options: the options of the actor, ``DEFAULTS`` included.
        creator: a token of the caller that made the actor.
        name: a named service ends by itself after ``options["idle_timeout_s"]``.
    """

    def __init__(self, build: Build, options: dict[str, Any], creator: str, name: str | None) -> None:
        self._build, self._options, self._creator, self._name = build, options, creator, name
        self._served: Served | None = None
        self._life = ""  # names one load of the reference
        self._building, self._alone = threading.Lock(), threading.Lock()
        self._using, self._num_calls, self._last_use, self._is_ending = threading.Lock(), 0, 0.0, False
        if name is not None and options["idle_timeout_s"] is not None:
            me = ray.get_runtime_context().current_actor
            self._last_use = time.monotonic()
            threading.Thread(target=self._end_when_idle, args=(me,), daemon=True).start()

    # Methods of the group "life" do not wait for calls that score.

    @ray.method(concurrency_group="life")
    def start(self) -> None:
        """Make the reference, if there is none."""
        with self._in_use():
            self._ready()

    @ray.method(concurrency_group="life")
    def join(self, build: Build | None, given: Mapping[str, Any], caller: str) -> _Welcome:
        with self._in_use():
            served, life = self._ready()
            differ: list[str] = []
            unknown = None
            if caller != self._creator:
                differ = differences({name: self._options.get(name) for name in given}, given)
                if build is not None:
                    asked = None if served.settings is None else build.settings_beside(served)
                    if asked is None:
                        unknown = type(served.scorer).__name__
                    else:
                        differ = differences(served.settings, asked) + differ
            idle_s = self._options["idle_timeout_s"]
            return _Welcome(served.attributes, life, served.proof, idle_s, differ, unknown)

    @ray.method(concurrency_group="life")
    def is_made_by(self, caller: str) -> bool:
        """Whether this caller made the actor: only then may the caller end it."""
        return caller == self._creator

    @ray.method(concurrency_group="life")
    def beat(self) -> None:
        """A process that uses the service lives."""
        with self._in_use():
            pass

    @ray.method(concurrency_group="life")
    def of_the_scorer(self, name: str, default: Any) -> Any:
        with self._in_use():
            return getattr(self._ready()[0].scorer, name, default)

    def score(
        self, token_ids: list[np.ndarray], start: list[int], entropy: bool
    ) -> tuple[list[np.ndarray], list[np.ndarray], ScoreStats | None, str, Proof]:
        with self._in_use():
            served, life = self._ready()
            ids = [torch.from_numpy(row.copy()) for row in token_ids]
            with torch.no_grad():
                try:
                    scored, entropies, stats = self._score(served.scorer, ids, start, entropy)
                except EngineError as error:
                    if not self._forget(served):
                        raise
                    raise EngineError(
                        f"the engine of {_called(self._name)} died. The log-probs of this call are lost; the "
                        f"next call starts another engine.\n{error}"
                    ) from error
            return _arrays(scored), _arrays(entropies), stats, life, served.proof

    def _score(
        self, scorer: Scorer, ids: list[torch.Tensor], start: list[int], entropy: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], ScoreStats | None]:
        if entropy:
            return scorer.score_entropy_and_tell(ids, start)
        if hasattr(scorer, "score_and_tell"):  # a VLLMScorer: threads share its engine's batches
            scored, stats = scorer.score_and_tell(ids, start)
            return scored, [], stats
        with self._alone:
            return scorer.score(ids, start), [], None

    def _ready(self) -> tuple[Served, str]:
        with self._building:
            if self._served is None:
                is_again = self._life != "" or ray.get_runtime_context().was_current_actor_reconstructed
                try:
                    self._served = self._build()
                except Exception as error:
                    if not is_again:
                        raise
                    raise EngineError(
                        f"{_called(self._name)} died, and could not be started again: {error}"
                    ) from error
                self._life = uuid.uuid4().hex
            return self._served, self._life

    def _forget(self, served: Served) -> bool:
        """Forget a reference whose engine is dead; tell whether it is."""
        is_dead = not getattr(getattr(served.scorer, "_engine", None), "is_open", True)
        with self._building:
            if is_dead and self._served is served:
                self._served = None
        return is_dead

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._using:
            is_ending = self._is_ending
            self._num_calls += 1
        if is_ending:
            threading.Event().wait()  # the actor is killed in a moment; its callers see that
        try:
            yield
        finally:
            with self._using:
                self._num_calls -= 1
                self._last_use = time.monotonic()

    def _end_when_idle(self, me: Any) -> None:
        idle_s = self._options["idle_timeout_s"]
        while True:
            time.sleep(min(idle_s / _BEATS, 5.0))
            with self._using:
                if not self._num_calls and time.monotonic() - self._last_use > idle_s:
                    self._is_ending = True
                    break
        if self._served is not None and hasattr(self._served.scorer, "close"):
            self._served.scorer.close()
        ray.kill(me, no_restart=True)


class RayScorer:
    """Scores through a Ray actor.

    Args:
        build: makes the reference, in the actor. ``None``: use a service that exists.
        service: the actor's name and options. A service that already has this name is shared: what ``build``
            would make is compared with what it serves.

    Raises:
        EngineError: there is no such service, or it died.
        OptionError: the service that has this name serves another reference, or has other options.
    """

    def __init__(self, build: Build | None, service: ServiceOptions) -> None:
        self._name = service.actor_name
        self.stats: ScoreStats | None = None
        _join_ray(service.ray_init_config, must_run=build is None, name=self._name)
        caller = uuid.uuid4().hex
        self._actor = self._connect(build, service, caller)
        welcome = self._get(self._actor.join.remote(build, service.given, caller))
        self._check_welcome(welcome)
        self.attributes, self._life = welcome.attributes, welcome.life
        self._proof, self._version = welcome.proof, welcome.proof.version
        if self._name is not None and welcome.idle_timeout_s is not None:
            every_s = welcome.idle_timeout_s / _BEATS
            threading.Thread(
                target=_beat, args=(weakref.ref(self), every_s), name="vllm_kl-beat", daemon=True
            ).start()

    def _connect(self, build: Build | None, service: ServiceOptions, caller: str) -> Any:
        """Return an actor that is ready. If it is ending, wait until its name is free."""
        deadline = time.monotonic() + _GIVE_UP_S
        while True:
            actor = _find(self._name) if build is None else _make(build, service, caller)
            try:
                self._wait(actor.start.remote(), service)
                return actor
            except ray.exceptions.RayTaskError as error:
                with contextlib.suppress(ray.exceptions.RayActorError):
                    if ray.get(actor.is_made_by.remote(caller)):
                        ray.kill(actor)  # it serves nothing; callers that wait for it make another
                raise error.cause from error
            except ray.exceptions.RayActorError as error:
                if build is None or self._name is None or time.monotonic() > deadline:
                    raise self._gone(error) from error
                time.sleep(0.2)

    def _wait(self, started: Any, service: ServiceOptions) -> None:
        if not ray.wait([started], timeout=_NOTE_AFTER_S)[0]:
            logger.warning(
                "vllm_kl: %s is not ready yet. It loads its model, or Ray has no room for %s: free are %s",
                self,
                {"num_cpus": DEFAULTS["num_cpus"], **service.given},
                ray.available_resources(),
            )
        ray.get(started)

    def _check_welcome(self, welcome: _Welcome) -> None:
        if welcome.differ:
            raise OptionError(
                f"{self} exists and is another than you ask for: {'; '.join(welcome.differ)}.\n"
                "Give the same settings; or another actor_name; or no ref_model_factory and no options, to "
                "use what it serves; or end it for all its users, "
                f"VLLMReference.close_service({self._name!r})"
            )
        if welcome.unknown is not None:
            warnings.warn(
                f"{self} exists and is used as it is: its settings cannot be compared with those of this "
                f"factory, because it scores with a {welcome.unknown}. Only those of a VLLMReference that "
                "owns its engine can. Leave ref_model_factory out to use a service that exists",
                stacklevel=6,  # the caller of RetrieveKL
            )

    @property
    def why_no_push(self) -> str:
        """Why ``push_weights`` cannot replace these weights, and how to get others."""
        end = "Make the transform again, with a factory that loads other weights"
        if self._name is not None:
            end = (
                f"End it for all its users, VLLMReference.close_service({self._name!r}), and make the "
                "transform again, with a factory that loads other weights"
            )
        return f"the weights of {self} cannot be replaced: it is frozen.\n{end}"

    @property
    def weight_version(self) -> int | None:
        """The version of the weights that the actor serves; ``None``: not known."""
        return self._get(self._actor.of_the_scorer.remote("weight_version", None))

    @property
    def info(self) -> EngineInfo | None:
        """The properties of the actor's engine; ``None``: its scorer does not tell."""
        return self._get(self._actor.of_the_scorer.remote("info", None))

    @property
    def temperature(self) -> float:
        """The log-probs are those of ``softmax(logits / temperature)``."""
        return self._get(self._actor.of_the_scorer.remote("temperature", 1.0))

    def score(self, token_ids: list[Any], start: list[int]) -> list[torch.Tensor]:
        """Return B float32 CPU tensors ``[L - start]``, nats. Errors are those of the actor's scorer.

        Raises:
            EngineError: the actor died, and Ray could not restart it.
            FrozenError: the actor was restarted, and serves other weights than before.
        """
        return self.score_and_tell(token_ids, start)[0]

    def score_and_tell(
        self, token_ids: list[Any], start: list[int]
    ) -> tuple[list[torch.Tensor], ScoreStats | None]:
        """As :meth:`score`; also return this call's figures, or ``None`` if the actor's scorer has none."""
        scored, _, stats = self._ask(token_ids, start, entropy=False)
        return scored, stats

    def score_entropy_and_tell(
        self, token_ids: list[Any], start: list[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], ScoreStats | None]:
        """As :meth:`score_and_tell`, with the entropies of the same shapes, nats, between the two."""
        return self._ask(token_ids, start, entropy=True)

    def _ask(
        self, token_ids: list[Any], start: list[int], *, entropy: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], ScoreStats | None]:
        arrays = [np.asarray(ids) for ids in token_ids]
        call = self._actor.score.remote(arrays, list(start), entropy)
        scored, entropies, stats, life, proof = self._get(call)
        if life != self._life:
            self._check_restarted(proof)
            self._life = life
        if stats is not None and stats.weight_version is not None:
            self._version = stats.weight_version
        self.stats = stats  # for display only: other threads replace it
        return _tensors(scored), _tensors(entropies), stats

    def close(self) -> None:
        """End the actor and its engine, for all callers."""
        _end(self._actor)

    def __str__(self) -> str:
        return _called(self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> RayScorer:
        return self  # TorchRL copies transforms: the copy scores with the same engine

    def __reduce__(self) -> Any:
        known = self._life, self._proof, self._version
        if self._name is None:
            return _with_actor, (self._actor, self.attributes, *known)
        return _found_again, (self._name, ray.get_runtime_context().gcs_address, *known)

    def _check_restarted(self, proof: Proof) -> None:
        """Accept another load of the reference if it gives what the one before gave.

        Raises:
            FrozenError: it does not, or nothing proves it.
        """
        before = self._proof
        if proof.version != self._version:
            why = f"it served version {self._version} of the weights, and serves version {proof.version} now"
        elif None in (before.of_weights, proof.of_weights):
            why = "nothing proves that it serves the same weights (of a VLLMScorer the canary does)"
        elif proof.of_weights != before.of_weights:
            why = (
                "its weights are not those of before: the checkpoint was written over, or the kernels differ"
            )
        else:
            logger.warning("vllm_kl: %s died and was restarted. It serves the same weights", self)
            return
        raise FrozenError(
            f"{self} died and was restarted, but {why}. Its log-probs are of another reference, and were not "
            "used.\n"
            f"{self._cure()}"
        )

    def _cure(self) -> str:
        if self._name is None:
            return "Make the transform again, with its ref_model_factory"
        return (
            f"End it with VLLMReference.close_service({self._name!r}) if it still runs, and make the "
            "transform again with its ref_model_factory: that starts the service anew"
        )

    def _gone(self, error: Exception) -> EngineError:
        lost = "The log-probs of this call are lost, and nothing else: a reference is frozen."
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            return EngineError(
                f"{self} died during the call: {_reason(error)}\n{lost} Ray restarts it, and the next call "
                "waits for that"
            )
        return EngineError(f"{self} is gone: {_reason(error)}\n{lost} {self._cure()}")

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise self._gone(error) from error


def _arrays(rows: list[torch.Tensor]) -> list[np.ndarray]:
    return [row.float().cpu().numpy() for row in rows]


def _tensors(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array.copy()) for array in arrays]  # Ray's arrays cannot be written to


def _called(name: str | None) -> str:
    return "the reference's Ray actor" if name is None else f"the reference service {name!r}"


def _reason(error: Exception) -> str:
    """Return the sentences of Ray's error that say why an actor is gone."""
    if "OwnerDiedError" in str(error):
        return (
            "it died, and Ray could not restart it, because the process that made it is gone and its factory "
            "is too large for Ray to keep (100 KB: load the tokenizer inside of the factory)."
        )
    reason = re.split("Some common causes|The task may or may", str(error).splitlines()[-1])[0].strip()
    if "ray.kill" in reason:
        reason += " VLLMReference.close_service does that, and a service that nobody has used for long."
    return reason


def close_service(name: str) -> None:
    """End the named service and its engine, for all its users.

    Raises:
        EngineError: there is no such service.
    """
    _join_ray({}, must_run=True)
    _end(_find(name))


def _join_ray(config: Mapping[str, Any], *, must_run: bool, name: str | None = None) -> None:
    """Let this process join a Ray cluster; start one, unless the service must be in a running one.

    Raises:
        EngineError: no cluster runs, and the service must be in one; or none is at the given address.
    """
    if ray.is_initialized():
        return
    config = {"log_to_driver": False, "include_dashboard": False, **config}
    check_address(config.get("address"))
    if name is None and not must_run:  # an actor of this process alone
        ray.init(**config)
        return
    try:
        ray.init(**{"address": "auto", **config})
    except ConnectionError as error:
        if must_run or "address" in config:
            raise EngineError(
                f"this process is in no Ray cluster, so it finds no service: {error}.\nCall "
                "ray.init(address=...) first, or set RAY_ADDRESS"
            ) from error
        ray.init(**config)
        logger.warning(
            "vllm_kl: no Ray cluster was found, so this process started one, which ends with it.\nOther "
            "processes share the service %r only if all join one cluster: ray start --head, then "
            "ray.init(address='auto') in each",
            name,
        )


def _make(build: Build, service: ServiceOptions, caller: str) -> Any:
    """Return the handle of a new actor, or of the one that has this name."""
    options = {**DEFAULTS, **service.given}
    of_ray = {name: value for name, value in options.items() if name != "idle_timeout_s"}
    if of_ray["max_restarts"]:
        of_ray.setdefault("max_task_retries", 1)  # a call that ends the actor must not end it for ever
    if service.actor_name is not None:
        of_ray |= {
            "name": service.actor_name,
            "namespace": NAMESPACE,
            "get_if_exists": True,  # of two callers at once, one makes it
            "lifetime": "detached",  # it outlives the process that made it
        }
    remote = ray.remote(concurrency_groups={"life": 16})(_Service).options(**of_ray)
    return remote.remote(build, options, caller, service.actor_name)


def _find(name: str | None) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError as error:
        raise EngineError(
            f"there is no reference service {name!r} in this Ray cluster. Services that run: "
            f"{', '.join(_names()) or 'none'}.\nWith ref_model_factory a service is made"
        ) from error


def _names() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def _end(actor: Any) -> None:
    """Kill an actor, and wait until it is dead. Its engine ends with it."""
    ray.kill(actor, no_restart=True)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(actor.beat.remote())


def _beat(scorer: weakref.ref[RayScorer], every_s: float) -> None:
    """Tell a service that a user lives, as long as its scorer does."""
    while True:
        time.sleep(every_s)
        used = scorer()
        if used is None or not ray.is_initialized():
            return
        try:
            used._actor.beat.remote()
        except Exception:  # Ray was started anew, or Python is ending
            return
        del used


def _found_again(name: str, address: str, life: str, proof: Proof, version: int | None) -> RayScorer:
    scorer = RayScorer(None, ServiceOptions(actor_name=name, ray_init_config={"address": address}))
    scorer._life, scorer._proof, scorer._version = life, proof, version
    return scorer


def _with_actor(
    actor: Any, attributes: dict[str, Any], life: str, proof: Proof, version: int | None
) -> RayScorer:
    scorer = RayScorer.__new__(RayScorer)
    scorer._name, scorer._actor, scorer.attributes, scorer.stats = None, actor, attributes, None
    scorer._life, scorer._proof, scorer._version = life, proof, version
    return scorer
