"""What the data package promises: sources, prepared stores, class splits and task groups."""

import gzip
import hashlib
import struct
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.groups import groups as make_groups
from pipeline.params import load_params
from pipeline.prepare import prepare
from pudnet.data.decode import to_array
from pudnet.data.groups import (
    GroupSizes,
    Split,
    build_groups,
    halve,
    open_groups,
    sample_groups,
    split_classes,
    whole_class_images,
    write_groups,
)
from pudnet.data.sources import Source, open_source
from pudnet.data.store import Store, open_store, whole_folder, write_store
from pudnet.errors import UserError


def read_all(source):
    return np.concatenate(list(source.batches()))


def make_folder(root, classes=("ants", "bees"), images=2):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (9, 7), (label * 100, 50, number)).save(root / name / f"{number}.png")
    return root


def make_store(counts):
    """A store with the given number of (empty) images of each class: groups look at labels alone."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    names = tuple(f"name{label}" for label in range(len(counts)))
    return Store(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, names, (0.0,), (1.0,), "test")


def sample(labels, groups=20, k=2, n=5, twins=True, seed=0):
    names = [f"name{label}" for label in range(10)]
    return sample_groups(labels, [1, 2, 4, 7], names, groups, k, n, twins, np.random.default_rng(seed))


def test_a_folder_that_cannot_be_replaced_is_still_there(tmp_path):
    """Here the new one is moved away before it could take the old one's place."""
    with whole_folder(tmp_path / "store") as folder:
        (folder / "content").write_text("old")
    with pytest.raises(UserError, match="store: cannot be written"), whole_folder(tmp_path / "store") as folder:
        folder.rename(tmp_path / "elsewhere")
    assert (tmp_path / "store" / "content").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "store"]


# Sources


def test_digits_are_scaled_to_eight_bits(tmp_path):
    source = open_source("sklearn:digits", tmp_path, image_size=8, channels=1)
    images = read_all(source)
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 255
    assert source.labels.shape == (1797,) and source.class_names == tuple("0123456789")
    colour = read_all(open_source("sklearn:digits", tmp_path, image_size=8, channels=3))
    assert (colour == images).all()


@pytest.mark.parametrize("spec", ["digits", "sklearn:iris", "folder:", "s3:bucket"])
def test_unknown_spec_is_refused(spec, tmp_path):
    with pytest.raises(UserError, match="sklearn:digits, torchvision:NAME"):
        open_source(spec, tmp_path, 8, 1)


def test_transparency_becomes_white_and_palette_its_colours():
    clear = Image.new("RGBA", (5, 3), (10, 20, 30, 0))
    assert (to_array(clear, 4, 3) == 255).all()
    palette = Image.new("RGB", (5, 3), (204, 0, 0)).convert("P")
    assert to_array(palette, 4, 3)[0, 0].tolist() == [204, 0, 0]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_keeps_its_order_and_spread(dtype):
    ramp = np.linspace(0, 65_535, 64).astype(dtype)
    grey = to_array(Image.fromarray(np.tile(ramp, (64, 1))), 64, 1)[0, :, 0].astype(int)
    assert grey[0] == 0 and grey[-1] == 255 and (np.diff(grey) > 0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "HSV", "I;16", "RGBA", "PA"])
def test_every_mode_and_odd_size_becomes_a_square(mode):
    for channels in (1, 3):
        assert to_array(Image.new(mode, (31, 5)), 12, channels).shape == (12, 12, channels)


def test_folder_has_a_class_a_subfolder(tmp_path):
    root = make_folder(tmp_path / "images", images=300)  # more than one batch
    (root / "ants" / "notes.txt").write_text("no image")
    source = open_source(f"folder:{root}", tmp_path, image_size=6, channels=3)
    images = read_all(source)
    assert source.class_names == ("ants", "bees") and images.shape == (600, 6, 6, 3)
    assert (images[:, 0, 0, 0] == source.labels * 100).all()


def test_corrupt_image_is_named(tmp_path):
    root = make_folder(tmp_path / "images")
    broken = root / "bees" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match="bees/0.png"):
        read_all(open_source(f"folder:{root}", tmp_path, 6, 3))


def test_folders_without_classes_or_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_source(f"folder:{tmp_path / 'nowhere'}", tmp_path, 6, 3)
    with pytest.raises(UserError, match="has no images"):
        open_source(f"folder:{tmp_path}", tmp_path, 6, 3)
    root = make_folder(tmp_path / "images")
    (root / "cats").mkdir()
    with pytest.raises(UserError, match=r"cats has no images"):
        open_source(f"folder:{root}", tmp_path, 6, 3)


