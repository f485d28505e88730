"""Numbers and pictures as text that a page can hold: arrays in base64, pictures as data URLs, many of them as a sprite.

A table's row is a picture too: a strip of a cell a feature, coloured from the feature's first to its last percentile.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddvi.figures import shades
from ddvi.preprocessing import Preprocessing

_LARGEST_SIDE = 48  # pixels of a tile
_MOST_FEATURES = 256  # cells of a strip
_LARGEST_SPRITE = 8_000_000  # values: 5,000 tiles of MNIST are half of it, colours are compressed


def packed(values: Tensor, kind: str = "float32") -> str:
    """An array as base64 of its little-endian bytes, row after row."""
    array = values.detach().cpu().numpy().astype(np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def picture(pixels: Tensor) -> str:
    """Pixels (H, W, C) in [0, 1], one channel or three, as a data URL: grey ones exactly, coloured ones nearly."""
    from PIL import Image

    values = (pixels.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    photograph = values.shape[-1] == 3 and values.size > 200_000
    image, stream = Image.fromarray(values if values.shape[-1] == 3 else values[..., 0]), io.BytesIO()
    if photograph:
        image.save(stream, "JPEG", quality=85)
    else:
        image.save(stream, "PNG")
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def coloured(values: Tensor) -> Tensor:
    """Values in [0, 1] (*) on the scale cividis, which colour-blind readers see as everyone does: (*, 3)."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps["cividis"](values.detach().cpu().clamp(0, 1).double().numpy())[..., :3])


@dataclass(frozen=True)
class Tiles:
    """How examples of a data set look.

    Args:
        preprocessing: of the model, which knows the data's units.
        image: whether they are images.
        low, high: values (*event) that stand for 0 and 1; of images numbers.
    """

    preprocessing: Preprocessing
    image: bool
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, preprocessing: Preprocessing, raw: Tensor, maximum: float | None) -> Tiles:
        """From test examples as stored (N, *event), on the model's device, and the value that stands for 1.0."""
        values = preprocessing.restore(preprocessing.picture(raw)).double()
        if values.dim() == 4:
            return cls(preprocessing, True, *map(values.new_tensor, shades(preprocessing, raw, maximum)))
        low, high = (torch.quantile(values.flatten(1), share, dim=0) for share in (0.01, 0.99))
        return cls(preprocessing, False, low, torch.where(high > low, high, low + 1))

    def pixels(self, x: Tensor) -> Tensor:
        """Means or observations (N, *event) as pixels (N, C, H, W) in [0, 1]."""
        values = (self.preprocessing.restore(x).double() - self.low) / (self.high - self.low)
        if self.image:
            values = values if values.shape[1] == 3 else values[:, :1]
            height, width = values.shape[2:]
            if max(height, width) > _LARGEST_SIDE:
                side = _LARGEST_SIDE / max(height, width)
                size = (max(1, round(height * side)), max(1, round(width * side)))
                values = torch.nn.functional.adaptive_avg_pool2d(values, size)
            return values.cpu()
        strip = values.flatten(1)
        if strip.shape[1] > _MOST_FEATURES:
            strip = torch.nn.functional.adaptive_avg_pool1d(strip[:, None], _MOST_FEATURES)[:, 0]
        return coloured(strip).movedim(-1, 1)[:, :, None]

    def raw(self, raw: Tensor) -> Tensor:
        """Examples as stored as pixels."""
        return self.pixels(self.preprocessing.picture(raw))

    def most(self, raw: Tensor) -> int:
        """How many examples like these a sprite takes."""
        return max(1, _LARGEST_SPRITE // self.raw(raw[:1]).numel())


def sprite(pixels: Tensor, columns: int | None = None) -> dict[str, Any]:
    """Pixels (N, C, H, W) as one picture without gaps, with what is needed to find a tile in it."""
    count, channels, height, width = pixels.shape
    columns = columns or max(1, min(count, math.ceil(math.sqrt(count * height / width))))
    rows = math.ceil(count / columns)
    padded = torch.cat([pixels, pixels.new_zeros(rows * columns - count, channels, height, width)])
    canvas = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    whole = canvas.reshape(rows * height, columns * width, channels)
    return {"url": picture(whole), "width": width, "height": height, "columns": columns, "count": count}
