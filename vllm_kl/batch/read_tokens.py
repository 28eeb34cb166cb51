"""Reads the real tokens of every sample from a tensordict, and the mask of the tokens that count.

If the tensordict has ids under ``("tokens", "full")``, the module takes these ids. Otherwise it tokenizes the
history or the text, once for both sides of a KL.

Masks come from lengths and from masks that are stored beside the ids, never from token values, so a pad token
may equal EOS. The module knows TorchRL's keys and chat templates, but no models or engines.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase
from tensordict.utils import NestedKey
from torchrl.data.llm import History

from vllm_kl.batch.chat_templates import end_turns, ends_of, render, report_changes
from vllm_kl.batch.tokenize_texts import doubled_bos, tokenize
from vllm_kl.errors import InputError
from vllm_kl.types import Rows, TextReport, TokenBatch, columns_of, pack, widths_of

_NO_TAGS = (
    "assistant_only=True, but the chat template marks no assistant tokens in sample {sample}.\n"
    "Pass a template that puts {{% generation %}} tags around the assistant's content "
    "(tokenizer_kwargs={{'chat_template': ...}}, or TorchRL's {{'chat_template_name': 'chatml_format'}}); "
    "or store ids with {stored}; or store ids with {prompt}, after which every token counts; or pass "
    "assistant_only=False."
)
_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")

_INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

InputMode = Literal["history", "text", "tokens"]


@dataclass(frozen=True, kw_only=True)
class InputKeys:
    """The keys of a batch's entries, and the tokenizer for batches without ids."""

    input_mode: InputMode
    key: NestedKey  # the history, text or ids to read if there are no ids under ``tokens_key``
    tokens_key: NestedKey = "tokens"
    masks_key: NestedKey = "masks"
    tokenizer: Any = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # chat_template_name, chat_template, ...
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)  # for input mode "text"


def keys_of(
    model: Any,
    *,
    tokenizer: Any = None,
    template_kwargs: dict[str, Any] | None = None,
    history_key: NestedKey | None = None,
    ids_of: Any = None,
) -> InputKeys:
    """Return the keys that a wrapper reads.

    Args:
        model: a wrapper with the attributes of TorchRL's LLM wrappers.
        tokenizer: replaces the wrapper's tokenizer.
        template_kwargs: options of the chat template, which override the wrapper's.
        history_key: replaces the wrapper's history key; ``"full"`` is appended.
        ids_of: the wrapper that wrote ids and masks, if it is another one.
    """
    template = {name: getattr(model, name, None) for name in ("chat_template_name", "chat_template")}
    input_mode: InputMode = getattr(model, "input_mode", "history")
    other_history = history_key is not None and history_key != getattr(model, "history_key", "history")
    return InputKeys(
        input_mode=input_mode,
        key=nested(history_key, "full") if other_history and input_mode == "history" else model.in_keys[0],
        tokens_key=getattr(ids_of or model, "tokens_key", "tokens"),
        masks_key=getattr(ids_of or model, "masks_key", "masks"),
        tokenizer=tokenizer or getattr(model, "tokenizer", None),
        template_kwargs={**{k: v for k, v in template.items() if v is not None}, **(template_kwargs or {})},
        tokenizer_kwargs=getattr(model, "tokenizer_kwargs", None) or {},
    )


def nested(key: NestedKey, name: str) -> tuple[str, ...]:
    """Return ``key`` extended by ``name``.

    >>> nested("tokens", "full"), nested(("ref", "tokens"), "full")
    (('tokens', 'full'), ('ref', 'tokens', 'full'))
    """
    return (*key, name) if isinstance(key, tuple) else (key, name)


def read_rows(td: TensorDictBase, key: NestedKey) -> Rows | None:
    """Return entry ``key`` of a one-dimensional batch, or ``None`` if no sample has the entry.

    A dense entry is returned as one tensor ``[B, ...]``, a ragged entry (nested or lazily stacked) as a list
    of B tensors.

    Raises:
        InputError: some samples have the entry and others do not.
    """
    value = td.get(key, default=None, as_list=True)
    if isinstance(value, torch.Tensor):
        return list(value.unbind(0)) if value.is_nested else value
    rows = [sample.get(key, default=None) for sample in td.unbind(0)] if value is None else list(value)
    missing = [i for i, row in enumerate(rows) if row is None]
    if len(missing) == len(rows):
        return None
    if missing:
        raise InputError(
            f"sample {missing[0]} has no {key}, but other samples of the batch have: write it for all "
            "samples or for none"
        )
    return rows


def rows_of(td: TensorDictBase, key: NestedKey) -> list[torch.Tensor] | None:
    """Return entry ``key`` as :func:`read_rows` does, but always as a list of one tensor per sample."""
    rows = read_rows(td, key)
    return list(rows.unbind(0)) if isinstance(rows, torch.Tensor) else rows


