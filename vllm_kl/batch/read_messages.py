"""Turns dialogs in plain messages into token ids and the mask of the assistant's tokens.

Ids and masks are those that the transforms give to the same dialogs as TorchRL's ``History``. Messages may
have more keys than a ``History``, such as ``name``, if the chat template knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kl.batch.read_tokens import InputKeys, has_tags, render_dialogs
from vllm_kl.errors import InputError, OptionError
from vllm_kl.types import TokenBatch


def read_messages(
    dialogs: Sequence[Sequence[dict[str, Any]]],
    tokenizer: Any,
    template_kwargs: dict[str, Any] | None = None,
) -> TokenBatch:
    """Return the tokens of B dialogs; the mask keeps the tokens of all turns of the assistant.

    Args:
        dialogs: for each dialog its messages, ``{"role": ..., "content": ...}``.
        tokenizer: a tokenizer of transformers.
        template_kwargs: options of the chat template, such as ``chat_template``.

    Raises:
        InputError: messages that the template cannot render, or one whose first token is the assistant's.
        OptionError: the template marks no tokens of the assistant.
    """
    for i, dialog in enumerate(dialogs):
        check_messages(f"sample {i}: ", dialog)
    template = {"chat_template": getattr(tokenizer, "chat_template", None), **(template_kwargs or {})}
    if not has_tags(template["chat_template"]):
        raise OptionError(
            "the chat template does not mark the tokens of the assistant: give one that has {% generation %} "
            "tags around the assistant's content (--chat-template, chat_template=), or score texts or ids"
        )
    keys = InputKeys(input_mode="history", key="history", tokenizer=tokenizer, template_kwargs=template)
    token_ids, masks, report = render_dialogs(dialogs, keys, assistant_only=True)
    assert masks is not None, "found or refused"
    for i, mask in enumerate(masks):
        if len(mask) and mask[0]:
            raise InputError(
                f"sample {i}: token 0 is the assistant's, and has no log-prob: begin with a prompt"
            )
    return TokenBatch.of(token_ids, masks, assistant=masks, stored=False, report=report)


def check_messages(where: str, dialog: Any) -> None:
    """Refuse what is no list of messages."""
    if not isinstance(dialog, (list, tuple)) or not dialog:
        raise InputError(f"{where}expected a list of messages, got {str(dialog)[:60]!r}")
    for j, message in enumerate(dialog):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{where}message {j} is {str(message)[:60]!r}, expected a dict with 'role' and 'content'"
            )
    if all(message["role"] != "assistant" for message in dialog):
        raise InputError(f"{where}no message is the assistant's: there is nothing to score")
