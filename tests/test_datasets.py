"""Datasets and DataLoaders as people hold them, torch's and Hugging Face's: the images and labels of plain arrays."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pudnet import Predictor
from pudnet.data.sources import open_source
from pudnet.data.user_images import labelled_set
from pudnet.errors import UserError
from pudnet.finetune import finetune

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
LABELS = [0, 1, 2] * 4
NAMES = ["cat", "dog", "emu"]


@pytest.fixture(scope="module")
def predictor():
    return Predictor.untrained("convnet3", 3, 16)


@pytest.fixture(scope="module")
def table():
    """As `datasets.load_dataset` gives them."""
    features = datasets.Features({"label": datasets.ClassLabel(names=NAMES), "image": datasets.Image()})
    return datasets.Dataset.from_dict({"label": LABELS, "image": [Image.fromarray(p) for p in PIXELS]}, features)


class Pairs(Dataset):
    """Counts which rows are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, row):
        self.read.append(row)
        return PIXELS[row], LABELS[row]


class Knowing(Pairs):
    targets = LABELS


def check(given, predictor, names, rows=range(12)):
    """These images with these labels, as from arrays."""
    images, labels, classes = labelled_set(given, None, predictor.card)
    assert torch.equal(torch.cat(list(images.chunks(5))), torch.from_numpy(PIXELS[list(rows)]))
    assert [classes[label] for label in labels] == [names[LABELS[row]] for row in rows]


def test_a_hugging_face_dataset_brings_images_labels_and_names(table, predictor):
    check(table, predictor, NAMES)
    check(table.with_format("torch"), predictor, NAMES)
    check(table.select(range(3, 9)), predictor, NAMES, range(3, 9))
    check(table.rename_columns({"image": "img", "label": "fine_label"}), predictor, NAMES)
    network, plain = predictor.predict(table), predictor.predict(PIXELS, [NAMES[label] for label in LABELS])
    assert network.classes == plain.classes == ("cat", "dog", "emu")
    assert torch.equal(network(table), plain(PIXELS))
    assert network.classify(table.remove_columns("label")) == plain.classify(PIXELS)
    assert finetune(network, table, epochs=1).trained_on == 9


def test_labels_of_a_hugging_face_dataset_need_no_image(table, predictor):
    opened = []

    def transform(items):
        opened.extend(items["image"])
        return items

    names = predictor.predict(table.with_transform(transform)).classes
    assert names == ("cat", "dog", "emu") and len(opened) == 3 + 12  # one of each label, for what becomes of it


@pytest.mark.parametrize("name", ["label", "target"])
def test_a_transforms_labels_are_the_labels(name, table, predictor):
    def transform(items):
        return {"image": items["image"], name: [label % 2 for label in items["label"]]}

    given = table.with_transform(transform)
    assert labelled_set(given, None, predictor.card)[1].tolist() == [label % 2 for label in LABELS]


def test_a_usual_name_is_a_label_before_a_column_of_classes(table, predictor):
    sources = datasets.Features({**table.features, "label": datasets.Value("int64")}) | {
        "source": datasets.ClassLabel(names=["phone", "web"])
    }
    columns = {"label": LABELS, "image": table["image"], "source": [0] * 12}
    check(datasets.Dataset.from_dict(columns, datasets.Features(sources)), predictor, (0, 1, 2))
    for other in ("labels", "target"):
        with pytest.raises(UserError, match=rf"clearly its label \(it has .*{other}.*\); call just one of them label"):
            predictor.predict(table.add_column(other, LABELS))


def test_images_of_a_column_with_any_name_are_found_below_wrappers(table, predictor):
    photos = table.rename_column("image", "photo")
    check(Subset(photos, range(3, 9)), predictor, NAMES, range(3, 9))
    check(DataLoader(ConcatDataset([photos, photos.select(range(6))])), predictor, NAMES, [*range(12), *range(6)])


def test_a_column_is_a_list_of_images_and_of_labels(table, predictor):
    assert predictor.predict(table["image"], table["label"]).classes == (0, 1, 2)