def read_batch(td: TensorDictBase, keys: InputKeys, *, assistant_only: bool) -> TokenBatch:
    """Return the real tokens of a one-dimensional batch and the mask of the tokens that count.

    Args:
        td: a tensordict with ``batch_size [B]``. It is not changed.
        keys: keys of the batch's entries.
        assistant_only: whether only the assistant's tokens count; otherwise all tokens but token 0 count.

    Raises:
        InputError: the batch has nothing to score, a mask does not fit its ids, or the assistant's tokens are
            unknown.
    """
    ids = read_rows(td, nested(keys.tokens_key, "full"))
    if ids is None and keys.input_mode == "tokens":
        ids = read_rows(td, keys.key)
    is_stored, report = ids is not None, TextReport()
    if ids is not None:
        _check_ids(ids, nested(keys.tokens_key, "full"))
        lengths, places = _real_tokens(ids, read_rows(td, nested(keys.masks_key, "all_attention_mask")), keys)
        ids_N = pack(ids, places).long()
        assistant = _stored_assistant_mask(td, ids, lengths, places, keys, assistant_only)
        if assistant is None and assistant_only:
            assistant = _template_mask(td, ids_N.split(lengths), keys)
    else:
        ids, masks, report = _tokenize(td, keys, assistant_only=assistant_only)
        lengths, places = widths_of(ids), None
        ids_N, assistant = torch.cat(ids), None if masks is None else torch.cat(masks)
    if 0 in lengths:
        raise InputError(f"sample {lengths.index(0)} has no tokens: drop it from the batch")
    firsts = torch.tensor([0, *lengths])[: len(lengths)].cumsum(0)
    if assistant_only:
        assert assistant is not None, "it was read or rendered, or refused"
        keep = assistant
    else:
        keep = torch.ones(len(ids_N), dtype=torch.bool).index_fill(0, firsts, False)
    for i in keep[firsts].nonzero()[:, 0].tolist():
        raise InputError(
            f"sample {i}: the assistant mask keeps token 0, which has no log-prob because nothing comes "
            "before it. Begin the sequence with a prompt or a BOS token, or set the mask to false there."
        )
    return TokenBatch(
        packed_ids=ids_N,
        packed_keep=keep,
        packed_assistant=assistant,
        lengths=lengths,
        places=places,
        widths=widths_of(ids),
        stored=is_stored,
        report=report.joined(doubled_bos(ids_N, firsts, lengths, keys.tokenizer)),
    )


def _check_ids(ids: Rows, name: NestedKey) -> None:
    """Raise InputError if a sample's ids are no flat row of ints."""
    for i, row in enumerate(ids[:1] if isinstance(ids, torch.Tensor) else ids):
        if not isinstance(row, torch.Tensor) or row.dim() != 1 or row.dtype not in _INTS:
            shape = f"shape {list(row.shape)} and dtype {row.dtype}" if hasattr(row, "dtype") else repr(row)
            raise InputError(
                f"sample {i}: {name} has {shape[:80]}, expected a row of ints, one for each token"
            )


def _real_tokens(ids: Rows, attention: Rows | None, keys: InputKeys) -> tuple[list[int], torch.Tensor | None]:
    """Return the number of real tokens of each row, and their places (``None``: all tokens are real)."""
    widths = widths_of(ids)
    if attention is None:
        return widths, None
    check_shapes(attention, ids, nested(keys.masks_key, "all_attention_mask"))
    is_real = pack(attention).bool()
    if is_real.all():
        return widths, None
    places = is_real.nonzero()[:, 0]
    ends = torch.searchsorted(places, torch.tensor(widths).cumsum(0))
    lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.long))
    begun = lengths > 0
    last, first = places[ends[begun] - 1], places[(ends - lengths)[begun]]
    holes = begun.nonzero()[:, 0][last - first + 1 != lengths[begun]].tolist()
    if holes:
        warnings.warn(
            f"sample {holes[0]} (and {len(holes) - 1} more): the attention mask leaves out tokens inside "
            "the sequence. These tokens are not scored, because a policy that masks them did not see "
            "them: TorchRL's wrappers drop every pad id from a padded prompt.\nGive the tokenizer a pad "
            "token that is not its EOS.",
            stacklevel=4,
        )
    return lengths.tolist(), places


def check_shapes(masks: Rows, ids: Rows, name: NestedKey) -> None:
    """Raise InputError if the masks have another shape than the ids."""
    if isinstance(masks, torch.Tensor) and isinstance(ids, torch.Tensor) and masks.shape == ids.shape:
        return
    for i, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        if mask.shape != row.shape:
            raise InputError(
                f"sample {i}: {name} has shape {list(mask.shape)}, expected {list(row.shape)}, the shape "
                "of its token ids"
            )


