"""Image files and arrays of any kind -> uint8 arrays of one size and number of channels."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pudnet.errors import RunFailed, UserError

PIXELS_IN_FLIGHT = 2**25  # decoded side by side, whatever the number of cores
TURNS = {  # EXIF's orientation -> what sets the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGE = 2**24  # pixels of a JPEG from which on it is decoded smaller
MACHINES_FAULT = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ENODEV}


class UnreadableImage(UserError):
    """A file that is damaged, or no image at all."""


def to_array(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Any PIL image as uint8 (image_size, image_size, channels).

    Turned as its EXIF orientation says; centre-cropped to a square, so that shapes keep their proportions,
    and resized with antialiased bilinear. Transparent pixels become white, as a viewer shows them: the colour
    stored under them is arbitrary. Raises ValueError where the pixels have no known range (floating point).
    """
    image = _to_eight_bits(_upright(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image).reshape(image_size, image_size, channels)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; the other entries of its EXIF do not matter."""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


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


class _Gate:
    """Lets images be decoded side by side as long as they have so many pixels together; a larger one goes alone."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.inside, self.changed = pixels, 0, threading.Condition()

    @contextlib.contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.inside or self.inside + pixels <= self.pixels)
            self.inside += pixels
        try:
            yield
        finally:
            with self.changed:
                self.inside -= pixels
                self.changed.notify_all()


def read_image(path: Path, image_size: int, channels: int, gate: _Gate | None = None) -> np.ndarray:
    """The image file as uint8 (image_size, image_size, channels).

    A JPEG of more than `LARGE` pixels is decoded at an eighth to a half of its size, which takes that much less memory.

    Raises:
        UserError: for a file that cannot be read as an image (`UnreadableImage`), or that may not be read.
        RunFailed: when the machine fails: too many open files, an I/O error.
        MemoryError: when there is not enough.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > LARGE:
                image.draft(None, (4 * image_size, 4 * image_size))
            with (gate or _Gate(PIXELS_IN_FLIGHT)).holding(image.width * image.height):
                return to_array(image, image_size, channels)
    except MemoryError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: may not be read ({error.strerror}); change its permissions") from None
    except Exception as error:  # Pillow's decoders raise nearly every type for a damaged file
        if isinstance(error, OSError) and error.errno in MACHINES_FAULT:
            raise RunFailed(f"{path}: cannot be read now ({error.strerror}); the file may be good") from None
        raise UnreadableImage(f"{path} cannot be read as an image ({error}); repair or remove it") from error


def read_images(paths: Sequence[Path], image_size: int, channels: int) -> np.ndarray:
    """`read_image` of several files at once: uint8 (B, image_size, image_size, channels)."""
    read = partial(read_image, image_size=image_size, channels=channels, gate=_Gate(PIXELS_IN_FLIGHT))
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        return np.stack(list(pool.map(read, paths)))


def unreadable(paths: Sequence[Path]) -> set[Path]:
    """The files that cannot be read as images. What is not a file's own fault is raised, as by `read_image`."""
    gate = _Gate(PIXELS_IN_FLIGHT)

    def bad(path: Path) -> bool:
        try:
            read_image(path, 8, 1, gate)
        except UnreadableImage:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return {path for path, is_bad in zip(paths, pool.map(bad, paths), strict=True) if is_bad}


def convert(images: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """uint8 (B, H, W) or (B, H, W, C) with C 1 or 3 as uint8 (B, image_size, image_size, channels)."""
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    if images.shape[-1] == 1:
        images = images[..., 0]  # PIL's grey images have no channel axis
    return np.stack([to_array(Image.fromarray(image), image_size, channels) for image in images])
