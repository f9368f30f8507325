"""A user's own images, in every form they come in: the same pixels as the model's training data was made of."""

import errno
import os
import re
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pudnet import Predictor
from pudnet.data import decode
from pudnet.data.decode import _Gate, read_image, read_images, to_array, unreadable
from pudnet.data.sources import open_source
from pudnet.data.user_images import ConvertedImages, encode_labels, image_set, open_folder
from pudnet.errors import RunFailed, UserError

ROOT = Path(__file__).parent.parent


@dataclass
class Form:
    image_size: int = 16
    channels: int = 3


def picture(height, width, channels, seed=0):
    """A smooth random picture, uint8 (height, width, channels)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return np.array(image).reshape(height, width, channels)


def pixels(images, form=None):
    return torch.cat(list(image_set(images, form or Form()).chunks(500)))


def close(found, expected, tolerance=1.0):
    return (found.float() - torch.as_tensor(expected).float()).abs().max() <= tolerance


def test_every_form_of_the_same_images_gives_the_same_pixels(tmp_path):
    images = np.stack([picture(24, 40, 3, seed) for seed in range(4)])
    for row, image in enumerate(images):
        (tmp_path / "ab"[row % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[row % 2] / f"{row}.png")
    source = torch.from_numpy(np.concatenate(list(open_source(f"folder:{tmp_path}", tmp_path, 16, 3).batches())))
    order = [0, 2, 1, 3]  # class by class
    floats = torch.tensor(images).permute(0, 3, 1, 2) / 255
    with pytest.warns(ConvertedImages, match=r"images of 40x24 px and 3 channel\(s\) become 16x16 px and 3"):
        assert torch.equal(pixels(images)[order], source)
        assert torch.equal(pixels(floats)[order], source)
        assert torch.equal(pixels(floats.movedim(1, 3))[order], source)  # channels last: clear all the same
        assert torch.equal(pixels(torch.tensor(images).movedim(3, 1))[order], source)
        assert torch.equal(pixels(images.astype(np.uint16) * 257)[order], source)
        assert torch.equal(pixels(torch.tensor(images.astype(np.uint16) * 257))[order], source)
    same = ([Image.fromarray(image) for image in images], list(images), list(floats), TensorDataset(floats))
    for form in same:
        with pytest.warns(ConvertedImages, match="images of 40x24 px") as said:
            assert torch.equal(pixels(form)[order], source)
        assert said[0].filename == __file__  # it points at the user's line
    with pytest.warns(ConvertedImages, match="images of 40x24 px"):
        assert torch.equal(pixels(tmp_path), source) and torch.equal(pixels(str(tmp_path)), source)


def test_a_set_of_many_sizes_warns_once(tmp_path):
    images = [Image.fromarray(picture(20 + row, 24, 3)).convert("P" if row == 0 else "RGB") for row in range(9)]
    sets = images, [np.asarray(image.convert("RGB")) for image in images], Listed(images)
    for given in sets:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pixels(given)
        assert ["images of 24x20 px and 3 channel(s)" in str(warning.message) for warning in said] == [True]


class Listed(Dataset):
    """A Dataset of what a list has."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row]


