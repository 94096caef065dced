"""A batch with images for any image-text class of transformers, and one of text alone.

Which image inputs a class wants is told by the arguments of its forward, and their sizes by its
config; `KINDS` holds a recipe for each kind of input, not for each class. How many tokens stand for
an image is what the class itself says: the rows that `get_image_features` gives.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from lorafuse.patches.label_places import IGNORED
from lorafuse.plugin.tiny_config import TEXT_WORDS, WORDS

# Rows of a batch, tokens of text in each besides an image's, and padding behind the last row.
ROWS, TEXT, PADDING = 3, 14, 3
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "im_patch_id")
_STARTS = ("vision_start_token_id", "image_start_token_id", "im_start_id", "boi_token_id")
_ENDS = ("vision_end_token_id", "image_end_token_id", "im_end_id", "eoi_token_id")


@dataclass(frozen=True)
class Images:
    """Image inputs of a forward.

    Attributes:
        inputs: by the argument's name.
        rows: which rows of the batch hold an image, one each.
        tokens: for each of them, how many tokens stand for it; None: as many as
            `get_image_features` gives for it.
        beside: what else the forward wants, made from input_ids and the mask of image tokens.
    """

    inputs: Mapping[str, Any]
    rows: tuple[int, ...] = (0, 2)
    tokens: tuple[int, ...] | None = None
    beside: Callable[[Tensor, Tensor], Mapping[str, Any]] = lambda ids, is_image: {}


class Asked:
    """What a class's forward takes, and the sizes that its config states."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.takes = set(inspect.signature(type(model).forward).parameters)
        self.config: Any = model.config
        self.vision: Any = getattr(self.config, "vision_config", self.config)
        self.random = torch.Generator().manual_seed(0)

    def size(self, *names: str, default: int) -> int:
        """The first of the fields that the vision config or the config itself holds."""
        for config in (self.vision, self.config):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, list | tuple) and value:
                    value = value[0]
                if isinstance(value, int):
                    return value
        return default

    @property
    def place(self) -> int:
        """The token that stands for an image, or for the features that are put in its place."""
        return next(iter(_first(self.config, _IMAGE_TOKENS)), WORDS - 1)

    @property
    def channels(self) -> int:
        return self.size("num_channels", "in_channels", "in_chans", default=3)

    @property
    def image(self) -> int:
        """Pixels of a side."""
        return self.size("image_size", default=32)

    @property
    def patch(self) -> int:
        return self.size("patch_size", "encoder_patch_size", default=8)

    def pixels(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)


ALL = tuple(range(ROWS))
NONE = (0,) * ROWS


def _images(asked: Asked) -> Iterator[Images]:
    """[images, channels, height, width], of some rows or, without tokens of their own, of all."""
    shape = (asked.channels, asked.image, asked.image)
    more: dict[str, Any] = {}
    if "high_res_pixel_values" in asked.takes:
        side = asked.config.high_res_vision_config.image_size
        more["high_res_pixel_values"] = asked.pixels(2, asked.channels, side, side)
    yield Images({"pixel_values": asked.pixels(2, *shape)} | more)
    if "image_sizes" in asked.takes:
        more["image_sizes"] = torch.tensor([[asked.image, asked.image]] * 2)
        yield Images({"pixel_values": asked.pixels(2, *shape)} | more)
    yield Images({"pixel_values": asked.pixels(ROWS, *shape)}, ALL, NONE)


def _named_images(asked: Asked) -> Iterator[Images]:
    images = next(_images(asked))
    yield Images({"pixel_values_images": images.inputs["pixel_values"]})


def _grids(asked: Asked) -> Iterator[Images]:
    """Patches of all images in one list, flat or not, and each image's grid."""
    time = asked.size("temporal_patch_size", "patch_temporal", default=1)
    for shape in ((asked.channels * time * asked.patch**2,), (asked.channels, *[asked.patch] * 2)):
        for grids in ([[1, 4, 6], [1, 4, 4]], [[1, 4, 6]]):
            thw = torch.tensor(grids)
            inputs = {
                "pixel_values": asked.pixels(int(thw.prod(1).sum()), *shape),
                "image_grid_thw": thw,
            }
            if "image_merge_sizes" in asked.takes:
                inputs["image_merge_sizes"] = torch.tensor([2] * len(grids))
            yield Images(inputs, (0, 2)[: len(grids)])


def _padded_patches(asked: Asked) -> Iterator[Images]:
    """[images, patches, pixels] with padding, and each image's height and width in patches."""
    shapes = torch.tensor([[4, 6], [4, 4]])
    mask = torch.arange(24) < shapes.prod(1, keepdim=True)
    pixels = asked.pixels(2, 24, asked.channels * asked.patch**2) * mask[..., None]
    yield Images(
        {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.long()}
    )


def _placed_patches(asked: Asked) -> Iterator[Images]:
    """[images, patches, pixels] with padding, and each patch's x and y (-1: padding)."""
    place = torch.full((2, 24, 2), -1)
    place[0] = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    place[1, :16] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    for patch in (asked.patch, asked.patch * asked.size("pooling_kernel_size", default=1)):
        pixels = asked.pixels(2, 24, asked.channels * patch**2) * (place[..., :1] >= 0)
        yield Images({"pixel_values": pixels, "image_position_ids": place})