def test_npz_round_trip(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=labels, class_names=["a", "b", "c"])
    source = open_source(f"npz:{tmp_path / 'x.npz'}", tmp_path, 5, 3)
    assert (read_all(source) == images).all() and source.class_names == ("a", "b", "c")
    assert source.labels.dtype == np.int64 and source.labels.tolist() == labels.tolist()


GOOD = {"images": np.zeros((4, 5, 5), np.uint8), "labels": np.array([0, 1, 0, 1])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no array 'images'"),
        ({"labels": None}, "no array 'labels'"),
        ({"images": np.zeros((4, 5, 5))}, "must be uint8"),
        ({"images": np.zeros((4, 5, 5, 2), np.uint8)}, "with C 1 or 3"),
        ({"labels": np.array([0, 1, 0])}, "4 integers"),
        ({"labels": np.array([0.0, 1.0, 0.0, 1.0])}, "4 integers"),
        ({"labels": np.array([-1, 0, 1, 0])}, "from -1 to 1"),
        ({"labels": np.array([0, 1, 0, 10**9])}, "from 0 to 1000000000"),
        ({"class_names": np.array(["only"])}, "from 0 to 0"),
        ({"class_names": np.array(["a", "a"])}, "distinct"),
        ({"class_names": np.array(["a", None])}, "plain arrays"),
    ],
)
def test_bad_npz_is_refused(change, message, tmp_path):
    arrays = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=f"bad.npz.*{message}"):
        open_source(f"npz:{tmp_path / 'bad.npz'}", tmp_path, 5, 1)


def test_damaged_npz_is_named(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **GOOD)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="bad.npz cannot be read"):
        open_source(f"npz:{path}", tmp_path, 5, 1)


# torchvision


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def test_unknown_torchvision_set_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="FashionMNIST.*CIFAR100"):
        open_source("torchvision:Fashion", tmp_path, 28, 1)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("FashionMNIST", "t10k-labels-idx1-ubyte.gz into .*FashionMNIST/raw/"),
        ("CIFAR100", "python.tar.gz into"),
    ],
)
def test_without_network_the_message_says_which_files_to_put_where(name, file, tmp_path, no_network):
    with pytest.raises(UserError, match=f"no network.*{file}.*folder:PATH or npz:PATH") as caught:
        open_source(f"torchvision:{name}", tmp_path, 28, 1)
    assert "\n" not in str(caught.value)


def test_damaged_download_is_named(tmp_path, no_network):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(gzip.compress(b"cut short"))
    with pytest.raises(UserError, match=f"{archive} failed the checksum"):
        open_source("torchvision:CIFAR10", tmp_path, 32, 3)


