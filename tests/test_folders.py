"""Folders as people keep them: links, deep trees, and the root of a dataset given for its training part."""

import errno
import re
import tomllib
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from pudnet import Predictor
from pudnet.data.folders import by_type, look_in
from pudnet.data.sources import open_source
from pudnet.data.user_images import PassedOver, open_folder
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


def refused(root, predictor, message):
    """What neither a prediction nor the pipeline takes, for the same reason."""
    for attempt in (lambda: predictor.predict(root), lambda: open_source(f"folder:{root}", root, 16, 3)):
        with pytest.raises(UserError, match=message):
            attempt()


def test_a_link_that_leads_back_up_ends_there(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "cat/deep/b.png", "dog/c.png", "../sibling/x.png")
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "deep" / "again").symlink_to(root / "cat")
    (root / "dog" / "further up").symlink_to(tmp_path)
    assert both_ways(root, predictor) == {"cat": 2, "dog": 1}
    (tmp_path / "link").symlink_to(root)
    assert both_ways(tmp_path / "link", predictor) == {"cat": 2, "dog": 1}


@pytest.mark.parametrize("up", [".", ".."])
def test_a_link_back_up_is_no_class(up, predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "dog/c.png")
    (root / "self").symlink_to(up)
    refused(root, predictor, "root/self: is a link that leads back up, to .*; remove it")


@pytest.mark.parametrize(("link", "target"), [("cat2", "cat"), ("dog/more", "../cat"), ("emu", "cat/deep")])
def test_the_same_images_are_not_of_two_classes(link, target, predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/deep/a.png", "dog/c.png")
    (root / link).symlink_to(target)
    refused(root, predictor, "root: .* is the same folder as .*; give each image one class")


def test_an_image_that_is_a_link_to_nowhere_cannot_be_read(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "cat/b.png", "dog/c.png")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"cat/gone.png cannot be read as an image \(.*No such file"):
        predictor.predict(root)
    with pytest.raises(UserError, match=r"cat/gone.png cannot be read"):
        list(open_source(f"folder:{root}", root, 16, 3).batches())
    assert open_folder(root, predictor.card, skip_bad=True).skipped == (root / "cat" / "gone.png",)


@pytest.mark.parametrize("link", ["bird", "v1.0", "README", "cat/more", "cat/notes.txt"])
def test_any_other_link_to_nowhere_is_named(link, predictor, tmp_path):
    """It may have been a class, or a folder of images."""
    root = fill(tmp_path / "root", "cat/a.png", "dog/c.png")
    (root / link).symlink_to(tmp_path / "gone")
    refused(root, predictor, f"{link}: is a link to .*gone, which is not there; repair or remove it")


def test_loose_images_have_no_class(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "dog/c.png", "x.png")
    refused(root, predictor, "x.png: lies beside the subfolders, so it has no class; move or remove it")


def test_a_folder_that_may_not_be_read_is_named(predictor, tmp_path, monkeypatch):
    root, look = fill(tmp_path / "root", "cat/a.png", "dog/c.png"), Path.iterdir

    def iterdir(folder):
        if folder.name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    refused(root, predictor, "root/dog: may not be read .Permission denied.; change its permissions")


@pytest.mark.parametrize(
    ("files", "parts", "first"),
    [
        (("train/cat/a.png", "val/cat/b.png"), "train, val", "train"),
        (("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"), "train, val", "train"),
        (("data/Train/cat/a.png", "data/Test/cat/b.png"), "Test, Train", "data/Train"),
        (("fold1/cat/a.png", "fold1/dog/b.png", "fold2/cat/c.png", "fold2/dog/d.png"), "fold1, fold2", "fold1"),
        (("train/cat/a.png", "val/cat/b.png", "test/c.png"), "test, train, val", "train"),  # as contests keep them
        (("train/cat/a.png", "train/dog/b.png", "test/c.png"), "test, train", "train"),
        (("train/cat/a.png", "train/x.png", "val/cat/b.png", "val/y.png"), "train, val", "train"),
        (("training_set/cat/a.png", "test_set/cat/b.png"), "test_set, training_set", "training_set"),
        (("train2017/cat/a.png", "val2017/cat/b.png", "more/c.png"), "train2017, val2017", "train2017"),
        (("train/cat/a.png", "train/dog/b.png"), "train", "train"),
    ],
)
def test_parts_of_a_data_set_are_not_taken_for_classes(files, parts, first, predictor, tmp_path):
    root = fill(tmp_path / "root", *files)
    refused(
        root,
        predictor,
        rf"subfolders called {parts} are taken for parts of a dataset, not for classes; give one of them, as "
        rf"{re.escape(str(root / first))} \(or rename them, if they are classes\)$",
    )
    assert len(predictor.predict(fill(tmp_path / "two", "a/x.png", "b/x.png")).classify(root)) == len(files)


