"""Finds a multimodal model's placeholder ids (of images, videos, audio) in the model's config.

In training such a model replaces a placeholder's embedding by features of the image. A scorer sends ids only,
so the model would embed the placeholder itself, and all later log-probs would be wrong. The tokens that begin
and end an image are ordinary tokens: the model embeds them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from vllm_kl.errors import OptionError

Placeholders = Literal["refuse", "as_text"]

# Placeholders in transformers 5.19 and vLLM 0.32: image_token_id, image_token_index,
# media_placeholder_token_id, visual_indicator_token_ids, im_patch_id ... Tokens that begin or end an image
# have other names: image_start_token_id, boi_token_id, vision_end_token_id, im_end_id.
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
    """Return a model's placeholder ids, each with what it stands for; empty for a text model.

    Args:
        config: the model's transformers config, with its sub-configs.

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
    """Return notes for the user of a multimodal model whose config names no placeholder.

    Args:
        model_config: vLLM's model config; ``None``: not known.
        placeholders: the ids that :func:`placeholder_ids` found.
    """
    if placeholders or not getattr(model_config, "is_multimodal_model", False):
        return ()
    return (
        f"the config of {model_config.architecture} does not name the ids that stand for an image, a video "
        "or audio: such an id in a sequence would be scored as an ordinary token",
    )


def check_placeholders(placeholders: Any) -> Placeholders:
    """Return the value of the option ``placeholders``.

    Raises:
        OptionError: there is no such value.
    """
    if placeholders not in get_args(Placeholders):
        raise OptionError(
            f"placeholders={placeholders!r} does not exist; choose 'refuse', or 'as_text' to score "
            "placeholders as ordinary tokens"
        )
    return placeholders


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config or a sub-config; none of another value."""
    if isinstance(config, Mapping):
        yield from ((name, value) for name, value in config.items() if isinstance(name, str))
    elif hasattr(config, "to_dict"):
        yield from vars(config).items()
