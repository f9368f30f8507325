"""Converts image files and arrays of any kind to uint8 arrays of one size and number of channels."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pudnet.errors import RunFailed, UnreadableImage, is_out_of_memory, not_its_fault

PIXELS_IN_FLIGHT = 2**26  # at most so many are decoded at once, whatever the number of cores
ALONE = 2**25  # an image with more pixels is decoded alone
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow opens no larger image
BYTES_A_PIXEL = 24  # at most, with a WebP's canvases and what transparency takes
TURNS = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGE = 2**22  # a JPEG with more pixels is decoded at a smaller size


def to_array(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Convert any PIL image to uint8 (image_size, image_size, channels).

    The image is turned upright by its EXIF orientation, cropped to a square at its centre (so that shapes keep their
    proportions) and resized, bilinear with antialiasing. Transparent pixels become white, as in an image viewer, since
    the colour stored under them is arbitrary. Raises ValueError if the range of the pixels is not known (floats).
    """
    image = _to_eight_bits(_upright(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which would copy it
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image).reshape(image_size, image_size, channels)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image upright by its EXIF orientation."""
    image.load()  # first, since Pillow itself turns a TIFF when it loads it, and then removes its orientation
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except MemoryError:
        raise
    except Exception:  # the EXIF data are damaged
        return image
    return image if turn is None else image.transpose(turn)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey images to 8 bits, where PIL would clip them. Images of other modes stay as they are."""
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
    """Lets several threads decode images at once, as long as the images together have at most so many pixels."""

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


def read_image(path: Path, image_size: int, channels: int) -> np.ndarray:
    """Read an image file as uint8 (image_size, image_size, channels).

    A JPEG of more than `LARGE` pixels is decoded at an eighth to a half of its size, but at least at four times the
    size that is needed.

    Raises:
        UserError: if the file is no image (`UnreadableImage`), or the user has no permission to read it.
        RunFailed: if the machine fails: too little memory, too many open files, an I/O error.
    """
    try:
        return _decode(path, image_size, channels, lambda pixels: contextlib.nullcontext())
    except Exception as error:  # Pillow's decoders raise nearly every type for a damaged file
        raise _reason(path, error) from error


def _decode(path: Path, image_size: int, channels: int, hold: Callable[[int], AbstractContextManager]) -> np.ndarray:
    """`read_image`, but with Pillow's own errors. Enters `hold(pixels)` before it allocates memory for the pixels."""
    if pixels := _webp_pixels(path):  # Pillow allocates them when it opens a WebP
        with hold(pixels), Image.open(path) as image:
            return to_array(image, image_size, channels)
    with Image.open(path) as image:
        pixels = image.width * image.height
        if pixels > LARGE:
            image.draft(None, (4 * image_size, 4 * image_size))
        if not image.info.get("progressive"):  # a progressive JPEG needs memory for its full size anyway
            pixels = image.width * image.height
        with hold(pixels):
            return to_array(image, image_size, channels)


def _webp_pixels(path: Path) -> int:
    """Width times height of a WebP file, from its header; 0 for any other file."""
    with path.open("rb") as file:
        head = file.read(30)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0
    if head[12:16] == b"VP8X":
        return (1 + int.from_bytes(head[24:27], "little")) * (1 + int.from_bytes(head[27:30], "little"))
    if head[12:16] == b"VP8L":
        both = int.from_bytes(head[21:25], "little")
        return (1 + both % 2**14) * (1 + (both >> 14) % 2**14)
    return (int.from_bytes(head[26:28], "little") % 2**14) * (int.from_bytes(head[28:30], "little") % 2**14)


def _reason(path: Path, error: Exception) -> Exception:
    """Make the error for a file that was not decoded: `UnreadableImage`, or another if the machine failed."""
    if isinstance(error, OSError) and (reason := not_its_fault(path, error)):
        return reason
    unknown = isinstance(error, UnidentifiedImageError)  # its text holds the path
    if (not unknown and is_out_of_memory(error)) or _memory_is_short(path):
        return RunFailed(f"{path}: there is too little memory to decode it; free some, or make the image smaller")
    return UnreadableImage(f"{path} cannot be read as an image ({error}); repair or remove it")


def _memory_is_short(path: Path) -> bool:
    """Whether an image's pixels do not fit in memory. (Some decoders raise another error then.)"""
    pixels = 0
    with contextlib.suppress(Exception):
        pixels = _webp_pixels(path)
        with Image.open(path) as image:
            pixels = image.width * image.height
    try:
        np.empty(BYTES_A_PIXEL * min(pixels, MOST_PIXELS), np.uint8)
    except MemoryError:
        return True
    return False


def _side_by_side(paths: Sequence[Path], image_size: int, channels: int) -> list[np.ndarray | None]:
    """Decode images in several threads. Returns None for those that have to be decoded alone.

    These are images of more than `ALONE` pixels, since every thread would keep memory for one, and images that failed,
    perhaps because memory was short.
    """
    gate = _Gate(PIXELS_IN_FLIGHT)

    def hold(pixels: int) -> AbstractContextManager:
        if pixels > ALONE:
            raise MemoryError("not beside others")
        return gate.holding(pixels)

    def read(path: Path) -> np.ndarray | None:
        try:
            return _decode(path, image_size, channels, hold)
        except Exception:  # if it fails again alone, that error is reported
            return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        images = list(pool.map(read, paths))
    if any(image is None for image in images):
        gc.collect()
    return images


def read_images(paths: Sequence[Path], image_size: int, channels: int) -> np.ndarray:
    """Read several files as `read_image` does: uint8 (B, image_size, image_size, channels)."""
    found = zip(paths, _side_by_side(paths, image_size, channels), strict=True)
    return np.stack([read_image(path, image_size, channels) if image is None else image for path, image in found])


def unreadable(paths: Sequence[Path]) -> set[Path]:
    """The files that are no images. Raises the other errors of `read_image`."""
    found = zip(paths, _side_by_side(paths, 8, 1), strict=True)
    return {path for path, image in found if image is None and _is_unreadable(path)}


def _is_unreadable(path: Path) -> bool:
    try:
        read_image(path, 8, 1)
    except UnreadableImage:
        return True
    return False


def convert(images: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """Convert uint8 (B, H, W) or (B, H, W, C), with C 1 to 4, to uint8 (B, image_size, image_size, channels)."""
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    if images.shape[-1] == 1:
        images = images[..., 0]  # PIL's grey images have no channel axis
    return np.stack([to_array(Image.fromarray(image), image_size, channels) for image in images])
