"""Checks a trainer's weights against the engine's model, and writes them to shared memory as a checkpoint.

transformers' ``save_pretrained`` writes the checkpoint. It handles tied weights, shards, and tensors whose
names on disk differ from those in the model. A copy of the model on the ``meta`` device, which needs no
memory, says which tensors a state dict must have.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from vllm_kl import fingerprint, lifetime
from vllm_kl.errors import WeightsError
from vllm_kl.plugin.second_model import quantization_of
from vllm_kl.weights.state_dict import as_state_dict

logger = logging.getLogger("vllm_kl")

StateDict = Mapping[str, torch.Tensor]
# The language model inside a multimodal model: "model.language_model.layers.0" (transformers 5) and
# "language_model.model.layers.0" (checkpoints before 4.52) are "model.layers.0" of the language model alone.
_WHERE_TEXT_LIES = re.compile(r"^((model|language_model|text_model|thinker)\.)+")

# Settings of a model that change its log-probs with the same weights.
_COMPUTED_WITH = re.compile(
    r"eps|rope|rotary|scal(e|ing)|softcap|multiplier|sliding_window$|^layer_types|hidden_act|activation_func|topk|per_tok|alibi|"
    r"num_(attention|key_value)_heads"
)


class Checkpoint:
    """A folder of weights. With ``is_ours`` the folder is deleted with the last reference to this object."""

    def __init__(self, folder: Path, *, is_ours: bool = False) -> None:
        self.folder = folder
        self._delete = weakref.finalize(self, lifetime.remove, folder) if is_ours else None

    @property
    def for_workers(self) -> str:
        """What the workers need to load it."""
        return str(self.folder)

    def delete(self) -> None:
        """Delete the folder now, if it is ours."""
        if self._delete is not None:
            self._delete()


class Identity(NamedTuple):
    """What tells weight files from others."""

    written_ns: int  # when the last one was written
    fingerprint: str | None

    def is_of(self, other: Identity | None) -> bool:
        """Whether these are the same files, or a copy of them on another machine."""
        return other is not None and (self == other or self.fingerprint == other.fingerprint)


class InitialCheckpoint:
    """The checkpoint that an engine starts with: version 0, unless a program writes over the files.

    Args:
        model: the path of the checkpoint, or its name on the hub, where files do not change.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._files = self._stamps()

    def unchanged(self) -> str:
        """Return the path or name.

        Raises:
            WeightsError: the files have changed since this object was made.
        """
        if self._stamps() != self._files:
            raise WeightsError(
                f"the weight files in {self.model!r} have changed since the engine was started, so they are "
                "not the weights of version 0.\n"
                "Let the trainer save to another folder. refresh(source) without ema= needs no old weights"
            )
        return self.model

    @property
    def written(self) -> str | None:
        """The size of the weight files, and when they were last written; ``None``: no local files."""
        if not self._files:
            return None
        last = datetime.datetime.fromtimestamp(max(file[2] for file in self._files) / 1e9)
        return f"{sum(file[1] for file in self._files)} bytes, written {last}"

    @property
    def identity(self) -> Identity | None:
        """What tells the files from others, on any machine; ``None``: no local files."""
        if not self._files:
            return None
        return Identity(max(file[2] for file in self._files), fingerprint.of_model(self.model))

    def _stamps(self) -> list[tuple[str, int, int]]:
        folder = Path(self.model)
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        return [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


class Skeleton:
    """The names and shapes of the tensors of an engine's model; checks, reads and writes state dicts.

    The state dict of a multimodal model may have the whole model or the language model alone, with the names
    of either.

    Args:
        model: path or name of the engine's model.
        revision, trust_remote_code, hf_overrides: the engine's options.

    Raises:
        WeightsError: transformers has no causal language model of this kind.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        hf_overrides: Any = None,
    ) -> None:
        self._source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        self._name = model
        try:
            config = transformers.AutoConfig.from_pretrained(model, **self._source)
            config.update(hf_overrides if isinstance(hf_overrides, dict) else {})
            with torch.device("meta"):
                self._model = _auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        except AssertionError as error:  # the changed classes need the config of an engine (vLLM 0.32)
            raise WeightsError(
                f"in this process vLLM's transformers backend has changed the classes of {model!r}, so "
                "transformers cannot say which weights the model has. Run the engine in another process: "
                "VLLM_ENABLE_V1_MULTIPROCESSING=1, or VLLMScorer(path)"
            ) from error
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"transformers cannot say which weights {model!r} has ({error}): only a model that "
                "AutoModelForCausalLM knows can be updated from a state dict"
            ) from error
        self._quantization = quantization_of(config)
        self._is_overridden = bool(hf_overrides)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        # TensorDict.from_module has these buffers as well; a checkpoint does not.
        self._computed = {name for name, _ in self._model.named_buffers()} - self._shapes.keys()
        self._tied: dict[str, str] = dict(self._model.all_tied_weights_keys)
        # Vision and audio towers, and the layers between them and the language model.
        self._towers = self._shapes.keys() - _names_of_text(self._model)
        self._by_text_name = {_text_name(name): name for name in self._shapes}
        self._has_told_of_towers = False

    def checked(self, source: Any) -> dict[str, torch.Tensor]:
        """Return the tensors of a state dict, detached.

        Args:
            source: an argument of :func:`vllm_kl.weights.state_dict.as_state_dict`. Tied weights may be left
                out.

        Raises:
            WeightsError: ``source`` cannot be made a plain state dict; tensors are missing, unknown, or have
                another shape; numbers are not finite; or tied weights differ. The message names the tensors.
                Or the engine's checkpoint is quantised. Nothing was sent.
        """
        self._refuse_if_quantized()
        required = self._shapes.keys() - self._tied.keys()
        given = {
            k: tensor for k, tensor in as_state_dict(source, required).items() if k not in self._computed
        }
        if self._towers:
            given = self._of_the_whole_model(given)
        is_text_alone = self._towers.isdisjoint(given)
        missing = sorted(required - given.keys() - (self._towers if is_text_alone else set()))
        extra = sorted(given.keys() - self._shapes.keys())
        if missing or extra:
            parts = {"missing": missing, "unknown": extra}
            found = ", ".join(f"{what} {_list(names)}" for what, names in parts.items() if names)
            raise WeightsError(
                f"the state dict is not of the engine's model: {found}. Expected the names of transformers' "
                "state_dict()"
            )
        for name, tensor in given.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise WeightsError(
                    f"{name}: got shape {list(tensor.shape)}, expected {list(self._shapes[name])}"
                )
            # The smallest and largest number show NaN and infinities: one pass, without a mask of the
            # tensor's size.
            if not torch.stack(tensor.aminmax()).isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                raise WeightsError(
                    f"{name}: {bad} of {tensor.numel()} numbers are not finite. Training has diverged; "
                    "nothing was touched"
                )
        for name, other in self._tied.items():
            if name not in given:
                continue
            same = given[name].data_ptr() == given[other].data_ptr()
            if not same and not torch.equal(given[name], given[other]):
                raise WeightsError(f"{name} and {other} are tied in the engine's model but differ here")
            given.pop(name)
        if self._towers and is_text_alone and not self._has_told_of_towers:
            self._has_told_of_towers = True
            names = _list(sorted(self._towers))
            logger.warning(
                "vllm_kl: the state dict has the language model only; these weights stay as they are: %s",
                names,
            )
        return given

    def _refuse_if_quantized(self) -> None:
        if self._quantization:
            raise WeightsError(
                f"the checkpoint of {self._name!r} is quantised ({self._quantization}): its engine has no "
                "place for the weights of a state dict.\n"
                "Serve an unquantised checkpoint (vLLM quantises it with the engine option "
                "quantization=...); or quantise the trained model in the same way, and make a new engine "
                "with it"
            )

    def _of_the_whole_model(self, given: StateDict) -> dict[str, torch.Tensor]:
        """Return the tensors with the names that they have in the whole multimodal model."""
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in given.items():
            ours = name if name in self._shapes else self._by_text_name.get(_text_name(name), name)
            if ours in renamed:
                raise WeightsError(
                    f"{name}: the state dict has the tensor {ours} of the engine's model twice, under two "
                    "names"
                )
            renamed[ours] = tensor
        return renamed

    def read(self, source: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
        """Return the checked tensors of a checkpoint in float32.

        The engine's own model is read in the engine's revision.

        Raises:
            WeightsError: transformers cannot read the checkpoint; or it is of another model: it has other
                tensors, or another configuration.
        """
        self._refuse_if_quantized()
        options = self._source if os.fspath(source) == self._name else {**self._source, "revision": "main"}
        try:
            with _no_bars():
                config = transformers.AutoConfig.from_pretrained(source, **options)
                if not self._is_overridden:
                    refuse_another_model(self._model.config, config, os.fspath(source))
                auto_class = _auto_class(config)
                model, found = auto_class.from_pretrained(
                    source,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **options,
                )
        except WeightsError:
            raise
        except Exception as error:  # SafetensorError, RuntimeError, ImportError: each reader raises its own
            raise WeightsError(
                f"{os.fspath(source)!r} is no checkpoint that transformers can read: {error}"
            ) from error
        for name, here, expected in sorted(found["mismatched_keys"]):
            raise WeightsError(
                f"{os.fspath(source)!r}: {name} has shape {list(here)}, its configuration says "
                f"{list(expected)}"
            )
        # transformers fills tensors that the checkpoint lacks with random numbers.
        return self.checked({k: v for k, v in model.state_dict().items() if k not in found["missing_keys"]})

    def as_in_files(self, state: StateDict) -> StateDict:
        """Return checked tensors with the names and shapes that they have in a checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        ignored = self._model._keys_to_ignore_on_save or ()
        return revert_weight_conversion(self._model, {k: v for k, v in state.items() if k not in ignored})

    def write(self, state: StateDict) -> Checkpoint:
        """Write checked tensors to shared memory, if they fit, and else to the folder of temporary files.

        Raises:
            WeightsError: there is no room.
        """
        size_bytes = sum(t.numel() * t.element_size() for t in state.values())
        folder = new_folder(size_bytes)
        checkpoint = Checkpoint(folder, is_ours=True)  # also deletes the folder if an interrupt comes
        try:
            with _no_bars():
                self._model.save_pretrained(
                    folder, state_dict=_each_its_own(state), max_shard_size=size_bytes + 1
                )
        except (OSError, SafetensorError) as error:
            checkpoint.delete()
            raise WeightsError(
                f"{size_bytes:,} bytes of weights could not be written to {folder.parent} ({error}); nothing "
                "was touched. Make room there (a container's --shm-size), or set TMPDIR to a folder with "
                "room"
            ) from error
        return checkpoint


def skeleton_of(config: Any) -> Skeleton:
    """Return the skeleton of the model that vLLM's ``ModelConfig`` or ``EngineArgs`` names."""
    return Skeleton(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        hf_overrides=config.hf_overrides,
    )


def _each_its_own(state: StateDict) -> dict[str, torch.Tensor]:
    """Return tensors that do not overlap in memory: those that the trainer shares are cloned."""
    ends: dict[tuple[torch.device, int], int] = {}
    own = {}
    for name, tensor in sorted(
        state.items(), key=lambda item: item[1].storage_offset() * item[1].element_size()
    ):
        start = int(tensor.storage_offset()) * tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        where = (tensor.device, tensor.untyped_storage().data_ptr())
        own[name] = tensor.clone() if start < ends.get(where, 0) else tensor
        ends[where] = max(ends.get(where, 0), start + (last + 1) * tensor.element_size())
    return own


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def complete(folder: Path, model: str) -> Path:
    """Link a model's configuration and code into a folder of weights; return the folder.

    Args:
        folder: the folder of weights.
        model: the path of the model, or its name on the hub; the engine's start has left a copy of the files
            here.
    """
    config = Path(cast("str", cached_file(model, "config.json")))
    for file in config.parent.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())
    return folder