class Folder(Knowing):
    """As torchvision's ImageFolder."""

    classes = NAMES


class Renamed(Folder):
    target_transform = staticmethod(lambda label: label + 5)

    def __getitem__(self, row):
        return PIXELS[row], self.target_transform(LABELS[row])


def test_class_names_of_a_torchvision_dataset_come_with_it(predictor):
    check(Folder(), predictor, NAMES)
    check(DataLoader(Subset(Folder(), [0, 5, 7])), predictor, NAMES, [0, 5, 7])
    assert predictor.predict(Renamed()).classes == (5, 6, 7)


def test_what_is_not_clear_of_a_hugging_face_dataset_is_asked_for(table, predictor):
    twice = datasets.Dataset.from_dict({"a": [1, 2], "b": [3, 4]})
    with pytest.raises(
        UserError, match=r"no column of the Dataset is clearly its label \(it has a, b\); call just one of them label, "
    ):
        predictor.predict(twice)
    with pytest.raises(UserError, match="no column of the Dataset is clearly its image"):
        predictor.predict(PIXELS, LABELS).classify(twice)
    with pytest.raises(UserError, match=r"these are the parts of a dataset \(train, test\); give one, \['train'\]"):
        predictor.predict(datasets.DatasetDict({"train": table, "test": table}))
    with pytest.raises(UserError, match="must have a length"):
        predictor.predict(DataLoader(table.to_iterable_dataset()))
    with pytest.raises(UserError, match="labels: a folder or Dataset has its own labels; do not pass any"):
        predictor.predict(table, LABELS)


def test_a_label_that_is_not_known_is_missing(table, predictor):
    unknown = datasets.Dataset.from_dict({"label": [0, -1], "image": table["image"][:2]}, table.features)
    with pytest.raises(UserError, match="labels: image 1 has none"):
        predictor.predict(unknown)


def test_a_loader_gives_what_its_dataset_has(table, predictor):
    tensors = TensorDataset(torch.from_numpy(PIXELS).movedim(3, 1) / 255, torch.tensor(LABELS))
    before = torch.random.get_rng_state()
    for loader in (
        DataLoader(Pairs(), batch_size=5),
        DataLoader(Pairs(), batch_size=5, shuffle=True, drop_last=True),
        DataLoader(Pairs(), batch_size=None),
    ):
        check(loader, predictor, (0, 1, 2))
        assert predictor.predict(loader).classes == (0, 1, 2) and len(predictor.predict(loader).classify(loader)) == 12
    check(DataLoader(table, batch_size=4, collate_fn=list), predictor, NAMES)
    assert predictor.predict(DataLoader(tensors, 4)).classes == (0, 1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are the caller's


def test_a_loaders_sampler_picks_rows(predictor):
    rows = [5, 4, 3, 5, 8]
    check(DataLoader(Pairs(), sampler=SubsetRandomSampler(rows[1:])), predictor, (0, 1, 2), [3, 4, 5, 8])
    check(DataLoader(Pairs(), sampler=rows), predictor, (0, 1, 2), rows)
    joined = ConcatDataset([Subset(Pairs(), range(5)), Subset(Pairs(), range(5, 12))])
    check(Subset(joined, [-1, 4, -12]), predictor, (0, 1, 2), [11, 4, 0])
    with pytest.raises(UserError, match="item 12 of the Dataset cannot be read"):
        predictor.predict(Pairs()).classify(Subset(joined, [12]))
    check(DataLoader(Pairs(), batch_sampler=[[5, 4], [3, 5, 8]]), predictor, (0, 1, 2), rows)
    check(DataLoader(Pairs(), batch_sampler=BatchSampler(rows, 2, False)), predictor, (0, 1, 2), rows)
    assert len(predictor.predict(Pairs()).classify(DataLoader(Pairs(), sampler=[5, 5, 3]))) == 3


@pytest.mark.parametrize(
    "sampler",
    [
        lambda own: WeightedRandomSampler([1.0] * 12, 50, replacement=True, generator=own),
        lambda own: RandomSampler(range(12), replacement=True, generator=own),
        lambda own: RandomSampler(range(12), num_samples=8, generator=own),
    ],
)
@pytest.mark.parametrize("own", [None, torch.Generator()])
def test_a_random_sampler_is_drawn_once_and_nothing_of_it_is_used_up(sampler, own, predictor):
    torch.manual_seed(0)
    drawn = sampler(own)
    before = torch.random.get_rng_state(), own and own.get_state()
    images, labels, classes = labelled_set(DataLoader(Pairs(), sampler=drawn), None, predictor.card)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert own is None or torch.equal(own.get_state(), before[1])
    rows = list(drawn)
    assert torch.equal(torch.cat(list(images.chunks(5))), torch.from_numpy(PIXELS[rows]))
    assert [classes[label] for label in labels] == [LABELS[row] for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the DataLoader's sampler picks none"),
        ([0, 12], "the DataLoader's sampler picks row 12 of a Dataset of 12"),
        (["a"], "the DataLoader's sampler gives no rows .TypeError"),
    ],
)
def test_a_sampler_of_what_is_not_there_is_refused(rows, message, predictor):
    with pytest.raises(UserError, match=message):
        predictor.predict(DataLoader(Pairs(), sampler=rows))


