"""Turns dialogs in plain messages into token ids and the mask of the assistant's tokens.

The module gives the dialogs to :func:`~vllm_kl.batch.read_tokens.read_batch` as TorchRL's ``History``: ids
and masks are those that the transforms give to the same dialogs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict
from torchrl.data.llm import History

from vllm_kl.batch.read_tokens import InputKeys, read_batch
from vllm_kl.errors import InputError
from vllm_kl.types import TokenBatch

_KEY = ("history", "full")


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
        InputError: messages that the template cannot render; or it marks no tokens of the assistant.

    >>> from vllm_kl.demo.task import make_tokenizer
    >>> dialog = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    >>> batch = read_messages([dialog], make_tokenizer(), {"chat_template_name": "chatml_format"})
    >>> make_tokenizer().decode(batch.token_ids[0][batch.keep[0]])
    '2<|im_end|>'
    """
    for i, dialog in enumerate(dialogs):
        check_messages(f"sample {i}: ", dialog)
    history = History.from_chats([list(dialog) for dialog in dialogs])
    td = TensorDict({_KEY: history}, batch_size=[len(dialogs)])
    keys = InputKeys(
        input_mode="history", key=_KEY, tokenizer=tokenizer, template_kwargs=template_kwargs or {}
    )
    return read_batch(td, keys, assistant_only=True)


def check_messages(where: str, dialog: Any) -> None:
    """Refuse what is no list of messages."""
    if not isinstance(dialog, (list, tuple)) or not dialog:
        raise InputError(f"{where}expected a list of messages, got {str(dialog)[:60]!r}")
    for j, message in enumerate(dialog):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{where}message {j} is {str(message)[:60]!r}, expected a dict with 'role' and 'content'"
            )