def _stored_assistant_mask(
    td: TensorDictBase,
    ids: Rows,
    lengths: list[int],
    places: torch.Tensor | None,
    keys: InputKeys,
    assistant_only: bool,
) -> torch.Tensor | None:
    """Return the stored assistant mask, ``[N]``, or the mask of all tokens after the prompt, or ``None``."""
    name = nested(keys.masks_key, "all_assistant_mask")
    stored = read_rows(td, name)
    if stored is not None:
        check_shapes(stored, ids, name)
        return pack(stored, places).bool()
    prompts = rows_of(td, nested(keys.tokens_key, "prompt"))
    if prompts is None:
        return None
    columns = columns_of(places, lengths, widths_of(ids))
    found = _prompt_lengths([p.long().cpu() for p in prompts], [r.long().cpu() for r in ids], columns, keys)
    if isinstance(found, str):
        if assistant_only:
            raise InputError(f"{found} Store {name} beside the ids, or pass assistant_only=False.")
        return None
    return torch.cat([torch.arange(length) >= prompt for length, prompt in zip(lengths, found, strict=True)])


def _prompt_lengths(
    prompts: list[torch.Tensor], full: list[torch.Tensor], columns: list[torch.Tensor], keys: InputKeys
) -> list[int] | str:
    """Return the number of real ids in each sample's prompt, or a text that says why the number is unknown.

    The prompts of a batch are either the first columns of the full rows, padding included (TorchRL's layout),
    or the first real ids. Prompts of one width may hold padding without a mask: if such a prompt ends with an
    id that pads the full rows, or with the tokenizer's pad id, this id may be padding or a token, and the
    number is unknown.
    """
    name = f"{nested(keys.tokens_key, 'prompt')} {{}} {nested(keys.tokens_key, 'full')}".format
    real = [row[c] for row, c in zip(full, columns, strict=True)]
    in_place = [
        int((c < len(p)).sum()) if torch.equal(p, row[: len(p)]) else None
        for p, row, c in zip(prompts, full, columns, strict=True)
    ]
    unpadded = [
        len(p) if torch.equal(p, ids[: len(p)]) else None for p, ids in zip(prompts, real, strict=True)
    ]
    both = (in_place, unpadded)
    ways = [[n for n in way if n is not None] for way in both if None not in way]
    if not ways:
        way, rows = max(zip(both, (full, real), strict=True), key=lambda w: len(prompts) - w[0].count(None))
        i = way.index(None)
        prompt, row = prompts[i].tolist(), rows[i].tolist()
        at = next(t for t, token in enumerate(prompt) if row[t : t + 1] != [token])
        expected = row[at] if at < len(row) else "the end of the row"
        return (
            f"sample {i}: {name('does not begin')}: its token {at} is {prompt[at]}, expected {expected}. "
            "Prompts must be the first columns of the full rows, padding included, or the first ids "
            "without padding."
        )
    pads: set[int | None] = set()
    if len({len(p) for p in prompts}) == 1:
        hidden = [row[~torch.isin(torch.arange(len(row)), c)] for row, c in zip(full, columns, strict=True)]
        pads = {*torch.cat(hidden).tolist(), getattr(keys.tokenizer, "pad_token_id", None)}
    for i, readings in enumerate(zip(*ways, strict=True)):
        shortest, longest = min(readings), max(readings)
        while shortest and int(real[i][shortest - 1]) in pads:
            shortest -= 1
        if shortest < longest:
            return (
                f"sample {i}: {name('begins')} with {shortest} tokens or with {longest}: the ids at its "
                "end may be padding or tokens. Remove the padding from the prompts."
            )
    return ways[0]


def _template_mask(td: TensorDictBase, token_ids: Sequence[torch.Tensor], keys: InputKeys) -> torch.Tensor:
    """Return the template's assistant mask, ``[N]``; check that the history renders to the stored ids."""
    if keys.input_mode != "history" or td.get(keys.key, default=None) is None:
        raise InputError(
            "assistant_only=True needs to know the assistant's tokens: the tensordict has ids but neither "
            f"{nested(keys.masks_key, 'all_assistant_mask')} nor {nested(keys.tokens_key, 'prompt')} nor "
            f"{keys.key}.\n"
            "Add one of these entries, or pass assistant_only=False."
        )
    template_ids, masks, _ = _render(td, keys, assistant_only=True)
    assert masks is not None, "found or refused"
    for i, (ids, expected) in enumerate(zip(template_ids, token_ids, strict=True)):
        if not torch.equal(ids, expected):
            raise InputError(
                f"sample {i}: its history renders to {len(ids)} tokens that differ from its "
                f"{len(expected)} stored ids, so the template's assistant mask does not fit the stored "
                "ids.\n"
                f"Store {nested(keys.masks_key, 'all_assistant_mask')} beside the ids, or name the "
                "template that made the ids: tokenizer_kwargs={'chat_template_name': ...}."
            )
    return torch.cat(masks)