def test_labels_below_wrappers_are_found_without_reading_an_image(predictor):
    whole = Knowing()
    half = Subset(ConcatDataset([Subset(whole, range(6)), Subset(whole, range(6, 12))]), range(2, 9))
    check(half, predictor, (0, 1, 2), range(2, 9))
    whole.read.clear()
    labelled_set(half, None, predictor.card)
    assert whole.read == []


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


class Halved(TensorDataset):
    """Gives other labels than its tensor has."""

    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image, int(label) // 2


def test_what_is_derived_from_a_tensor_dataset_gives_its_own_labels(predictor):
    _, labels, classes = labelled_set(Halved(torch.from_numpy(PIXELS), torch.tensor(LABELS)), None, predictor.card)
    assert classes == (0, 1) and labels.tolist() == [label // 2 for label in LABELS]


def test_a_tensor_dataset_is_read_for_the_images_that_are_looked_at_only(predictor, monkeypatch):
    given, read = TensorDataset(torch.from_numpy(PIXELS), torch.tensor(LABELS)), []
    get = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda own, row: [read.append(row), get(own, row)][1])
    few = Predictor(predictor.model, predictor.card, predictor.target, sketch_images=3, calibration_images=3)
    few.support_per_class = 1
    assert few.predict(given).classes == (0, 1, 2) and sorted(read) == [0, 1, 2]
    check(given, predictor, (0, 1, 2))


def test_what_cannot_be_read_by_row_is_refused_in_one_line(predictor):
    with pytest.raises(UserError, match="a Dataset must have a length"):
        predictor.predict(DataLoader(Endless()))
    with pytest.raises(UserError, match="must be an array, a list of images, a Dataset or a folder, got a generator"):
        predictor.predict(image for image in PIXELS)


MADE = Knowing()


def gives_a_loader():
    return DataLoader(Knowing(), batch_size=3)


def gives_nothing():
    return None


@pytest.mark.parametrize("name", ["MADE", "gives_a_loader"])
def test_the_pipeline_prepares_what_ones_own_code_gives(name, tmp_path):
    source = open_source(f"python:tests.test_datasets:{name}", tmp_path, 16, 3)
    assert source.class_names == ("0", "1", "2") and source.labels.tolist() == LABELS
    assert np.array_equal(np.concatenate(list(source.batches())), PIXELS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent:x", "gives no Dataset .ModuleNotFoundError: No module named 'absent'"),
        ("tests.test_datasets:absent", "gives no Dataset .AttributeError"),
        ("tests.test_datasets:gives_nothing", "gives a NoneType; it has to be a Dataset or DataLoader"),
    ],
)
def test_code_that_gives_no_dataset_is_refused(path, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(f"python:{path}", tmp_path, 16, 3)
