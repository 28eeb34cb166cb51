"""``VLLMReference`` wraps a scorer for TorchRL, with TorchRL's keys and TensorClasses.

The wrapper works in the transforms of this package and of TorchRL, wherever they take an ``LLMWrapperBase``
with ``generate=False``. The wrapper reads and writes entries; its scorer computes the log-probs.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDictBase, lazy_stack, set_list_to_stack
from tensordict.utils import NestedKey
from torchrl.modules.llm.policies import LLMWrapperBase, LogProbs, Masks, Tokens

from vllm_kl.batch.alignment import PaddingSide, to_layout
from vllm_kl.batch.read_tokens import InputMode, keys_of, nested, read_batch, rows_of
from vllm_kl.batch.tokenize_texts import TextWatch
from vllm_kl.batch.write_entries import set_rows
from vllm_kl.engines.make_engine import addresses_of, checked_path
from vllm_kl.errors import OptionError
from vllm_kl.scorer import VLLMScorer
from vllm_kl.transforms.score_batch import score_batch
from vllm_kl.types import Rows, Scorer, TokenBatch

# The attributes of a wrapper that a reference in another process needs.
DESCRIPTION = (
    "input_mode",
    "pad_output",
    "log_probs_key",
    "tokens_key",
    "masks_key",
    "text_key",
    "history_key",
    "tokenizer",
    "chat_template_name",
    "chat_template",
    "tokenizer_kwargs",
    "padding_side",
    "input_key",
)


class VLLMReference(LLMWrapperBase):
    """Scores with a frozen model, as a TorchRL wrapper that never generates.

    Args:
        scorer_or_model: a ``VLLMScorer``, which others may share. Or the model that a new scorer takes: a
            path, a name, the address of a server, or a live ``vllm.LLM``.
        tokenizer: a transformers tokenizer, or a path or name. ``None`` loads the model's own, if the model
            is a path. A server has none. It is only used if the tensordict has no ids.

    Keyword Args:
        input_mode: ``"history"``, ``"text"`` or ``"tokens"``: the entry that is tokenized if there are no
            ids.
        input_key: the entry to read; default ``(input_mode, "full")``.
        pad_output: ``True`` writes dense ``[B, T]`` entries, ``False`` ragged ones (``.get(key,
            as_list=True)``).
        padding_side: where rows of different lengths are padded; rows that are stored dense keep their
            columns.
        log_probs_key, tokens_key, masks_key, text_key, history_key: where the entries are.
        chat_template_name, chat_template: as in TorchRL's wrappers.
        tokenizer_kwargs: passed to the tokenizer in text mode. Without ``add_special_tokens`` a text that
            begins with BOS gets no second BOS.
        inplace: ``True`` writes into the input, ``False`` returns a new tensordict, ``"empty"`` one of the
            same kind.
        layout: TorchRL's own ``RetrieveLogProb`` reads it when it makes nested tensors; this package makes
            none.
        **engine_options: ``placeholders`` and vLLM's engine options, for a scorer that is made here.

    Writes ``(log_probs_key, "full")`` float32, nats, ``[B, T]`` or ragged: 0.0 at token 0 and at padding,
    finite elsewhere. Also writes ``(tokens_key, "full")`` and the masks. The assistant's mask of a History
    keeps the tokens that the chat template marks, and the token that ends a turn, wherever the template's
    tags close. The wrapper warns once of text that the template cuts, moves or adds, and counts it in
    :attr:`metrics`.

    Raises:
        OptionError: an argument has no effect here (``generate=True``, engine options for a running scorer).
        InputError, MissingLogProbError: when called; see :meth:`VLLMScorer.score`.

    >>> # reference = VLLMReference("my-model", input_mode="history", dtype="float32")
    >>> from torchrl.data.llm import History
    >>> from torchrl.modules.llm.policies import ChatHistory
    >>> chats = [[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]]
    >>> td = reference(TensorDict(history=ChatHistory(full=History.from_chats(chats)), batch_size=(1,)))
    >>> log_probs, mask = td["ref_log_probs", "full"], td["masks", "all_assistant_mask"]
    >>> log_probs.shape == mask.shape, int(mask.sum()), bool((log_probs[mask] < 0).all())
    (True, 2, True)
    """

    generate = False
    return_log_probs = True
    num_samples = None
    _device = None
    _min_batch_size = None
    _max_batch_size = None

    def __init__(
        self,
        scorer_or_model: Any,
        tokenizer: Any = None,
        *,
        input_mode: InputMode = "history",
        input_key: NestedKey | None = None,
        pad_output: bool = False,
        padding_side: PaddingSide = "left",
        log_probs_key: NestedKey = "ref_log_probs",
        tokens_key: NestedKey = "tokens",
        masks_key: NestedKey = "masks",
        text_key: NestedKey = "text",
        history_key: NestedKey = "history",
        chat_template_name: str | None = None,
        chat_template: str | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        inplace: Literal[True, False, "empty"] = True,
        layout: torch.layout | None = None,
        generate: bool = False,
        return_log_probs: bool = True,
        **engine_options: Any,
    ) -> None:
        super().__init__()
        _check_options(input_mode, pad_output, generate, return_log_probs)
        # vllm.LLM has a method named score too, but only engines have generate.
        is_model = isinstance(scorer_or_model, (str, os.PathLike)) or hasattr(scorer_or_model, "generate")
        if isinstance(scorer_or_model, (str, os.PathLike)):
            scorer_or_model = checked_path(scorer_or_model, engine_options)
        self.tokenizer = _load_tokenizer(tokenizer, scorer_or_model)  # fails before an engine starts
        self._owns_scorer = is_model or not hasattr(scorer_or_model, "score")
        self.scorer = _scorer(scorer_or_model, self._owns_scorer, engine_options)
        self.input_mode = input_mode
        self.pad_output = pad_output
        self.padding_side = padding_side
        self.log_probs_key = log_probs_key
        self.tokens_key = tokens_key
        self.masks_key = masks_key
        self.text_key = text_key
        self.history_key = history_key
        self.chat_template_name = chat_template_name
        self.chat_template = chat_template
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self.inplace = inplace
        self.layout = torch.strided if layout is None and not pad_output else layout
        self.input_key = input_key or nested(
            {"history": history_key, "text": text_key, "tokens": tokens_key}[input_mode], "full"
        )
        self._texts = TextWatch()
        self.in_keys = [self.input_key]
        self.out_keys = [masks_key, tokens_key, log_probs_key]

    def get_new_version(self, **kwargs: Any) -> VLLMReference:
        """Return a copy with other arguments and the same scorer."""
        current = {name: getattr(self, name) for name in (*DESCRIPTION, "inplace") if name != "input_key"}
        if "input_mode" not in kwargs:
            current["input_key"] = self.input_key
        if "pad_output" not in kwargs:
            current["layout"] = self.layout
        return type(self)(kwargs.pop("model", self.scorer), **{**current, **kwargs})

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the last batch tokenized here, ``template_...``, as in :attr:`RetrieveKL.metrics`."""
        return self._texts.metrics

    @property
    def weight_version(self) -> int | None:
        """The version of the weights that serve; ``None``: the scorer does not know."""
        return getattr(self.scorer, "weight_version", None)

    def refresh(
        self, source: Any, *, ema: float | None = None, version: int | None = None, tolerance: float = 0.0
    ) -> int:
        """Replace the reference's weights; see :meth:`VLLMScorer.refresh`."""
        return self._vllm_scorer("refresh").refresh(source, ema=ema, version=version, tolerance=tolerance)

    def check_frozen(self, tolerance: float = 0.0) -> float:
        """Check that the weights have not changed; see :meth:`VLLMScorer.check_frozen`."""
        return self._vllm_scorer("check_frozen").check_frozen(tolerance)

    def asleep(self) -> contextlib.AbstractContextManager[None]:
        """Free the engine's GPU memory inside a ``with`` block; see :meth:`VLLMScorer.asleep`."""
        return self._vllm_scorer("asleep").asleep()

    def _vllm_scorer(self, method: str) -> VLLMScorer:
        if not hasattr(self.scorer, method):
            raise OptionError(
                f"{method} needs a VLLMScorer in this process, but this reference has a "
                f"{type(self.scorer).__name__}"
            )
        return self.scorer  # type: ignore[return-value]

    @staticmethod
    def connect(name: str) -> VLLMReference:
        """Return a reference that scores by the Ray service of this name, with the options of the service.

        Args:
            name: the ``actor_name`` that :class:`RetrieveKL` was given with ``service_backend="ray"``.

        Raises:
            EngineError: there is no such service in the Ray cluster, or this process is in no cluster.
        """
        from vllm_kl.transforms.ray_scorer import RayScorer
        from vllm_kl.transforms.service_options import ServiceOptions

        scorer = RayScorer(None, ServiceOptions(actor_name=name))
        return VLLMReference(scorer, **scorer.attributes)

    @staticmethod
    def close_service(name: str) -> None:
        """End the Ray service of this name and its engine, for all the processes that use it.

        Args:
            name: the ``actor_name`` that :class:`RetrieveKL` was given with ``service_backend="ray"``.

        Raises:
            EngineError: there is no such service in the Ray cluster, or this process is in no cluster.
        """
        from vllm_kl.transforms.ray_scorer import close_service

        close_service(name)

    def close(self) -> None:
        """End the engine if the reference made it; a scorer that was passed in goes on running."""
        if self._owns_scorer:
            self.scorer.close()  # type: ignore[attr-defined]

    @set_list_to_stack(True)
    def forward(
        self, tensordict: TensorDictBase, *, tensordict_out: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        """Score ``tensordict`` and write log-probs, tokens and masks."""
        if kwargs:
            raise OptionError(f"VLLMReference takes no {', '.join(kwargs)}: it returns log-probs, not logits")
        if tensordict_out is None:
            tensordict_out = tensordict if self.inplace is True else tensordict.empty()
        if tensordict.ndim == 0:
            flat, flat_out = lazy_stack([tensordict]), lazy_stack([tensordict_out])
            self._write(flat, flat_out)
            return tensordict_out.update(flat_out[0].select(*self.out_keys))
        if tensordict.ndim > 1:
            flat_out = tensordict.reshape(-1).empty().to_lazystack(0)
            self._write(tensordict.reshape(-1), flat_out)
            return tensordict_out.update(flat_out.view(tensordict.shape))
        self._write(tensordict, tensordict_out)
        return tensordict_out

    def _write(self, td: TensorDictBase, out: TensorDictBase) -> None:
        batch = read_batch(td, keys_of(self), assistant_only=False)
        self._texts.see(batch.report)
        values = score_batch(self.scorer, batch).values
        self._write_tokens(td, out, batch)
        set_rows(out, nested(self.log_probs_key, "full"), self._lay_out(values, batch), LogProbs)

    def _write_tokens(self, td: TensorDictBase, out: TensorDictBase, batch: TokenBatch) -> None:
        """Write ids and masks in the layout of the log-probs. Ids that already have this layout stay."""
        ids = self._lay_out(
            batch.packed_ids, batch, padding_value=getattr(self.tokenizer, "pad_token_id", None) or 0
        )
        stored = rows_of(td, nested(self.tokens_key, "full"))
        if out is not td or stored is None or [len(row) for row in ids] != [len(row) for row in stored]:
            set_rows(out, nested(self.tokens_key, "full"), ids, Tokens)
        real = torch.ones_like(batch.packed_ids, dtype=torch.bool)
        for name, mask in (("all_attention_mask", real), ("all_assistant_mask", batch.packed_assistant)):
            if mask is not None:
                set_rows(out, nested(self.masks_key, name), self._lay_out(mask, batch), Masks)

    def _lay_out(self, values: torch.Tensor, batch: TokenBatch, *, padding_value: float = 0) -> Rows:
        return to_layout(
            values,
            batch,
            pad_output=self.pad_output,
            padding_side=self.padding_side,
            padding_value=padding_value,
        )


def _check_options(input_mode: str, pad_output: bool, generate: bool, return_log_probs: bool) -> None:
    if generate or not return_log_probs:
        raise OptionError("VLLMReference only scores: generate must be False and return_log_probs True")
    if input_mode not in ("history", "text", "tokens"):
        raise OptionError(f"input_mode={input_mode!r} does not exist; choose 'history', 'text' or 'tokens'")
    if not isinstance(pad_output, bool):
        raise OptionError(f"pad_output must be True or False, got {pad_output!r}")


def _scorer(scorer_or_model: Any, is_made_here: bool, engine_options: dict[str, Any]) -> Scorer:
    """Return the given scorer, or a new scorer of the given model."""
    if is_made_here:
        return VLLMScorer(scorer_or_model, **engine_options)
    if engine_options:
        raise OptionError(
            f"unknown argument, or engine option for a scorer that already runs: {', '.join(engine_options)}"
        )
    return scorer_or_model


# Matches the file names of the tokenizer libraries.
_TOKENIZER_FILE = re.compile(r"tokenizer|vocab|merges|tekken|tiktoken|spiece|spm|\.model$")


def _load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Return the tokenizer, loaded if it was named; ``None``: nobody named one and the checkpoint has none.

    Raises:
        OptionError: it cannot be loaded.
    """
    if tokenizer is None and (not isinstance(model, (str, os.PathLike)) or addresses_of(model)):
        get_tokenizer = getattr(model, "get_tokenizer", None)
        return get_tokenizer() if get_tokenizer is not None else None
    if not isinstance(tokenizer, (str, os.PathLike, type(None))):
        return tokenizer
    name = os.fspath(model if tokenizer is None else tokenizer)
    files = [file.name for file in Path(name).glob("*")]
    if tokenizer is None and files and not any(map(_TOKENIZER_FILE.search, files)):
        return None  # scoring ids needs none; tokenizing a text raises
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of transformers, tokenizers, huggingface_hub, json, jinja
        raise OptionError(
            f"the tokenizer of {name!r} could not be loaded: {type(error).__name__}: {error}.\nPass "
            "tokenizer=, a transformers tokenizer or the path of one"
        ) from error