def _strips(asked: Asked) -> Iterator[Images]:
    """All images as one strip of patches, and each one's height and width in patches."""
    sizes = torch.tensor([[8, 4], [8, 4]])
    strip = asked.pixels(1, asked.channels, asked.patch, asked.patch * int(sizes.prod(1).sum()))
    yield Images({"pixel_values": strip, "target_sizes": sizes})


def _tiles(asked: Asked) -> Iterator[Images]:
    """[rows, images, tiles, channels, height, width], and who attends to which tile."""
    tiles = asked.size("max_num_tiles", default=4)
    shape = (ROWS, 1, tiles, asked.channels, asked.image, asked.image)
    real = torch.arange(tiles) < 2
    inputs = {
        "pixel_values": asked.pixels(*shape),
        "aspect_ratio_ids": torch.full((ROWS, 1), 2),
        "aspect_ratio_mask": real.long().expand(ROWS, 1, tiles),
    }

    def beside(ids: Tensor, is_image: Tensor) -> dict[str, Tensor]:
        behind = is_image.long().cumsum(1) > 0
        return {"cross_attention_mask": (behind[..., None, None] & real).long()}

    yield Images(inputs, (0, 2), (1, 1), beside)


def _attended(asked: Asked) -> Iterator[Images]:
    """[rows, images, channels, height, width], and which token attends to which image."""
    shape = (ROWS, 1, asked.channels, asked.image, asked.image)

    def beside(ids: Tensor, is_image: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(*ids.shape, 1, dtype=torch.int64)
        mask[0, :5] = mask[1] = 0
        return {"image_attention_mask": mask}

    yield Images({"pixel_values": asked.pixels(*shape)}, ALL, NONE, beside)


def _of_rows(asked: Asked) -> Iterator[Images]:
    """[rows, images, channels, height, width]; an image of zeros is none."""
    pixels = asked.pixels(ROWS, 1, asked.channels, asked.image, asked.image)
    pixels[1] = 0
    yield Images({"pixel_values": pixels})


def _in_place(asked: Asked) -> Iterator[Images]:
    """An image a row, and where in the row its features are put."""
    count = asked.size("latent_query_num", default=4)

    def beside(ids: Tensor, is_image: Tensor) -> dict[str, Tensor]:
        return {"image_embeds_position_mask": is_image.long()}

    for one in _flat_patches(asked) if "flattened_patches" in asked.takes else _images(asked):
        if len(one.rows) == ROWS:
            yield Images(one.inputs, ALL, (count,) * ROWS, beside)


def _flat_patches(asked: Asked) -> Iterator[Images]:
    """[rows, patches, 2 + pixels], a patch's row and column in front."""
    place = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    pixels = asked.pixels(ROWS, 16, asked.channels * asked.patch**2)
    inputs = {"flattened_patches": torch.cat([place.expand(ROWS, -1, -1), pixels], dim=2)}
    if "input_ids" not in asked.takes:
        inputs["attention_mask"] = torch.ones(ROWS, 16, dtype=torch.int64)
    yield Images(inputs, ALL, NONE)


def _image_patches(asked: Asked) -> Iterator[Images]:
    """[images, patches, pixels] without a grid."""
    pixels = asked.pixels(2, 16, asked.channels * asked.patch**2)
    yield Images({"image_patches": pixels}, (0, 2), (16, 16))


def _asked_for(asked: Asked) -> Iterator[Images]:
    """An image a row, with a question of its own to the model that looks at it."""
    shape: tuple[int, ...] = (asked.channels, asked.image, asked.image)
    queries = asked.size("num_query_tokens", default=4)
    ids = torch.randint(3, TEXT_WORDS, (ROWS, 6), generator=asked.random)
    inputs = {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    if not hasattr(asked.model, "get_image_features"):  # it looks at videos
        shape, queries = (2, *shape), 2 * queries
    yield Images(inputs | {"pixel_values": asked.pixels(ROWS, *shape)}, ALL, (queries,) * ROWS)


def _boxes(asked: Asked) -> Iterator[Images]:
    """A page a row, and where on it each token stands."""
    inputs = {"pixel_values": asked.pixels(ROWS, asked.channels, asked.image, asked.image)}

    def beside(ids: Tensor, is_image: Tensor) -> dict[str, Tensor]:
        corner = torch.rand(*ids.shape, 2, generator=asked.random) * 0.5
        return {"bbox": torch.cat([corner, corner + 0.3], dim=2)}

    yield Images(inputs, ALL, NONE, beside)


def _pinpoints(asked: Asked) -> Iterator[Images]:
    """[images, parts, channels, height, width]: the whole image and its parts, and its size."""
    height, width = asked.config.image_grid_pinpoints[0]
    parts = 1 + (height // asked.image) * (width // asked.image)
    pixels = asked.pixels(2, parts, asked.channels, asked.image, asked.image)
    sizes = torch.tensor([[height, width], [height, width - 4]])
    yield Images({"pixel_values": pixels, "image_sizes": sizes})


# The first whose argument the forward takes, or whose field the config has.
KINDS: dict[str, Callable[[Asked], Iterator[Images]]] = {
    "image_grid_thw": _grids,
    "spatial_shapes": _padded_patches,
    "image_position_ids": _placed_patches,
    "target_sizes": _strips,
    "cross_attention_mask": _tiles,
    "image_attention_mask": _attended,
    "pixel_attention_mask": _of_rows,
    "image_embeds_position_mask": _in_place,
    "qformer_input_ids": _asked_for,
    "flattened_patches": _flat_patches,
    "image_patches": _image_patches,
    "bbox": _boxes,
    "pixel_values_images": _named_images,
    "image_grid_pinpoints": _pinpoints,
    "pixel_values": _images,
}


def image_batch(model: nn.Module) -> dict[str, Any]:
    """The arguments of a training step of `model`, a class without adapters, with images.

    Raises:
        Exception: whatever the class raises when it is asked for the features of an image.
    """
    asked = Asked(model)
    kind = next((k for k in KINDS if k in asked.takes or getattr(asked.config, k, None)), None)
    if kind is None:
        raise ValueError("its forward takes no image")
    refusal: Exception | None = None
    for images in KINDS[kind](asked):
        try:
            tokens = _rows_of_features(asked, images) if images.tokens is None else images.tokens
            found = _text(asked, dict(zip(images.rows, tokens, strict=True)))
        except Exception as error:  # of a class that wants the next form
            refusal = error if refusal is None else refusal
            continue
        is_image = found["input_ids"] == asked.place
        found |= {**images.inputs, **images.beside(found["input_ids"], is_image)}
        return {name: value for name, value in found.items() if name in (*asked.takes, "labels")}
    assert refusal is not None
    raise refusal


def text_batch(model: nn.Module) -> dict[str, Any]:
    """The same without images."""
    asked = Asked(model)
    return {name: value for name, value in _text(asked, {}).items() if name in asked.takes}


def _rows_of_features(asked: Asked, images: Images) -> list[int]:
    """Of each image."""
    model: Any = asked.model
    holder = model.base_model if hasattr(model.base_model, "get_image_features") else model
    ask = holder.get_image_features
    takes = inspect.signature(ask).parameters
    all_of_them = any(p.kind is p.VAR_POSITIONAL for p in takes.values())
    inputs = {n: value for n, value in images.inputs.items() if n in takes or all_of_them}
    for name, p in takes.items():
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD:
            inputs.setdefault(name, getattr(asked.config, name, None))
    with torch.no_grad():
        features = ask(**inputs)
    if isinstance(features, ModelOutput):
        layered = features.get("deepstack_features")
        pooled = getattr(features, "pooler_output", None)
        if layered and isinstance(layered[0], tuple):  # (layer, each image's)
            features = layered[0][1]
        else:
            features = features["last_hidden_state"] if pooled is None else pooled
    count = len(images.rows)
    rows = [int(one.shape[:-1].numel()) for one in features]
    if len(rows) == count:
        return rows
    # Of all images at once: [rows, K] or [1, rows, K].
    if count > 1 and "image_grid_thw" in images.inputs:
        raise ValueError("its features do not tell whose they are, and the images differ in size")
    whole = features.shape[0] if isinstance(features, Tensor) and features.dim() == 2 else sum(rows)
    return [whole // count] * count


def special_tokens(config: PretrainedConfig) -> set[int]:
    """Every token id that a config, or one within it, gives a meaning."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found |= special_tokens(value)
        elif isinstance(value, int) and name.endswith(("_id", "_index")):
            found.add(value)
    return found


def _first(config: Any, names: Sequence[str]) -> list[int]:
    values = (getattr(config, name, None) for name in names)
    return [value for value in values if isinstance(value, int)][:1]


def _text(asked: Asked, images: Mapping[int, int]) -> dict[str, Any]:
    """Token ids, mask and labels, with so many image tokens in these rows."""
    config = asked.config
    words = torch.tensor(sorted({*range(3, TEXT_WORDS)} - special_tokens(config) - {asked.place}))
    rows = []
    longest = max(images.values(), default=0) + TEXT
    for row in range(ROWS):
        around = [_first(config, names) if row in images else [] for names in (_STARTS, _ENDS)]
        image = [*around[0], *[asked.place] * images.get(row, 0), *around[1]]
        text = words[torch.randint(len(words), (longest + 2 - len(image),), generator=asked.random)]
        rows.append(torch.tensor([*text[: 3 + row], *image, *text[3 + row :]]))
    ids, mask = torch.stack(rows), torch.ones(ROWS, longest + 2, dtype=torch.int64)
    mask[-1, -PADDING:] = 0
    is_image = ids == asked.place
    found = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(is_image | (mask == 0), IGNORED),
    }
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in asked.takes:
            found[name] = is_image.long()
    return found
