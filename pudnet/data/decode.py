"""Image files and arrays of any kind -> uint8 arrays of one size and number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pudnet.errors import UserError


def to_array(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Any PIL image as uint8 (image_size, image_size, channels).

    Turned as its EXIF orientation says; centre-cropped to a square, so that shapes keep their proportions,
    and resized with antialiased bilinear. Transparent pixels become white, as a viewer shows them: the colour
    stored under them is arbitrary. Raises ValueError where the pixels have no known range (floating point).
    """
    image = _to_eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image).reshape(image_size, image_size, channels)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which PIL's own conversion would clip instead; leave other modes alone."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image)
    if wide.min() < 0 or wide.max() > 65_535:
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return Image.fromarray(eight_bits(wide))


def eight_bits(wide: np.ndarray) -> np.ndarray:
    """Values 0..65,535 as uint8, rounded."""
    return ((wide.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def read_image(path: Path, image_size: int, channels: int) -> np.ndarray:
    """The image file as uint8 (image_size, image_size, channels); UserError names a file it cannot read."""
    try:
        with Image.open(path) as image:
            return to_array(image, image_size, channels)
    except Exception as error:  # Pillow's decoders raise nearly every type for a damaged file
        raise UserError(f"{path} cannot be read as an image ({error}); repair or remove it") from error


def read_images(paths: Sequence[Path], image_size: int, channels: int) -> np.ndarray:
    """`read_image` of several files at once: uint8 (B, image_size, image_size, channels)."""
    read = partial(read_image, image_size=image_size, channels=channels)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        return np.stack(list(pool.map(read, paths)))


def convert(images: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """uint8 (B, H, W) or (B, H, W, C) with C 1 or 3 as uint8 (B, image_size, image_size, channels)."""
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    if images.shape[-1] == 1:
        images = images[..., 0]  # PIL's grey images have no channel axis
    return np.stack([to_array(Image.fromarray(image), image_size, channels) for image in images])
