"""A trainer's weights as a checkpoint that a vLLM engine can load: checked against the model, written to shared memory.

transformers does the writing: its ``save_pretrained`` knows tied weights, shards, and the names that a checkpoint on disk
has where the model's own differ. The skeleton of the model (no memory: the ``meta`` device) says which tensors there must be.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from vllm_kl import lifetime
from vllm_kl.errors import WeightsError
from vllm_kl.plugin.second_model import quantization_of
from vllm_kl.weights.state_dict import as_state_dict

logger = logging.getLogger("vllm_kl")

StateDict = Mapping[str, torch.Tensor]
# The language model inside a multimodal model: "model.language_model.layers.0" (transformers 5) and "language_model.model.layers.0"
# (checkpoints before 4.52) are "model.layers.0" of the language model alone.
_WHERE_TEXT_LIES = re.compile(r"^((model|language_model|text_model|thinker)\.)+")

# Settings of a model that change what it computes with the same weights.
_COMPUTED_WITH = re.compile(
    r"eps|rope|rotary|scal(e|ing)|softcap|multiplier|sliding_window$|^layer_types|hidden_act|activation_func|topk|per_tok|alibi|"
    r"num_(attention|key_value)_heads"
)


class Checkpoint:
    """A folder of weights. One that was made here is deleted when nobody holds it any more."""

    def __init__(self, folder: Path, *, is_ours: bool = False) -> None:
        self.folder = folder
        self._delete = weakref.finalize(self, lifetime.remove, folder) if is_ours else None

    def delete(self) -> None:
        """Delete the folder now, if it was made here."""
        if self._delete is not None:
            self._delete()


class Start:
    """The checkpoint that an engine is started with: its weights of version 0, as long as nobody writes there.

    Args:
        model: its path, or its name on the hub, where files do not change.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._files = self._stamps()

    def unchanged(self) -> str:
        """Return path or name.

        Raises:
            WeightsError: the files are others than when this was made.
        """
        if self._stamps() != self._files:
            raise WeightsError(
                f"the weight files in {self.model!r} have changed since the engine was started: they are not the weights of "
                "version 0 any more. Keep the starting checkpoint apart from where a trainer saves; refresh(source) without "
                "ema= needs no old weights"
            )
        return self.model

    def _stamps(self) -> list[tuple[str, int, int]]:
        folder = Path(self.model)
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        return [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]


class Skeleton:
    """What a model's state dict must hold.

    That of a multimodal model may hold the whole model, or its language model alone, under the names of either.

    Args:
        model: path or name of the engine's model.
        revision, trust_remote_code, hf_overrides: as the engine has them.

    Raises:
        WeightsError: transformers has no causal language model for it.
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
        except (
            AssertionError
        ) as error:  # the backend's classes ask for the configuration of an engine (vLLM 0.32)
            raise WeightsError(
                f"in this process vLLM's transformers backend has changed the classes of {model!r}, so transformers cannot say "
                "which weights it has. Let the engine have a process of its own: VLLM_ENABLE_V1_MULTIPROCESSING=1, or "
                "VLLMScorer(path)"
            ) from error
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"transformers cannot say which weights {model!r} has ({error}): only models that AutoModelForCausalLM knows can "
                "be updated from a state dict"
            ) from error
        self._quantization = quantization_of(config)
        self._is_overridden = bool(hf_overrides)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        # TensorDict.from_module gives these as well; no checkpoint holds them.
        self._computed = {name for name, _ in self._model.named_buffers()} - self._shapes.keys()
        self._tied: dict[str, str] = dict(self._model.all_tied_weights_keys)
        self._towers = self._shapes.keys() - _names_of_text(
            self._model
        )  # and what joins them to the language model
        self._by_text_name = {_text_name(name): name for name in self._shapes}
        self._has_told_of_towers = False

    def checked(self, source: Any) -> dict[str, torch.Tensor]:
        """Return the tensors of a state dict, detached, or refuse it.

        Args:
            source: what a training loop holds, as :func:`vllm_kl.weights.state_dict.as_state_dict` takes it. Tied weights may
                be left out.

        Raises:
            WeightsError: it cannot be made plain; missing, extra or misshapen tensors, numbers that are not finite, tied weights
                that differ. Names them. Or the engine's checkpoint is quantised. Nothing was sent.
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
            raise WeightsError(
                f"the state dict is not that of the engine's model: missing {_list(missing)}, unknown {_list(extra)}. "
                "Expected the names of transformers' state_dict()"
            )
        for name, tensor in given.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise WeightsError(
                    f"{name}: got shape {list(tensor.shape)}, expected {list(self._shapes[name])}"
                )
            # NaN and infinities show in the smallest and largest number: one pass, and no mask as large as the tensor.
            if not torch.stack(tensor.aminmax()).isfinite().all():
                bad = int((~tensor.isfinite()).sum())
                raise WeightsError(
                    f"{name}: {bad} of {tensor.numel()} numbers are not finite. Training has diverged; the engine was left alone"
                )
        for name, other in self._tied.items():
            if name not in given:
                continue
            same = given[name].data_ptr() == given[other].data_ptr()
            if not same and not torch.equal(given[name], given[other]):
                raise WeightsError(f"{name} and {other} are tied in the engine's model, but differ here")
            given.pop(name)
        if self._towers and is_text_alone and not self._has_told_of_towers:
            self._has_told_of_towers = True
            names = _list(sorted(self._towers))
            logger.warning(
                "vllm_kl: the state dict holds the language model alone; these stay as they are: %s", names
            )
        return given

    def _refuse_if_quantized(self) -> None:
        if self._quantization:
            raise WeightsError(
                f"the checkpoint of {self._name!r} is quantised ({self._quantization}): an engine that was started with it has no "
                "place for the weights of a state dict. Serve an unquantised checkpoint (with the engine option quantization=... "
                "vLLM quantises it itself), or quantise the trained model as this one was and make a new engine on it"
            )

    def _of_the_whole_model(self, given: StateDict) -> dict[str, torch.Tensor]:
        """Return the tensors under the names of the multimodal model, whichever part of it they were read from."""
        renamed: dict[str, torch.Tensor] = {}
        for name, tensor in given.items():
            ours = name if name in self._shapes else self._by_text_name.get(_text_name(name), name)
            if ours in renamed:
                raise WeightsError(
                    f"{name}: the state dict has {ours} of the engine's model twice, under two names"
                )
            renamed[ours] = tensor
        return renamed

    def read(self, source: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint in float32, checked; the engine's own model in the engine's revision.

        Raises:
            WeightsError: there is none that transformers can read, or it is another model's: other tensors, or the same in another
                configuration.
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
                f"{os.fspath(source)!r}: {name} has shape {list(here)}, its configuration says {list(expected)}"
            )
        # transformers draws random numbers for what the checkpoint lacks.
        return self.checked({k: v for k, v in model.state_dict().items() if k not in found["missing_keys"]})

    def write(self, state: StateDict) -> Checkpoint:
        """Write checked tensors where every process of this machine can map them: shared memory, if they fit.

        Raises:
            WeightsError: there was no room.
        """
        size_bytes = sum(t.numel() * t.element_size() for t in state.values())
        folder = _new_folder(size_bytes)
        checkpoint = Checkpoint(folder, is_ours=True)  # deletes it, too, when writing fails
        try:
            with _no_bars():
                self._model.save_pretrained(
                    folder, state_dict=_each_its_own(state), max_shard_size=size_bytes + 1
                )
        except (OSError, SafetensorError) as error:
            checkpoint.delete()
            raise WeightsError(
                f"{size_bytes:,} bytes of weights could not be written to {folder.parent} ({error}); the engine was left alone. "
                "Make room there (a container's --shm-size), or set TMPDIR to where there is room"
            ) from error
        return checkpoint