def test_an_image_in_a_list_that_cannot_be_read_is_named(tmp_path):
    Image.fromarray(picture(40, 24, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    images = [Image.open(tmp_path / f"{name}.png") for name in ("whole", "cut")]
    with pytest.raises(UserError, match="image 1: OSError: .*truncated"), pytest.warns(ConvertedImages):
        pixels(images)


def test_images_of_the_models_form_are_left_as_they_are():
    images = picture(16, 16, 3)[None].repeat(2, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pixels(images), torch.from_numpy(images))
        assert close(pixels(torch.tensor(images).movedim(3, 1) / 255), images, 1e-4)  # floats are not rounded


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16", "1", "CMYK"])
def test_any_size_and_mode_is_read(mode, tmp_path):
    """Smaller and larger than the model's."""
    (tmp_path / "a").mkdir()
    for size in (15, 512):
        grey = np.full((size, size), 120, np.uint8)
        if mode == "I;16":
            image = Image.fromarray(grey.astype(np.uint16) * 257)
        else:
            image = Image.fromarray(grey).convert("RGB" if mode == "CMYK" else mode if mode != "1" else "L")
            image = image.convert(mode)
        image.save(tmp_path / "a" / f"{size}.tif")
    found = pixels(tmp_path).float()
    assert found.shape == (2, 16, 16, 3)
    for image in found:
        assert abs(image.mean() - 120) < (40 if mode == "1" else 2)  # black and white: dithered


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_of_any_channels_become_the_models(channels):
    array = np.full((3, 20, 20, channels), 200, np.uint8)
    if channels in (2, 4):
        array[..., -1] = 255  # opaque
    for wanted in (1, 3):
        with pytest.warns(ConvertedImages):
            found = pixels(array, Form(16, wanted))
        assert found.shape == (3, 16, 16, wanted) and close(found, 200)


def test_only_what_is_looked_at_is_read():
    """Of a Dataset that knows its labels, a prediction reads the first images of each class."""

    class Counting(Dataset):
        targets = np.arange(10_000) % 4

        def __init__(self):
            self.read = []

        def __len__(self):
            return 10_000

        def __getitem__(self, row):
            self.read.append(row)
            return torch.full((3, 16, 16), (row % 4) / 4), int(self.targets[row])

    dataset = Counting()
    network = Predictor.untrained("convnet3", 3, 16).predict(dataset)
    assert network.classes == (0, 1, 2, 3) and sorted(dataset.read) == list(range(52))  # 13 of each


def test_datasets_are_read_by_row_and_bring_their_labels():
    class Words(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, row):
            return Image.fromarray(picture(20, 20, 3, row)), ("cat", "dog")[row % 2]

    predictor = Predictor.untrained("convnet3", 3, 16)
    assert predictor.predict(Words()).classes == ("cat", "dog")
    with pytest.raises(UserError, match="labels: a folder or Dataset has its own labels; do not pass any"):
        predictor.predict(Words(), ["cat"] * 6)
    images = TensorDataset(torch.rand(5, 3, 16, 16))  # without labels
    assert len(predictor.predict(Words()).classify(images)) == 5


class Broken(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, row):
        raise OSError("the disk is gone")


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Broken(), "item 0 of the Dataset cannot be read .*the disk is gone"),
        (Endless(), "a Dataset must have a length"),
        (TensorDataset(torch.zeros(0, 3, 16, 16), torch.zeros(0)), "the Dataset has none"),
        (TensorDataset(torch.zeros(4, 3, 16, 16)), "item 0 of the Dataset is not .image, label."),
    ],
)
def test_unfit_datasets_are_refused(dataset, message):
    with pytest.raises(UserError, match=message):
        Predictor.untrained("convnet3", 3, 16).predict(dataset)


class Shade(Enum):
    DARK = 1
    LIGHT = 2


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([3, -1, 3], (-1, 3)),
        ([0.5, 1.5, 0.5], (0.5, 1.5)),
        ([True, False, True], (False, True)),
        ([1, "a", 1], (1, "a")),
        ([np.int64(2), np.int64(1), np.int64(2)], (1, 2)),
        ([torch.tensor(2), torch.tensor(1), torch.tensor(2)], (1, 2)),
        ([np.array(2), np.array(1), np.array(2)], (1, 2)),
        ([Shade.LIGHT, Shade.DARK, Shade.LIGHT], ("Shade.DARK", "Shade.LIGHT")),
        ([("x", 1), ("a", 2), ("x", 1)], ("('a', 2)", "('x', 1)")),
        ([b"b", b"a", b"b"], ("a", "b")),
        (np.array(["2026-02-01", "2026-01-01", "2026-02-01"], "datetime64[ns]"), None),
    ],
)
def test_labels_of_any_type(labels, classes):
    encoded, names = encode_labels(labels, 3)
    if classes is None:
        assert [name[:10] for name in names] == ["2026-01-01", "2026-02-01"]
    else:
        assert names == classes and [type(a) for a in names] == [type(a) for a in classes]
    assert encoded[0] == encoded[2] != encoded[1] and sorted(set(encoded.tolist())) == [0, 1]


