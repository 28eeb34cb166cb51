"""Makes batches as TorchRL users have them: chats, texts or ids, ragged or dense."""

from __future__ import annotations

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data.llm import History
from torchrl.modules.llm.policies import ChatHistory, Masks, Text, Tokens

CHATS = [
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello, how are you?"},
        {"role": "assistant", "content": "I'm doing well, thank you!"},
    ],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What's the weather like?"},
        {"role": "assistant", "content": "I can't check the weather for you."},
    ],
]
TEXTS = ["a short text", "and one that is a little longer"]


def history_batch(*, with_next=False, chats=CHATS):
    def history():
        return ChatHistory(full=History.from_chats(chats))

    td = TensorDict(history=history(), batch_size=(len(chats),))
    if with_next:
        td["next"] = TensorDict(history=history(), batch_size=(len(chats),))
    return td


def text_batch():
    return TensorDict(text=Text(full=TEXTS), batch_size=(len(TEXTS),)).to_lazystack(0)


def ids_batch(sequences, prompt_lengths=None, *, assistant=None, extra=None):
    """Return a ragged batch of ids as a policy writes it; prompts, masks and entries are optional."""
    samples = []
    for i, ids in enumerate(sequences):
        ids = torch.as_tensor(ids)
        tokens = Tokens(full=ids)
        if prompt_lengths is not None:
            tokens = Tokens(prompt=ids[: prompt_lengths[i]], response=ids[prompt_lengths[i] :], full=ids)
        sample = TensorDict(tokens=tokens)
        if assistant is not None:
            sample["masks"] = Masks(
                all_attention_mask=torch.ones_like(ids, dtype=torch.bool),
                all_assistant_mask=torch.as_tensor(assistant[i]),
            )
        for key, rows in (extra or {}).items():
            sample.set(key, rows[i])
        samples.append(sample)
    return lazy_stack(samples)


def dense_batch(sequences, prompt_lengths, pad_id):
    """Return the batch as TorchRL's padded policies write it: prompts padded left, responses right."""
    prompts = [torch.as_tensor(s)[:p] for s, p in zip(sequences, prompt_lengths, strict=True)]
    responses = [torch.as_tensor(s)[p:] for s, p in zip(sequences, prompt_lengths, strict=True)]

    def pad(rows, side, value):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side, padding_value=value)

    def ones(rows, value=True):
        return [torch.full_like(row, value, dtype=torch.bool) for row in rows]

    attention = torch.cat([pad(ones(prompts), "left", False), pad(ones(responses), "right", False)], -1)
    assistant = torch.cat(
        [pad(ones(prompts, False), "left", False), pad(ones(responses), "right", False)], -1
    )
    prompt, response = pad(prompts, "left", pad_id), pad(responses, "right", pad_id)
    size = (len(sequences),)
    return TensorDict(
        tokens=Tokens(
            prompt=prompt, response=response, full=torch.cat([prompt, response], -1), batch_size=size
        ),
        masks=Masks(all_attention_mask=attention, all_assistant_mask=assistant, batch_size=size),
        batch_size=size,
    )