def _each_its_own(state: StateDict) -> dict[str, torch.Tensor]:
    """Return tensors of which no two overlap: what a trainer shares, or keeps interleaved, is written under all its names."""
    ends: dict[tuple[torch.device, int], int] = {}
    own = {}
    for name, tensor in sorted(
        state.items(), key=lambda item: item[1].storage_offset() * item[1].element_size()
    ):
        start = tensor.storage_offset() * tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        where = (tensor.device, tensor.untyped_storage().data_ptr())
        own[name] = tensor.clone() if start < ends.get(where, 0) else tensor
        ends[where] = max(ends.get(where, 0), start + (last + 1) * tensor.element_size())
    return own


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def complete(folder: Path, model: str) -> Path:
    """Give a folder of weights what else an engine reads from a model's: its configuration, its code; return the folder.

    Args:
        model: whose: its path, or its name on the hub, where the engine that was started with it has left a copy.
    """
    config = transformers.utils.cached_file(model, "config.json")
    for file in Path(config).parent.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file.resolve())
    return folder


def refuse_another_model(ours: Any, theirs: Any, source: str) -> None:
    """Refuse a checkpoint whose configuration computes otherwise than the engine's, which weights do not change.

    Args:
        ours, theirs: configurations of the engine's model and of the checkpoint.
        source: the checkpoint, for the message.

    Raises:
        WeightsError: names the first setting that differs.
    """
    ours, theirs = (config.get_text_config().to_dict() for config in (ours, theirs))
    for name in sorted(ours.keys() & theirs.keys()):
        if _COMPUTED_WITH.search(name) and ours[name] != theirs[name]:
            raise WeightsError(
                f"{source!r} is another model: its configuration has {name}={theirs[name]!r}, the engine's {ours[name]!r}, "
                "which no weights change. Make a new engine on it"
            )


def _auto_class(config: Any) -> Any:
    """Return transformers' class for the whole of a model: its language model, and what sees or hears for it."""
    is_multimodal = type(config) in transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING
    return transformers.AutoModelForMultimodalLM if is_multimodal else transformers.AutoModelForCausalLM


def _names_of_text(model: torch.nn.Module) -> set[str]:
    """Return the names of the language model's tensors: all of them, unless the model is multimodal."""
    kind = type(model.config.get_text_config())
    # The outermost such module comes first.
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
    """Return ``decay * old + (1 - decay) * new``, in float32; tensors that are not floating are the new ones."""
    return {
        name: old[name].float().lerp(tensor.to(old[name].device).float(), 1 - decay)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in new.items()
    }


def next_version(current: int, version: int | None) -> int:
    """Return the version of new weights: the one that is asked for, or the next.

    Raises:
        WeightsError: it is not above the one that serves: versions are compared to tell old tokens from new weights.
    """
    if version is None:
        return current + 1
    if isinstance(version, bool) or not isinstance(version, int) or version <= current:
        raise WeightsError(f"version={version!r}: expected an int above {current}, the version that serves")
    return version


def _list(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _new_folder(size_bytes: int) -> Path:
    parent = Path(tempfile.gettempdir())
    if lifetime.SHARED_MEMORY.is_dir():
        lifetime.remove_orphans()
        if shutil.disk_usage(lifetime.SHARED_MEMORY).free > 1.05 * size_bytes:
            parent = lifetime.SHARED_MEMORY
    return lifetime.new_folder(parent)


@contextmanager
def _no_bars() -> Iterator[None]:
    bars = transformers.utils.logging
    was_enabled = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()