def test_bad_files_are_named_or_left_out_and_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for row in range(3):
            Image.fromarray(picture(20, 20, 3, row)).save(tmp_path / name / f"{row}.png")
    whole = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    predictor = Predictor.untrained("convnet3", 3, 16)
    with pytest.raises(UserError, match=r"a/1.png cannot be read as an image"):
        predictor.predict(tmp_path)
    images = open_folder(tmp_path, predictor.card, skip_bad=True)
    assert images.count == 5 and images.skipped == (tmp_path / "a" / "1.png",)
    assert predictor.predict(images).classes == ("a", "b")
    for row in (0, 2):
        (tmp_path / "a" / f"{row}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images of a can be read"):
        open_folder(tmp_path, predictor.card, skip_bad=True)


def test_loose_images_are_classified_but_not_predicted_from(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(picture(20, 20, 3)).save(tmp_path / name / "x.png")
    predictor = Predictor.untrained("convnet3", 3, 16)
    network = predictor.predict(tmp_path)
    Image.fromarray(picture(20, 20, 3)).save(tmp_path / "loose.png")
    for hidden in (tmp_path / ".thumbs", tmp_path / "a" / ".cache", tmp_path / "a" / "folder.png"):
        hidden.mkdir()
        Image.fromarray(picture(20, 20, 3)).save(hidden / ".x.png" if hidden.suffix == ".png" else hidden / "x.png")
    images = open_folder(tmp_path, predictor.card)
    assert [file.name for file in images.files] == ["x.png", "x.png", "loose.png"]
    assert images.labels == ["a", "b", None] and len(network.classify(tmp_path)) == 3
    with pytest.raises(UserError, match="loose.png: lies beside the subfolders, so it has no class"):
        predictor.predict(tmp_path)
    with pytest.raises(UserError, match="b: has no subfolders; it needs one subfolder of images for each class"):
        predictor.predict(tmp_path / "b")


@pytest.mark.parametrize("dtype", [">f4", "<f8", "f2", np.longdouble])
def test_floats_of_any_kind_and_read_only_arrays_will_do(dtype):
    images = picture(16, 16, 3)[None]
    floats = (images.transpose(0, 3, 1, 2) / 255).astype(dtype)
    floats.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(pixels(floats), images, 0.2) and close(pixels([floats[0]]), images, 0.2)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits_of_either_byte_order_will_do(dtype):
    images = picture(16, 16, 3)[None]
    assert close(pixels(images.astype(dtype) * 257), images, 0.6)


def test_floats_may_be_a_rounding_error_outside_of_0_to_1():
    """As `torchvision`'s antialiased resizing makes white a little more than 1."""
    white = torch.full((1, 3, 20, 20), 1.0000002)
    assert (pixels(white) == 255).all()


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), torch.zeros(3, 32, 32)])
def test_one_image_is_not_taken_for_many(image):
    with pytest.raises(UserError, match="looks like one image; give .N, ...., as `image.None.`"):
        pixels(image)


