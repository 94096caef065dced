"""Batches of images and text for `lorafuse bench`, as a model's processor lays them.

Each row holds two images between three pieces of text. Where the model takes images as they are,
the first one is a square that fills about a quarter of the row, and the second is half as high;
where it cuts images into tiles, the first fills all tiles and the second two; else both are what
the model scales every image to. Pixels and text are random. What stands for an image has no label.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lorafuse.patches.label_places import IGNORED
from lorafuse.plugin.bench_job import Job
from lorafuse.plugin.errors import FuseConfigError
from lorafuse.plugin.image_batch import special_tokens

# Of a row's tokens, what the pieces of an image take at most: one of this many.
SHARE = 4
Size = tuple[int, int]


@dataclass(frozen=True)
class Image:
    """One image of a row.

    Attributes:
        pixels: Height and width.
        ids: The tokens that stand for it, those around it included.
        grid: Height and width in patches or tiles.
    """

    pixels: Size
    ids: tuple[int, ...]
    grid: Size = (1, 1)


@dataclass(frozen=True)
class Kind:
    """How a model takes images.

    Attributes:
        lay: (config, the most pieces of an image) -> a row's images.
        inputs: (config, a row's images, rows, where pixels are drawn from) -> the forward's
            arguments that hold all images.
        beside: (config, a row's images, input_ids of shape (rows, tokens)) -> its arguments that
            say where they are, int64 of shape (rows, tokens, ...).
    """

    lay: Callable[[Any, int], tuple[Image, ...]]
    inputs: Callable[[Any, tuple[Image, ...], int, torch.Generator], dict[str, Tensor]]
    beside: Callable[[Any, tuple[Image, ...], Tensor], dict[str, Tensor]]


def takes_images(config: PretrainedConfig) -> bool:
    """Whether `image_rows` knows how: the model is trained with images then."""
    return _kind(config) is not None


def row_images(config: PretrainedConfig, tokens: int) -> tuple[Image, ...]:
    """The images of each row.

    Raises:
        FuseConfigError: A row of so many tokens has no room for them.
    """
    kind = _kind(config)
    assert kind is not None
    found = kind.lay(config, tokens // SHARE)
    least = sum(len(one.ids) for one in found) + len(found) + 1
    if tokens < least:
        raise FuseConfigError(
            f"--tokens {tokens} has no room for a row's {len(found)} images with text around them; "
            f"give {least} or more"
        )
    return found


def described(images: tuple[Image, ...], tokens: int) -> str:
    """For a table: the images of a row, and how many of its tokens stand for them."""
    sizes = " and ".join("{} × {}".format(*one.pixels) for one in images)
    return f"images of {sizes} a row ({sum(len(one.ids) for one in images):,} of {tokens:,} tokens)"


def image_rows(config: PretrainedConfig, job: Job) -> dict[str, Tensor]:
    """A step's arguments on the CPU; pixels in fp32, all else int64."""
    kind = _kind(config)
    assert kind is not None
    images = row_images(config, job.tokens)
    generator = torch.Generator().manual_seed(2)
    ids, labels = _text(config, images, job, generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        **kind.beside(config, images, ids),
        **kind.inputs(config, images, job.batch, generator),
    }


def _text(
    config: PretrainedConfig, images: tuple[Image, ...], job: Job, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """input_ids and labels, of shape (batch, tokens)."""
    text: Any = config.get_text_config()
    laid = {token for one in images for token in one.ids}
    ordinary = torch.ones(text.vocab_size, dtype=torch.bool)
    ordinary[[t for t in special_tokens(config) | laid if 0 <= t < text.vocab_size]] = False
    words = ordinary.nonzero().flatten()
    ids = words[torch.randint(len(words), (job.batch, job.tokens), generator=generator)]
    labels = ids.clone()
    around = (job.tokens - sum(len(one.ids) for one in images)) // (len(images) + 1)
    ends = accumulate(around + len(one.ids) for one in images)
    for one, end in zip(images, ends, strict=True):
        ids[:, end - len(one.ids) : end] = torch.tensor(one.ids)
        labels[:, end - len(one.ids) : end] = IGNORED
    return ids, labels


def _pair(height: int) -> tuple[Size, Size]:
    """A square, and half of one; in patches."""
    return (height, height), (max(1, height // 2), height)


def _merged_patches(config: Any, most: int) -> tuple[Image, ...]:
    """One token for each merged patch, between two that start and end the image."""
    merge = config.vision_config.spatial_merge_size
    side = config.vision_config.patch_size * merge
    start, end = config.vision_start_token_id, config.vision_end_token_id
    return tuple(
        Image((h * side, w * side), (start, *[config.image_token_id] * (h * w), end),
              (h * merge, w * merge))
        for h, w in _pair(max(1, isqrt(most)))
    )  # fmt: skip


def _all_patches(
    config: Any, images: tuple[Image, ...], rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The patches of all images in one list, and each image's frames, height and width."""
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = rows * sum(prod(one.grid) for one in images)
    return {
        "pixel_values": torch.randn(patches, values, generator=generator),
        "image_grid_thw": torch.tensor([(1, *one.grid) for one in images] * rows),
    }


def _lines_of_patches(config: Any, most: int) -> tuple[Image, ...]:
    """One token for each patch, and one behind each line of them: `[IMG_BREAK]`, `[IMG_END]`."""
    vision, place = config.vision_config, config.image_token_id
    line_end, end = place + 2, place + 3  # as in Pixtral's tokenizer
    side = vision.patch_size
    widest = vision.image_size // side
    found = []
    for h, w in _pair(max(1, min(widest, (isqrt(4 * most + 1) - 1) // 2))):
        lines = [*[place] * w, line_end] * h
        found.append(Image((h * side, w * side), (*lines[:-1], end), (h, w)))
    return tuple(found)


def _whole_images(
    config: Any, images: tuple[Image, ...], rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """[images, channels, height, width], padded with zeros."""
    high, wide = (max(one.pixels[i] for one in images) for i in (0, 1))
    shape = (rows * len(images), config.vision_config.num_channels, high, wide)
    pixels = torch.randn(shape, generator=generator)
    for i, image in enumerate(pixels):
        h, w = images[i % len(images)].pixels
        image[:, h:] = 0
        image[:, :, w:] = 0
    return {"pixel_values": pixels}


def _images_and_sizes(
    config: Any, images: tuple[Image, ...], rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The same, and each image's own height and width."""
    sizes = torch.tensor([one.pixels for one in images] * rows)
    return _whole_images(config, images, rows, generator) | {"image_sizes": sizes}


def _pooled(config: Any, most: int) -> tuple[Image, ...]:
    """Every image is scaled to one size, and has so many tokens between two others."""
    side = config.vision_config.image_size
    places = [config.image_token_id] * config.mm_tokens_per_image
    return (Image((side, side), (config.boi_token_id, *places, config.eoi_token_id)),) * 2


def _tiles(config: Any, most: int) -> tuple[Image, ...]:
    """One token an image, which is cut into at most `max_num_tiles` tiles."""
    vision = config.vision_config
    side = vision.image_size
    # the squarest of those with the most tiles
    largest = max(vision.supported_aspect_ratios, key=lambda r: (prod(r), -abs(r[0] - r[1])))
    return tuple(
        Image((h * side, w * side), (config.image_token_id,), (h, w))
        for h, w in (largest, (1, min(2, vision.max_num_tiles)))
    )


def _tiled_images(
    config: Any, images: tuple[Image, ...], rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """[rows, images, tiles, channels, height, width], the tiles that an image lacks being zero."""
    vision = config.vision_config
    side = vision.image_size
    shape = (rows, len(images), vision.max_num_tiles, vision.num_channels, side, side)
    real = _real_tiles(config, images)
    ids = [1 + vision.supported_aspect_ratios.index([*one.grid]) for one in images]
    return {
        "pixel_values": torch.randn(shape, generator=generator) * real[..., None, None, None],
        "aspect_ratio_ids": torch.tensor([ids] * rows),
        "aspect_ratio_mask": real.expand(rows, -1, -1).contiguous(),
    }


def _real_tiles(config: Any, images: tuple[Image, ...]) -> Tensor:
    """(images, tiles): 1 where an image has a tile."""
    counts = torch.tensor([prod(one.grid) for one in images])
    return (torch.arange(config.vision_config.max_num_tiles) < counts[:, None]).long()


def _attended_tiles(config: Any, images: tuple[Image, ...], ids: Tensor) -> dict[str, Tensor]:
    """(rows, tokens, images, tiles): each token sees the tiles of the last image before it."""
    latest = (ids == config.image_token_id).cumsum(1)
    seen = latest[..., None] == torch.arange(1, len(images) + 1)
    return {"cross_attention_mask": seen[..., None] * _real_tiles(config, images)}


def _nothing(config: Any, images: tuple[Image, ...], ids: Tensor) -> dict[str, Tensor]:
    return {}


def _named(name: str) -> Callable[[Any, tuple[Image, ...], Tensor], dict[str, Tensor]]:
    """1 where a token stands for a piece of an image."""
    return lambda config, images, ids: {name: (ids == config.image_token_id).long()}


_QWEN = Kind(_merged_patches, _all_patches, _named("mm_token_type_ids"))
# By the types of the model and of its vision tower.
KINDS: Mapping[tuple[str, str], Kind] = {
    ("gemma3", "siglip_vision_model"): Kind(_pooled, _whole_images, _named("token_type_ids")),
    ("llava", "pixtral"): Kind(_lines_of_patches, _images_and_sizes, _nothing),
    ("mllama", "mllama_vision_model"): Kind(_tiles, _tiled_images, _attended_tiles),
    ("qwen2_vl", "qwen2_vl_vision"): _QWEN,
    ("qwen2_5_vl", "qwen2_5_vl_vision"): _QWEN,
}


def _kind(config: PretrainedConfig) -> Kind | None:
    tower: Any = getattr(config, "vision_config", None)
    return KINDS.get((config.model_type, getattr(tower, "model_type", "")))