def _tokenize(
    td: TensorDictBase, keys: InputKeys, *, assistant_only: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, TextReport]:
    """Return the ids of texts or histories, and the assistant masks of histories."""
    if td.get(keys.key, default=None) is None:
        raise InputError(
            f"nothing to score: the tensordict has neither {nested(keys.tokens_key, 'full')} nor "
            f"{keys.key}; it has {sorted(map(str, td.keys()))}"
        )
    if keys.input_mode == "tokens":
        raise InputError(f"{keys.key} must hold tensors of ids")
    if keys.tokenizer is None:
        raise InputError(f"{keys.key} holds no ids, so a tokenizer is needed: pass tokenizer=")
    if keys.input_mode == "history":
        return _render(td, keys, assistant_only=assistant_only)
    if assistant_only:
        raise InputError(
            "assistant_only=True needs input_mode='history': a text does not say which tokens are the "
            "assistant's"
        )
    texts = td.get(keys.key)
    if isinstance(texts, (NonTensorData, NonTensorStack)):
        texts = texts.tolist()
    options = {
        k: v
        for k, v in keys.tokenizer_kwargs.items()
        if k not in ("padding", "return_tensors", "padding_side")
    }
    rows, report = tokenize([texts] if isinstance(texts, str) else list(texts), keys.tokenizer, options)
    return [torch.tensor(ids, dtype=torch.long) for ids in rows], None, report


def _render(
    td: TensorDictBase, keys: InputKeys, *, assistant_only: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, TextReport]:
    """Return ids and assistant masks of histories; masks are ``None`` if the template makes none."""
    history = td.get(keys.key)
    if not isinstance(history, History):
        raise InputError(f"{keys.key} must be a History, got {type(history).__name__}")
    return render_dialogs(history, keys, assistant_only=assistant_only)


def render_dialogs(
    history: History | Sequence[Sequence[dict[str, Any]]], keys: InputKeys, *, assistant_only: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, TextReport]:
    """Return ids and assistant masks of histories, or of dialogs in plain messages."""
    options = {"add_generation_prompt": False, **keys.template_kwargs}
    options |= {"tokenize": True, "padding": False, "return_dict": True, "return_assistant_tokens_mask": True}
    options.pop("return_tensors", None)
    whose = _choose_template(keys.tokenizer, options)
    dialogs, notes = render(history, keys.tokenizer, options, whose=whose)
    token_ids = [dialog.token_ids for dialog in dialogs]
    bare = [i for i, dialog in enumerate(dialogs) if not dialog.marked.any()]
    if len(bare) < len(dialogs):
        # The template has tags: a dialog without marks is legitimate if the assistant says nothing or is
        # truncated.
        bare = [i for i in bare if dialogs[i].speaks and not options.get("truncation")]
    if bare and assistant_only:
        stored, prompt = nested(keys.masks_key, "all_assistant_mask"), nested(keys.tokens_key, "prompt")
        raise InputError(_NO_TAGS.format(sample=bare[0], stored=stored, prompt=prompt))
    ends = ends_of(keys.tokenizer, options)
    masks, of_turns = (None, TextReport()) if bare else end_turns(dialogs, ends)
    if not assistant_only:
        of_turns.warnings.pop("blank", None)  # all tokens count
    return token_ids, masks, report_changes(dialogs, masks, ends).joined(of_turns, TextReport(notes=notes))


def has_tags(template: Any) -> bool:
    """Whether a tokenizer's chat template marks the tokens of the assistant."""
    text = template.get("default", "") if isinstance(template, dict) else template
    return bool(text and _TAG.search(text))


def _choose_template(tokenizer: Any, options: dict[str, Any]) -> str:
    """Set the tokenizer's own template in the options, if it has tags; return its name for messages."""
    if options.get("chat_template") is not None:
        return "the chat_template that was passed"
    if options.get("chat_template_name") is not None:
        return f"TorchRL's chat template {options['chat_template_name']!r}"
    own = getattr(tokenizer, "chat_template", None)
    if has_tags(own):
        # Without this, TorchRL 0.14 chooses one of its own templates by words in the tokenizer's path.
        options["chat_template"] = own["default"] if isinstance(own, dict) else own
        return "the tokenizer's own chat template"
    if own:
        warnings.warn(
            "the tokenizer's chat template has no {% generation %} tags, so TorchRL renders with a "
            "template of its own: the ids may differ from those that the policy saw.\nStore the policy's "
            "ids, or pass the template to use: tokenizer_kwargs={'chat_template': ...}.",
            stacklevel=5,
        )
    return "the chat template that TorchRL chose by the tokenizer's path"