def test_damaged_unpacked_idx_file_is_named(tmp_path, no_network):
    path = tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.parent.mkdir(parents=True)
    whole = struct.pack(">2I", 0x801, 10_000) + bytes(10_000)
    for broken in (whole[:-1], whole[:-1] + b"\x4d", b"", b"no IDX" + whole[6:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is damaged"):
            open_source("torchvision:FashionMNIST", tmp_path, 28, 1)
    path.write_bytes(whole)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(whole[:-1] + b"\x01"))
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte differs"):
        open_source("torchvision:FashionMNIST", tmp_path, 28, 1)


# Stores


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return open_source("sklearn:digits", folder, 8, 1)


def test_store_holds_the_source_and_its_statistics(tmp_path, digits):
    write_store(digits, tmp_path / "store")
    store = open_store(tmp_path / "store", verify=True)
    images = read_all(digits)
    assert (store.images == images).all() and (store.labels == digits.labels).all()
    assert (store.image_size, store.channels, store.class_names) == (8, 1, digits.class_names)
    assert store.mean[0] == pytest.approx(images.mean() / 255) and store.std[0] == pytest.approx(images.std() / 255)
    assert not store.images.flags.writeable and not store.labels.flags.writeable


def test_two_stores_of_one_source_are_byte_identical(tmp_path, digits):
    for name in ("a", "b"):
        write_store(digits, tmp_path / name)
    for file in ("images.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_constant_channel_has_a_deviation_above_zero(tmp_path):
    source = Source("flat", ("a",), np.zeros(2, np.int64), lambda: iter([np.full((2, 4, 4, 1), 9, np.uint8)]))
    write_store(source, tmp_path / "store")
    assert open_store(tmp_path / "store", verify=False).std[0] > 0


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_changed_byte_is_named(name, tmp_path, digits):
    write_store(digits, tmp_path / "store")
    path = tmp_path / "store" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} does not match its checksum"):
        open_store(tmp_path / "store", verify=True)


def test_missing_and_damaged_stores_are_named(tmp_path, digits):
    with pytest.raises(UserError, match="no prepared store"):
        open_store(tmp_path / "store", verify=False)
    write_store(digits, tmp_path / "store")
    (tmp_path / "store" / "labels.npy").unlink()
    with pytest.raises(UserError, match="labels.npy is missing"):
        open_store(tmp_path / "store", verify=False)
    (tmp_path / "store" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json cannot be read"):
        open_store(tmp_path / "store", verify=False)


def test_error_in_mid_write_leaves_the_earlier_store_alone(tmp_path, digits):
    def failing():
        yield next(digits.batches())
        raise UserError("corrupt image")

    write_store(digits, tmp_path / "store")
    with pytest.raises(UserError, match="corrupt image"):
        write_store(Source("broken", digits.class_names, digits.labels, failing), tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert open_store(tmp_path / "store", verify=True).source == "sklearn:digits"


# Class splits


def test_split_parts_are_disjoint_and_validation_is_a_fifth_of_training():
    split = split_classes(100, train_classes=80, classes_per_group=5, seed=3)
    assert sorted(split.train_classes + split.test_classes) == list(range(100))
    assert set(split.validation_classes) < set(split.train_classes)
    assert (len(split.validation_classes), len(split.search_classes), len(split.test_classes)) == (16, 64, 20)
    assert split == split_classes(100, 80, 5, seed=3) != split_classes(100, 80, 5, seed=4)


def test_validation_has_at_least_the_classes_of_a_group():
    assert len(split_classes(10, 6, 2, seed=0).validation_classes) == 2


def test_other_test_store_gives_all_its_classes_and_the_same_training_split():
    other = split_classes(100, 80, 10, seed=3, test_store_classes=10)
    assert other.test_classes == tuple(range(10))
    assert other.train_classes == split_classes(100, 80, 10, seed=3).train_classes


@pytest.mark.parametrize(
    ("train_classes", "k", "message"), [(11, 2, "has 10"), (8, 3, "2 are left"), (5, 3, "of 5 training")]
)
def test_impossible_split_says_the_numbers(train_classes, k, message):
    with pytest.raises(UserError, match=message):
        split_classes(10, train_classes, k, seed=0)


def test_test_groups_may_have_fewer_classes_than_are_left_for_training_groups():
    assert len(split_classes(10, 8, 3, seed=0, test_classes_per_group=2).test_classes) == 2
    with pytest.raises(UserError, match="a group has 4 classes, but 3 are left for test; lower train_classes"):
        split_classes(10, 7, 2, seed=0, test_classes_per_group=4)


# Groups


def test_twins_have_the_same_classes_and_no_image_in_common():
    labels = make_store([20] * 10).labels
    for predict_from, test_on in sample(labels):
        assert not set(predict_from) & set(test_on)
        assert len(set(predict_from)) == len(set(test_on)) == 10
        assert (labels[predict_from] == labels[test_on]).all()
        blocks = labels[predict_from].reshape(2, 5)
        assert (blocks == blocks[:, :1]).all() and blocks[0, 0] != blocks[1, 0]


def test_groups_come_from_the_seed_and_a_shorter_table_is_a_prefix():
    labels = make_store([20] * 10).labels
    table = sample(labels, groups=100, twins=False)
    assert table.shape == (100, 10) and table.dtype == np.uint16
    assert (table == sample(labels, groups=100, twins=False)).all()
    assert (table[:10] == sample(labels, groups=10, twins=False)).all()
    assert not (table == sample(labels, groups=100, twins=False, seed=1)).all()


def test_table_type_holds_every_index():
    labels = np.repeat(np.arange(10), 7000)
    assert sample(labels).dtype == np.uint32


def test_class_with_too_few_images_is_named():
    labels = make_store([20, 20, 20, 20, 9, 20, 20, 20]).labels
    with pytest.raises(UserError, match=r"class 4 \(name4\) has 9 images, but its groups need 10"):
        sample(labels)
    with pytest.raises(UserError, match="a group has 5 classes, but only 4"):
        sample(labels, k=5)


def test_halves_are_disjoint_and_hold_nearly_all_images():
    labels = make_store([7, 10, 4]).labels
    table = halve(labels, [0, 2, 1], np.random.default_rng(0))
    assert table.shape == (1, 2, 3 + 2 + 5) and len(set(table.ravel())) == 20
    assert labels[table[0, 0]].tolist() == labels[table[0, 1]].tolist() == [0] * 3 + [2] * 2 + [1] * 5
    assert whole_class_images(labels, [0, 1]) == 3


SIZES = GroupSizes(2, 10, train_groups=30, search_groups=20, validation_groups=10, test_groups=10, test_whole=False)


def test_roles_use_the_classes_that_are_theirs():
    store = make_store([20] * 10)
    split = split_classes(10, 6, 2, seed=0)
    tables = build_groups(split, SIZES, store)
    used = {name: set(store.labels[table].ravel().tolist()) for name, table in tables.items()}
    assert used["search_train"] == set(split.search_classes) and used["train"] == set(split.train_classes)
    assert used["validation"] == set(split.validation_classes) and used["test"] <= set(split.test_classes)
    assert not used["search_train"] & used["validation"] and not used["train"] & used["test"]
    assert tables["train"].shape == (30, 10) and tables["test"].shape == (10, 2, 10)


def test_unset_images_per_group_halves_the_smallest_class():
    sizes = GroupSizes(2, None, 3, 3, 3, 3, test_whole=False)
    tables = build_groups(split_classes(10, 6, 2, seed=0), sizes, make_store([20] * 9 + [15]))
    assert {name: table.shape[-1] for name, table in tables.items()} == dict.fromkeys(tables, 14)


def test_other_test_store_is_taken_whole():
    split = split_classes(10, 6, 2, seed=0, test_store_classes=3)
    sizes = GroupSizes(2, 10, 3, 3, 3, 1, test_whole=True)
    tables = build_groups(split, sizes, make_store([20] * 10), make_store([6, 8, 10]))
    assert tables["test"].shape == (1, 2, 12)


def test_test_groups_may_have_sizes_of_their_own():
    store, split = make_store([40] * 10), split_classes(10, 6, 2, seed=0)
    tables = build_groups(split, replace(SIZES, test_classes_per_group=4, test_images_per_group=24), store)
    same = build_groups(split, SIZES, store)
    assert tables["test"].shape == (10, 2, 24) and len(set(store.labels[tables["test"][0, 0]])) == 4
    assert all((tables[name] == same[name]).all() for name in ("search_train", "validation", "train"))


def test_a_class_of_one_image_has_no_halves():
    split = split_classes(10, 6, 2, seed=0, test_store_classes=3)
    sizes = GroupSizes(2, 10, 3, 3, 3, 1, test_whole=True)
    with pytest.raises(UserError, match="name1. has 1 image.s., too few for two halves"):
        build_groups(split, sizes, make_store([20] * 10), make_store([6, 1, 10]))


def test_images_that_do_not_divide_by_classes_are_refused():
    sizes = GroupSizes(2, 11, 3, 3, 3, 3, test_whole=False)
    with pytest.raises(UserError, match="images_per_group is 11"):
        build_groups(split_classes(10, 6, 2, seed=0), sizes, make_store([20] * 10))


def test_written_groups_are_read_back_and_byte_identical(tmp_path):
    store, split = make_store([20] * 10), split_classes(10, 6, 2, seed=0)
    for name in ("a", "b"):
        tables = build_groups(split, SIZES, store)
        write_groups(tmp_path / name, split, tables, store.class_names, store.class_names)
    read_split, read_tables = open_groups(tmp_path / "a")
    assert isinstance(read_split, Split) and read_split == split and set(read_tables) == set(tables)
    assert all((read_tables[name] == tables[name]).all() for name in tables)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_missing_and_damaged_groups_are_named(tmp_path):
    with pytest.raises(UserError, match="no task groups"):
        open_groups(tmp_path / "groups")
    store, split = make_store([20] * 10), split_classes(10, 6, 2, seed=0)
    tables = build_groups(split, SIZES, store)
    write_groups(tmp_path / "groups", split, tables, store.class_names, store.class_names)
    (tmp_path / "groups" / "train.npy").write_bytes(b"short")
    with pytest.raises(UserError, match="train.npy is damaged"):
        open_groups(tmp_path / "groups")


def test_test_classes_stay_the_same_whatever_is_trained_on():
    few, many = (split_classes(100, train, 5, 0, test_classes=20) for train in (20, 80))
    assert few.test_classes == many.test_classes and len(few.test_classes) == 20
    assert set(few.train_classes) < set(many.train_classes)
    with pytest.raises(UserError, match="test_classes is 21, but 20 are left"):
        split_classes(100, 80, 5, 0, test_classes=21)


def test_the_default_group_tables_are_the_same_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((Path(__file__).parent.parent / "params.yaml").read_text())
    prepare(load_params())
    make_groups(load_params())
    tables = sorted((tmp_path / "data" / "groups" / "split-0").glob("*.npy"))
    found = hashlib.sha256(b"".join(path.read_bytes() for path in tables)).hexdigest()
    assert [path.stem for path in tables] == ["search_train", "test", "train", "validation"]
    assert found.startswith("c6476e422a2a2c62")
