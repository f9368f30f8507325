"""Folders as people keep them: links, deep trees, and the root of a data set given for its training part."""

import re

import pytest
from PIL import Image

from pudnet import Predictor
from pudnet.data.folders import by_type, image_files
from pudnet.data.own import open_folder
from pudnet.data.sources import open_source
from pudnet.errors import UserError


@pytest.fixture(scope="module")
def predictor():
    return Predictor.untrained("convnet3", 3, 16)


def fill(root, *files):
    """Images at these paths below a folder."""
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number % 256, 0, 0)).save(root / file)
    return root


def both_ways(root, predictor):
    """The classes and images that a prediction and the pipeline find in a folder: always the same."""
    own, source = open_folder(root, predictor.card), open_source(f"folder:{root}", root, 16, 3)
    predictor.predict(root)
    assert own.labels == [source.class_names[label] for label in source.labels]
    assert sum(len(batch) for batch in source.batches()) == own.count
    return {name: own.labels.count(name) for name in source.class_names}


def test_links_to_classes_folders_and_images_are_followed(predictor, tmp_path):
    """As subsets of ImageNet are made."""
    store = fill(tmp_path / "store", "n01/a.png", "n01/b.png", "n02/c.png", "more/d.png", "e.png")
    root = fill(tmp_path / "subset", "plain/x.png")
    (root / "cat").symlink_to(store / "n01")
    (root / "dog").mkdir()
    (root / "dog" / "more").symlink_to(store / "more")
    (root / "dog" / "e.png").symlink_to(store / "e.png")
    assert both_ways(root, predictor) == {"cat": 2, "dog": 2, "plain": 1}


def test_a_link_that_leads_back_up_ends_there(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "cat/deep/b.png", "dog/c.png")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "deep" / "again").symlink_to(root / "cat")
    assert both_ways(root, predictor) == {"cat": 2, "dog": 1}


def test_a_link_that_leads_nowhere_is_a_file_that_cannot_be_read(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "cat/b.png", "dog/c.png")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    (root / "cat" / "notes.txt").symlink_to(tmp_path / "notes.txt")  # no image
    with pytest.raises(UserError, match=r"cat/gone.png cannot be read as an image \(.*No such file"):
        predictor.predict(root)
    with pytest.raises(UserError, match=r"cat/gone.png cannot be read"):
        list(open_source(f"folder:{root}", root, 16, 3).batches())
    assert open_folder(root, predictor.card, skip_bad=True).skipped == (root / "cat" / "gone.png",)


def test_a_class_that_is_a_link_to_nowhere_is_named(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "dog/c.png")
    (root / "bird").symlink_to(tmp_path / "gone")
    for attempt in (lambda: predictor.predict(root), lambda: open_source(f"folder:{root}", root, 16, 3)):
        with pytest.raises(UserError, match="bird: is a link to .*gone, which is not there; repair or remove it"):
            attempt()


@pytest.mark.parametrize(
    ("files", "parts", "first"),
    [
        (("train/cat/a.png", "val/cat/b.png"), "train, val", "train"),
        (("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"), "train, val", "train"),
        (("data/Train/cat/a.png", "data/Test/cat/b.png"), "Test, Train", "data/Train"),
        (("a/train/cat/1.png", "a/train/dog/2.png", "b/train/cat/3.png", "b/train/dog/4.png"), "a, b", "a"),
        (("fold1/cat/a.png", "fold1/dog/b.png", "fold2/cat/c.png", "fold2/dog/d.png"), "fold1, fold2", "fold1"),
        (("train/cat/a.png", "val/cat/b.png", "test/c.png"), "train, val", "train"),  # as contests keep them
    ],
)
def test_parts_of_a_data_set_are_not_taken_for_classes(files, parts, first, predictor, tmp_path):
    root = fill(tmp_path / "root", *files)
    message = (
        rf"{parts} look like parts of a data set, not classes .*; give one of them, as {re.escape(str(root / first))}$"
    )
    with pytest.raises(UserError, match=message):
        predictor.predict(root)
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{root}", root, 16, 3)
    assert len(predictor.predict(fill(tmp_path / "two", "a/x.png", "b/x.png")).classify(root)) == len(files)


@pytest.mark.parametrize(
    "files",
    [
        ("cat/2021/a.png", "cat/2022/b.png", "dog/c.png"),
        ("cat/2021/a.png", "dog/2021/b.png"),
        ("cat/images/jan/a.png", "dog/images/jan/b.png"),
        ("cat/a.png", "cat/raw/b.png", "dog/c.png", "dog/raw/d.png"),
        ("train/a.png", "plane/b.png"),  # toys
    ],
)
def test_a_class_with_folders_of_its_own_stays_one_class(files, predictor, tmp_path):
    root = fill(tmp_path / "root", *files)
    names = {file.partition("/")[0] for file in files}
    assert both_ways(root, predictor) == {name: sum(file.startswith(name) for file in files) for name in names}


def test_hidden_and_other_files_are_left_aside(tmp_path):
    root = fill(tmp_path, "a.png", "deep/er/b.JPG", ".hidden/c.png", ".d.png")
    (root / "notes.txt").write_text("no image")
    assert image_files(root) == ([root / "a.png", root / "deep/er/b.JPG"], [root / "notes.txt"])


def test_files_of_a_type_that_is_not_read_are_counted(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "cat/b.png", "dog/c.png")
    for row in range(5):
        (root / "cat" / f"{row}.xcf").write_bytes(b"a layered image")
    (root / "dog" / "notes.txt").write_text("no image")
    assert by_type(open_folder(root, predictor.card).passed_over) == "5 .xcf, 1 .txt"
    assert by_type(open_source(f"folder:{root}", root, 16, 3).passed_over) == "5 .xcf, 1 .txt"
    (root / "emu").mkdir()
    (root / "emu" / "x.xcf").write_bytes(b"a layered image")
    for attempt in (lambda: predictor.predict(root), lambda: open_source(f"folder:{root}", root, 16, 3)):
        with pytest.raises(UserError, match=r"emu has no images, only files that are not read as such \(1 .xcf\)"):
            attempt()