def test_parts_inside_each_class_are_not_taken_together(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/train/a.png", "cat/test/b.png", "dog/train/c.png", "dog/test/d.png")
    refused(
        root,
        predictor,
        r"cat: holds test and train, which are taken for parts of a dataset; use one part only "
        r"\(a folder with a link cat to .*/cat/train, and so on\), or rename them to use all images",
    )
    (tmp_path / "one").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "one" / name).symlink_to(root / name / "train")
    assert both_ways(tmp_path / "one", predictor) == {"cat": 1, "dog": 1}  # as the line says


@pytest.mark.parametrize(
    ("files", "names", "first"),
    [
        (("a/cat/1.png", "a/dog/2.png", "b/cat/3.png", "b/dog/4.png"), "cat, dog", "a"),
        (("x/a/cat/1.png", "x/a/dog/2.png", "x/b/cat/3.png", "x/b/dog/4.png"), "cat, dog", "x/a"),
        (("a/new/cat/1.png", "a/new/dog/2.png", "b/new/cat/3.png", "b/new/dog/4.png"), "new/cat, new/dog", "a"),
    ],
)
def test_subfolders_that_repeat_each_others_folders_are_not_taken_for_classes(files, names, first, predictor, tmp_path):
    root = fill(tmp_path / "root", *files)
    refused(
        root,
        predictor,
        rf"hold no images of their own, but folders of the same names \({names}\). If those are the classes, give one "
        rf"subfolder, as {re.escape(str(root / first))}; if not, rename them so that they differ$",
    )


@pytest.mark.parametrize(
    "files",
    [
        ("cat/2021/a.png", "cat/2022/b.png", "dog/c.png"),
        ("cat/2021/a.png", "dog/2021/b.png"),
        ("cat/2021/a.png", "cat/2022/b.png", "dog/2021/c.png", "dog/2022/d.png"),
        ("cat/train/a.png", "dog/train/b.png"),
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
    found = look_in(root)
    assert found.files == [root / "deep/er/b.JPG", root / "a.png"] and found.labels == ["deep", None]
    assert found.passed_over == [root / "notes.txt"]


def test_names_of_classes_have_one_unicode_form(tmp_path):
    names = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    roots = [fill(tmp_path / str(i), f"{name}/a.png", "dog/b.png") for i, name in enumerate(names)]
    assert names[0] != names[1] and [look_in(root).labels for root in roots] == [[names[0], "dog"]] * 2
    fill(tmp_path / "1", f"{names[1][:-2]}z/c.png")  # between the two forms, if they were sorted as they are
    assert look_in(roots[1]).labels == [f"{names[0][:-1]}z", names[0], "dog"]
    with pytest.raises(UserError, match="two subfolders are called caf\u00e9, in two Unicode forms"):
        look_in(fill(tmp_path / "1", f"{names[0]}/d.png")).class_names()


def test_files_of_a_type_that_is_not_read_are_counted(predictor, tmp_path):
    root = fill(tmp_path / "root", "cat/a.png", "cat/b.png", "dog/c.png")
    for row in range(5):
        (root / "cat" / f"{row}.xcf").write_bytes(b"a layered image")
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "beside.xyzw").write_bytes(b"a photo")
    (root / "dog" / "clip.mpg").write_bytes(b"a video")  # of a format that Pillow knows and cannot read
    expected = r"5 \.xcf, 1 \.mpg, 1 \.txt, 1 \.xyzw"
    with pytest.warns(PassedOver, match=f"files passed over, since .*: {expected}, in .*root") as said:
        predictor.predict(root)
    assert said[0].filename == __file__
    with pytest.warns(PassedOver):
        assert re.fullmatch(expected, by_type(open_folder(root, predictor.card).passed_over))
    assert re.fullmatch(expected, by_type(open_source(f"folder:{root}", root, 16, 3).passed_over))
    (root / "emu").mkdir()
    (root / "emu" / "x.xcf").write_bytes(b"a layered image")
    refused(root, predictor, r"emu has no images, only files that are not read as such: 1 .xcf; add some or")


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".hif", ".heics", ".heifs"])
def test_what_lets_heic_be_read_is_said(suffix):
    said = f"1 {suffix.lower()} (`pip install 'pillow-heif==1.8.1'` lets HEIC be read)"
    assert by_type([Path("x" + suffix)]) == said
    extra = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert extra["project"]["optional-dependencies"]["heic"] == ["pillow-heif==1.8.1"]


def test_heic_is_read_where_pillow_heif_is_installed(predictor, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    root = fill(tmp_path / "root", "cat/a.png", "dog/c.png")
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), (200, 0, 0))).save(root / "cat" / "x.HEIC")
    assert both_ways(root, predictor) == {"cat": 2, "dog": 1}