def refuse_another_model(ours: Any, theirs: Any, source: str) -> None:
    """Refuse a checkpoint whose configuration gives other log-probs than the engine's with the same weights.

    Args:
        ours, theirs: the configurations of the engine's model and of the checkpoint.
        source: the checkpoint, for the message.

    Raises:
        WeightsError: a setting differs. The message names the first one.
    """
    ours, theirs = (config.get_text_config().to_dict() for config in (ours, theirs))
    for name in sorted(ours.keys() & theirs.keys()):
        if _COMPUTED_WITH.search(name) and ours[name] != theirs[name]:
            raise WeightsError(
                f"{source!r} is another model: its configuration has {name}={theirs[name]!r}, the engine's "
                f"{ours[name]!r}, and a load of weights does not change the configuration. Make a new engine "
                "with this checkpoint"
            )


def _auto_class(config: Any) -> Any:
    """Return transformers' class for a whole model: the language model with its vision and audio towers."""
    is_multimodal = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    return transformers.AutoModelForMultimodalLM if is_multimodal else transformers.AutoModelForCausalLM


def _names_of_text(model: Any) -> set[str]:
    """Return the names of the language model's tensors: all names, unless the model is multimodal."""
    kind = type(model.config.get_text_config())
    # modules() gives the outermost such module first.
    text = next(module for module in model.modules() if type(getattr(module, "config", None)) is kind)
    parts = {id(module) for module in (*text.modules(), model.get_output_embeddings())}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if id(module) in parts
        for name in (*module._parameters, *module._buffers)
    }


