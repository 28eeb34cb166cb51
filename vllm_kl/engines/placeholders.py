"""Ids that stand for something else than text: a model's image, video and audio placeholders, found in its config.

A multimodal model puts features of an image in the place of such a token. Where only ids are sent it would embed the token
itself, which it never saw in training, and the log-probs of everything after it would be of nothing that was sampled.
The tokens around them (begin and end of an image) are embedded as they are: they are ordinary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from vllm_kl.errors import OptionError

Placeholders = Literal["refuse", "as_text"]

# In transformers 5.19 and vLLM 0.32: image_token_id, image_token_index, media_placeholder_token_id, visual_indicator_token_ids,
# im_patch_id ... What begins or ends an image has another name: image_start_token_id, boi_token_id, vision_end_token_id, im_end_id.
_NAME = re.compile(
    r"(?P<what>image|img|im|video|vision|visual|audio|speech|sound|media|patch)"
    r"(_token|(_(soft|pad|patch|placeholder|context|frame|indicator))+(_token)?)_(id|index)(e?s)?"
)
_WHAT = {
    "image": "an image",
    "img": "an image",
    "im": "an image",
    "video": "a video",
    "vision": "an image or a video",
    "visual": "an image or a video",
    "audio": "audio",
    "speech": "audio",
    "sound": "audio",
    "media": "an image, a video or audio",
    "patch": "an image",
}


def placeholder_ids(config: Any) -> dict[int, str]:
    """Return the ids of a model's placeholders, and what each stands for; nothing for a model of text.

    Args:
        config: of transformers, with its sub-configs.

    >>> import transformers
    >>> placeholder_ids(transformers.Gemma3Config())
    {262144: 'an image (image_token_index)'}
    """
    found: dict[int, str] = {}
    for name, value in _entries(config):
        if match := _NAME.fullmatch(name):
            for token_id in value if isinstance(value, Iterable) else [value]:
                if isinstance(token_id, int):
                    found.setdefault(token_id, f"{_WHAT[match['what']]} ({name})")
        else:
            found = {**placeholder_ids(value), **found}
    return found


def notes_on(model_config: Any, placeholders: Mapping[int, str]) -> tuple[str, ...]:
    """Return what a user must know of an engine's multimodal model whose config names no placeholder.

    Args:
        model_config: vLLM's; ``None``: not known.
    """
    if placeholders or not getattr(model_config, "is_multimodal_model", False):
        return ()
    return (
        f"the config of {model_config.architecture} does not name the ids that stand for an image, a video or audio: such an id "
        "in a sequence would be scored as an ordinary token",
    )


def check_placeholders(placeholders: Any) -> Placeholders:
    """Return it if it says what to do with placeholders.

    Raises:
        OptionError: it does not.
    """
    if placeholders not in get_args(Placeholders):
        raise OptionError(
            f"placeholders={placeholders!r} does not exist; choose 'refuse', or 'as_text' to score them as ordinary tokens"
        )
    return placeholders


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config, or of a part of one; nothing of what is no config."""
    if isinstance(config, Mapping):
        yield from ((name, value) for name, value in config.items() if isinstance(name, str))
    elif hasattr(config, "to_dict"):
        yield from vars(config).items()