MISSING = {
    "strings": pd.Series(["a", None, "b"], dtype="string"),
    "arrow strings": pd.Series(["a", None, "b"], dtype="string[pyarrow]"),
    "nullable integers": pd.Series([1, None, 2], dtype="Int64"),
    "nullable truth values": pd.Series([True, None, False], dtype="boolean"),
    "categories": pd.Series(["a", None, "b"], dtype="category"),
    "days": pd.Series(pd.to_datetime(["2026-01-01", None, "2026-01-02"])),
    "numpy's days": np.array(["2026-01-01", "NaT", "2026-01-02"], "datetime64[D]"),
    "floats": np.array([1.0, np.nan, 2.0]),
    "objects": ["a", pd.NA, "b"],
    "arrow": pa.array(["a", None, "b"]),
    "arrow in parts": pa.chunked_array([["a", None], ["b"]]),
    "decimals": [Decimal(1), Decimal("NaN"), Decimal(2)],
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_label_is_no_class_whatever_the_column(kind):
    with pytest.raises(UserError, match="labels: image 1 has none"):
        encode_labels(MISSING[kind], 3)


def test_arrow_values_are_plain_labels_and_a_mapping_is_none():
    assert encode_labels(pa.array(["b", "a", "b"]), 3)[1] == ("a", "b")
    with pytest.raises(UserError, match="labels: give one label for each image, got a dict"):
        encode_labels({"a": 1, "b": 2}, 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"a", "b"}, "in the images' order; a set has no order"),
        (frozenset("ab"), "in the images' order; a frozenset has no order"),
        (
            pd.DataFrame({"label": [0, 1], "more": [1, 0]}),
            r"got a DataFrame; give one .*, as df\['label'\]",
        ),
        (pa.table({"label": [0, 1]}), "got a Table; give one of its columns"),
    ],
)
def test_labels_without_an_order_and_tables_are_refused(labels, message):
    with pytest.raises(UserError, match=f"labels: give one label for each image, {message}"):
        encode_labels(labels, 2)


def big_photos(folder, count, size=(9000, 8000)):
    """Class folders of large JPEGs."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(picture(80, 90, 3)).resize(size).save(folder / "a" / "0.jpg")
    for row in range(1, count):
        (folder / "ab"[row % 2] / f"{row}.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes())
    return folder


def limited(limit, folder, *options):
    """`pudnet predict` under a limit of the shell's."""
    command = (
        f"{limit}; exec {sys.executable} -m pudnet.cli predict --data {folder} --out {folder}/w {' '.join(options)}"
    )
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)


def test_little_memory_makes_no_good_image_a_bad_one(tmp_path):
    """Twelve images of 72 M pixels took 5 GB when they were decoded side by side."""
    done = limited("ulimit -v 6000000", big_photos(tmp_path, 12), "--skip-bad")
    assert done.returncode == 0 and "from 12 of 12 images" in done.stdout and "left out" not in done.stdout, done.stderr


def small_photos(folder, count=4):
    """Class folders of small good images."""
    for row in range(count):
        (folder / "ab"[row % 2]).mkdir(exist_ok=True)
        Image.fromarray(picture(20, 20, 3)).save(folder / "ab"[row % 2] / f"{row}.png")
    return sorted(folder.rglob("*.png"))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EUCLEAN])
def test_what_is_the_machines_fault_is_no_bad_file(code, tmp_path, monkeypatch):
    paths = small_photos(tmp_path)

    def fail(path):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(decode.Image, "open", fail)
    with pytest.raises(RunFailed, match=f"a/0.png: cannot be read now .{re.escape(os.strerror(code))}.; it"):
        unreadable(paths)