def _text_name(name: str) -> str:
    return _WHERE_TEXT_LIES.sub("", name)


def average(old: StateDict, new: StateDict, decay: float) -> dict[str, torch.Tensor]:
    """Return ``decay * old + (1 - decay) * new`` in float32; of integer tensors the new ones."""
    return {
        name: old[name].float().lerp(tensor.to(old[name].device).float(), 1 - decay)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in new.items()
    }


def next_version(current: int, version: int | None) -> int:
    """Return the version of new weights: ``version``, or the number after the current version.

    Raises:
        WeightsError: ``version`` is not above the current version. A comparison of versions tells which
            tokens are old.
    """
    if version is None:
        return current + 1
    if isinstance(version, bool) or not isinstance(version, int) or version <= current:
        raise WeightsError(f"version={version!r}: expected an int above {current}, the engine's version")
    return version


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def new_folder(size_bytes: int) -> Path:
    """Return a new folder in shared memory or, if there is no room, in the folder of temporary files."""
    parent = Path(tempfile.gettempdir())
    if lifetime.SHARED_MEMORY.is_dir():
        lifetime.remove_orphans()
        if shutil.disk_usage(lifetime.SHARED_MEMORY).free > 1.05 * size_bytes:
            parent = lifetime.SHARED_MEMORY
    return lifetime.new_folder(parent)


@contextmanager
def _no_bars() -> Iterator[None]:
    bars: Any = transformers.utils.logging
    was_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()