@pytest.mark.parametrize("error", [MemoryError(), OSError("broken data stream"), OSError(errno.EAGAIN, "try again")])
def test_what_fails_beside_others_is_tried_again_alone(error, tmp_path, monkeypatch):
    paths, whole, failed = small_photos(tmp_path), to_array, []

    def fail_once(image, *form):
        if not failed:
            failed.append(image)
            raise error
        return whole(image, *form)

    monkeypatch.setattr(decode, "to_array", fail_once)
    assert unreadable(paths) == set() and failed


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_decoder_that_lacks_memory_makes_no_bad_file(kind, tmp_path, monkeypatch):
    """Not all of them say that this is why they fail."""
    path = tmp_path / f"x.{kind}"
    Image.fromarray(picture(90, 90, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert unreadable([path]) == {path}
    monkeypatch.setattr(decode, "BYTES_A_PIXEL", 2**45)  # more than there is
    with pytest.raises(RunFailed, match=f"x.{kind}: there is too little memory to decode it; free some, or make"):
        unreadable([path])


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {}), ("jpg", {"progressive": True})])
def test_a_large_image_is_decoded_when_no_other_is(kind, options, tmp_path, monkeypatch):
    """By what its header says: a WebP takes memory when Pillow opens it, a progressive JPEG for its full size."""
    monkeypatch.setattr(decode, "ALONE", 10_000)
    monkeypatch.setattr(decode, "LARGE", 10_000)
    whole, threads = decode.to_array, []
    monkeypatch.setattr(decode, "to_array", lambda *given: threads.append(threading.current_thread()) or whole(*given))
    opened, opening = [], Image.open
    monkeypatch.setattr(decode.Image, "open", lambda path: opened.append(path) or opening(path))
    Image.fromarray(picture(80, 200, 3)).save(tmp_path / f"large.{kind}", **options)
    assert read_images([tmp_path / f"large.{kind}"], 8, 3).shape == (1, 8, 8, 3)
    assert threads == [threading.main_thread()]
    assert len(opened) == (1 if kind == "webp" else 2)


def test_images_are_decoded_side_by_side_only_as_far_as_their_pixels_allow():
    gate, inside, most = _Gate(10), [], []
    pair = threading.Barrier(2, timeout=60)

    def enter(pixels):
        with gate.holding(pixels):
            inside.append(pixels)
            most.append(sum(inside) if len(inside) > 1 else 0)
            if pixels == 4:
                pair.wait()  # until another one is inside
            inside.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, [4, 4, 4, 50, 4, 4, 4, 9]))  # what is larger than all that may be inside goes alone
    assert 4 < max(most) <= 10


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    big_photos(tmp_path, 1, (5000, 5000))
    with Image.open(tmp_path / "a" / "0.jpg") as image:
        expected = to_array(image, 32, 3)
    assert close(torch.from_numpy(read_image(tmp_path / "a" / "0.jpg", 32, 3)), expected, 6)


@pytest.mark.parametrize("kind", ["tif", "png", "webp", "jpg", "avif"])
def test_orientation_is_honoured_once_in_every_format(kind, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(picture(20, 20, 3)).save(tmp_path / f"x.{kind}", exif=exif)
        with Image.open(tmp_path / f"x.{kind}") as image:
            unloaded = to_array(image, 20, 3)
            loaded = to_array(image, 20, 3)
            expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"x.{kind}")).convert("RGB"))
        for found in (unloaded, loaded, read_image(tmp_path / f"x.{kind}", 20, 3)):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_what_is_no_exif_does_not_matter(kind, tmp_path):
    for name, exif in (("plain", {}), ("odd", {"exif": b"Exif\0\0no exif at all"})):
        Image.fromarray(picture(20, 20, 3)).save(tmp_path / f"{name}.{kind}", **exif)
    plain, odd = (read_image(tmp_path / f"{name}.{kind}", 20, 3) for name in ("plain", "odd"))
    assert np.array_equal(plain, odd)


def test_an_odd_entry_of_exif_does_not_matter(tmp_path):
    entries = struct.pack("<HHI4s", ExifTags.Base.ImageWidth, 2, 4, b"abc")  # text, where a number has to stand
    entries += struct.pack("<HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.fromarray(picture(20, 20, 3)).save(tmp_path / "odd.jpg", exif=exif)
    with Image.open(tmp_path / "odd.jpg") as odd:
        turned = np.array(odd.transpose(Image.Transpose.ROTATE_270))
    assert close(torch.from_numpy(read_image(tmp_path / "odd.jpg", 20, 3)), turned)
