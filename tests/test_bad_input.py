"""Whatever comes as params.yaml, as a study or as images: a result, or one line and exit code 2.

Never a traceback, never a half-written output. Cases are drawn by hypothesis, the same in every run.
"""

import contextlib
import copy
import io
import operator
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.check import check
from pipeline.groups import groups as make_groups
from pipeline.params import load_params
from pipeline.prepare import prepare
from pipeline.project import STORE, TEST_STORE, group_folder
from pipeline.studies.columns import ANY, column_params, row_spec, wanted
from pipeline.studies.definition import load_study
from pudnet import PredictedNetwork, Predictor
from pudnet.cli import main
from pudnet.data.groups import open_groups
from pudnet.data.sources import open_source
from pudnet.data.store import open_store, write_store
from pudnet.errors import UserError, exit_code

ROOT = Path(__file__).parent.parent
PARAMS = (ROOT / "params.yaml").read_text()
STUDIES = [path.read_text() for path in sorted((ROOT / "studies").glob("*.yaml")) if path.stem != "dvc"]


def cases(count):
    """So many cases, the same in every run; how long one takes depends on the machine, and is no matter."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def answer(command, *arguments):
    """What a command ends with: None for a result, else the one line that it says. A traceback fails the test."""
    out, said = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))  # strict, as a terminal's
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("ignore")
        for kind in (UserWarning, RuntimeWarning):  # of the kinds that a user sees
            warnings.simplefilter("default", kind)
        code = command(*arguments) if command is main else exit_code(lambda: command(*arguments))
    said.flush()
    line = said.buffer.getvalue().decode()
    assert not warned, str(warned[0])
    if code == 0:
        return None
    assert code == 2 and line.startswith("error: ") and len(line.splitlines()) == 1, (code, line)
    assert 10 < len(line) < 2000
    return line.removeprefix("error: ")


@contextlib.contextmanager
def empty_folder():
    """A new folder to work in."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# YAML, with one or two of its values changed, or its text damaged

WORDS = [
    "",
    " ",
    "a\nb",
    "é🙂\u2028",
    "nan",
    "1e-3",
    "null",
    "x" * 5000,
    "../..",
    "~nobody/x",
    "a:b",
    ":",
    "\0",
    "{row}",
]
NUMBERS = [0, 1, 2, 3, 7, -1, 64, 1000, 10**6, 10**9, 2**31, 2**62, 2**63, 10**30, 0.0, -0.0, 0.5, 1e300, 5e-324]
PLAIN = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=8)
)
KEYS = st.sampled_from(["eta", "hidden", "source", "methods", "pudnet", "space", "paper"]) | PLAIN.filter(
    lambda key: not isinstance(key, int) or abs(key) < 10**18
)
VALUES = PLAIN | st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def places(tree, above=()):
    """Where the values of nested mappings and lists stand."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from places(value, (*above, key))


def at(tree, place):
    for key in place:
        tree = tree[key]
    return tree


def changes(tree):
    """A change of nested mappings: what becomes of which place of them, and the key and value that takes."""
    how = st.sampled_from(["set"] * 6 + ["remove", "rename", "add"])
    return st.tuples(how, st.sampled_from(list(places(tree))), KEYS, VALUES)


def changed(tree, *made):
    """The mappings with changes made, as YAML."""
    tree = copy.deepcopy(tree)
    for how, place, key, value in made:
        with contextlib.suppress(KeyError, IndexError, TypeError):  # what an earlier change took away
            holder = at(tree, place[:-1])
            if how in ("remove", "rename"):
                value = holder.pop(place[-1])
            if how != "remove":
                key = place[-1] if how == "set" or isinstance(holder, list) else key
                holder.insert(key, value) if isinstance(holder, list) and how != "set" else operator.setitem(
                    holder, key, value
                )
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, encoding="utf-8")


@st.composite
def damaged(draw, text):
    """The bytes of a file that something has happened to."""
    data = text.encode()
    first = draw(st.integers(0, len(data)))
    last = draw(st.integers(first, min(len(data), first + 40)))
    return draw(
        st.sampled_from([data[:first], data[:first] + data[last:], data[:first] + data[first:last] * 2 + data[last:]])
        | st.builds(
            lambda middle: data[:first] + middle + data[last:], st.sampled_from(INSERTS) | st.binary(max_size=8)
        )
    )


INSERTS = [
    *(
        b"\t",
        b"\n\t",
        b"\xff\xfe",
        b"\0",
        b"\xef\xbb\xbf",
        b"\r",
        b"\x85",
        b"{",
        b"]",
        b"'",
        b'"',
        b"|",
        b"---\n",
        b"...\n",
    ),
    *(b"!!python/object:os.system ", b"!!python/name:os.system ", b"!!timestamp ", b"!!bool ", b"!!int ", b"!!binary "),
    *(b"&a ", b"*a", b"<<: ", b"? ", b"!!set ", b"!!float x", b"0b_", b"9" * 5000, b"0x" + b"f" * 5000, b"2024-13-45"),
]
BILLION = "a: &a [1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)
)
TEXTS = [
    "search: &a {space: *a}",
    "search: &a [*a]",
    "&a {search: {space: *a}}",
    "? &a [*a]\n: 1",
    BILLION,
    BILLION + "search: *y",
    PARAMS + BILLION,
    PARAMS.replace("eta: [0.0, 0.2, 0.5]", "eta: &a [*a]"),
    PARAMS + "setting: fashion\n",
    PARAMS.replace("  depth: null", "  eta: null"),
    "[" * 1500,
    "a: " + "{a: " * 1500,
    "0x" + "f" * 5000 + ": {a: 1}",
    "seed: 0x" + "f" * 5000,
    PARAMS.replace("seed: 0", "seed: 0x" + "f" * 5000),
    PARAMS.replace("model:", "? 0x" + "f" * 5000 + "\n: 1\nmodel:"),
    PARAMS.replace("hidden: 128", "hidden: 1000000"),
    PARAMS.replace("hidden: 128", "hidden: 9000000000000000"),
    PARAMS.replace("generator_hidden: 16", "generator_hidden: 100000000"),
    PARAMS.replace("filter_grid: 2", "filter_grid: 1000000"),
    PARAMS.replace("depth: [1, 2]", "hidden: [128, 1000000]"),
    PARAMS.replace("depth: [1, 2]", f"learning_rate: {[n / 1000 for n in range(1, 8000)]}"),
    PARAMS.replace("sources: {}", "sources: " + "[" * 90 + "]" * 90),
    "- " * 3000,
    "!!python/object/apply:os.system ['true']",
    "--- {}\n--- {}\n",
    "\ufeff" + PARAMS,
    "",
    "null",
    "~",
    "a",
    "{}",
]


def names_the_place(said, change):
    """Whether a line names the place of a change, or the key that it brought."""
    how, place, key, _ = change
    named = [str(UserError(part)).rpartition(".")[2] for part in (*place, *([key] if how in ("add", "rename") else []))]
    return not any(named) or any(part in said for part in named if part)


def checked(content):
    """Stage `check` on a params.yaml of these bytes."""
    with empty_folder() as folder:
        (folder / "params.yaml").write_bytes(content)
        return answer(lambda: check(load_params()))


TREE = yaml.safe_load(PARAMS)


@cases(140)
@given(changes(TREE))
def test_any_value_in_params_is_taken_or_named(change):
    said = checked(changed(TREE, change))
    assert said is None or names_the_place(said, change)


@cases(60)
@given(changes(TREE), changes(TREE))
def test_any_two_values_in_params_are_taken_or_refused(one, other):
    checked(changed(TREE, one, other))


@cases(80)
@given(damaged(PARAMS) | st.binary(max_size=40) | st.text().map(str.encode))
def test_any_bytes_as_params_are_taken_or_refused(content):
    checked(content)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_trick_of_yaml_is_taken_or_refused(text):
    checked(text.encode())


# The stages that write data


SMALL = TREE | {
    "groups": TREE["groups"] | {"train_groups": 4, "search_groups": 3, "validation_groups": 2, "test_groups": 3},
}
OTHERS = {"model", "train", "search", "evaluate", "baselines", "study", "resources", "variant", "target"}
SIZES = st.sampled_from(
    [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 40, 88, 178, 10**9, 10**17, True, 2.5, -1, "2"]
)
SOURCES = st.sampled_from(
    [
        "sklearn:digits",
        "sklearn:iris",
        "npz:x.npz",
        "npz:",
        "folder:.",
        "folder:data",
        "folder:~nobody/x",
        "torchvision:X",
    ]
    + ["npz:" + "x" * 300, "folder:" + "x" * 300, "npz:\0", "folder:a\nb", "torchvision:\n", "npz:params.yaml", "npz:."]
)
SEVERAL = st.sampled_from([[], ["sklearn:digits", "npz:x.npz"], ["sklearn:digits"], ["sklearn:digits", 3]])


def of_stages():
    """Changes of what `prepare` and `groups` read."""
    sizes = [place for place in places(SMALL) if place[0] in ("groups", "seed", "splits") and place != ("groups",)]
    sizes += [("prepare", "channels"), ("prepare", "image_size")]
    return st.one_of(
        st.tuples(st.just("set"), st.sampled_from(sizes), KEYS, SIZES),
        st.tuples(st.just("set"), st.sampled_from(sizes), KEYS, SIZES),
        st.tuples(
            st.just("set"),
            st.sampled_from([("prepare", "source"), ("prepare", "test_source")]),
            KEYS,
            SOURCES | SEVERAL,
        ),
        changes({key: value for key, value in SMALL.items() if key not in OTHERS}),
    )


@cases(60)
@given(of_stages(), of_stages())
def test_prepare_and_groups_write_all_or_nothing(one, other):
    with empty_folder() as folder:
        (folder / "params.yaml").write_bytes(changed(SMALL, one, other))
        prepared = answer(lambda: prepare(load_params())) is None
        assert names_in(folder / "data") == ["prepared"] if prepared else not any(folder.glob("data/*"))
        if prepared:
            params = load_params()
            grouped = answer(lambda: make_groups(load_params())) is None
            assert open_store(STORE, verify=True).image_size == params.prepare.image_size
            assert TEST_STORE.exists() == (params.prepare.test_source is not None)
            assert names_in(folder / "data") == (["groups"] if grouped else []) + ["prepared"]
            for seed in params.split_seeds if grouped else ():
                assert len(open_groups(group_folder(seed))[1]["train"]) == params.groups.train_groups


# Studies


def studied(content):
    """All that `python -m pipeline.study` makes of studies/x.yaml before it begins to work."""

    def study():
        found = load_study("x")
        params = {column: column_params(found, column) for column in found.columns}
        for own in wanted(found, params)[0].values():
            for name, row in found.rows.items():
                row_spec(own, name, row, own.seed, ANY)

    with empty_folder() as folder:
        (folder / "studies").mkdir()
        (folder / "studies" / "x.yaml").write_bytes(content)
        (folder / "params.yaml").write_text(PARAMS)
        return answer(study)


STUDY = {
    "title": "t",
    "over": {"groups.train_groups": 300, "target": "convnet3", "study.budget": 1.0, "prepare.source": "sklearn:digits"},
    "reference": "a",
    "measure": "accuracy",
    "columns": {
        "x / 1": {"setting": "fashion", "paper": "table11.cifar100.{row}"},
        "x / 2": {"groups.train_groups": 9},
    },
    "axis": "columns",
    "rows": {
        "a": {"paper": "2", "changes": {"depth": 4}, "images": 5},
        "b": {"method": "protonet", "changes": {"scale": 2.0, "learning_rate": 0.1}},
        "c": {"variant": "pudnet_plus", "sketch": "constant", "images": 3},
    },
    "finetune": {"epochs": 3},
    "whole": {"images": "i", "test_images": "j", "top": 5},
}


def test_the_study_that_is_changed_is_one():
    assert studied(changed(STUDY)) is None


@cases(100)
@given(changes(STUDY))
def test_any_value_in_a_study_is_taken_or_named(change):
    said = studied(changed(STUDY, change))
    assert said is None or names_the_place(said, change)


@cases(40)
@given(st.sampled_from(STUDIES).flatmap(damaged) | st.sampled_from(TEXTS).map(str.encode))
def test_any_bytes_as_a_study_are_taken_or_refused(content):
    studied(content)


@given(st.sampled_from(WORDS) | st.text())
@cases(20)
def test_any_name_of_a_study_is_looked_up_or_refused(name):
    with empty_folder():
        assert answer(load_study, name)


# Images


def encoded(image, kind):
    """The bytes of an image file."""
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def claiming(width, height):
    """A PNG file of a few bytes that says it has so many pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def files_of_all_kinds():
    """Small images of every kind, mode and shape that Pillow writes: their bytes, by suffix."""
    found = []
    for kind, suffix, modes in (
        ("PNG", "png", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        ("JPEG", "jpg", ("L", "RGB", "CMYK")),
        ("GIF", "GIF", ("P", "L")),
        ("BMP", "bmp", ("1", "L", "P", "RGB")),
        ("TIFF", "tiff", ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB")),
        ("WEBP", "webp", ("RGB", "RGBA")),
    ):
        for number, mode in enumerate(modes):
            size = [(9, 7), (1, 1), (300, 1), (1, 300)][number % 4]
            found.append((suffix, encoded(Image.new(mode, size), kind)))
    compressed = io.BytesIO()
    Image.new("RGB", (9, 7)).save(compressed, "TIFF", compression="tiff_lzw")
    return [*found, ("tif", compressed.getvalue())]


WHOLE = files_of_all_kinds()
PICTURE = encoded(Image.effect_noise((12, 12), 50), "PNG")
ODD = [
    b"",
    b"no image",
    b"\0" * 100,
    claiming(50_000, 50_000),
    claiming(0, 5),
    claiming(2**31 - 1, 1),
    b"GIF89a",
    b"BM",
]
NAMES = st.sampled_from(
    ["a", "A", "b", " ", "  c", "é", "e\u0301", "猫", ".hidden", "..x", "a\nb", "a\rb", "\u2028", "🙂", "-o", "x" * 200]
    + [
        "a,b",
        '"',
        "'",
        "$HOME",
        "~",
        "*",
        "%s",
        "{x}",
        "a.png",
        "con",
        os.fsdecode(b"\xff\xfe"),
        "\x1b[31m",
        "None",
        "nan",
    ]
) | st.text(min_size=1, max_size=12).filter(lambda name: name not in (".", "..") and not set(name) & set("/\0"))


@st.composite
def files(draw):
    """The suffix and bytes of a file that may be an image."""
    suffix, content = draw(st.sampled_from(WHOLE))
    how = draw(st.sampled_from(["whole", "whole", "whole", "cut", "changed", "odd", "suffix"]))
    if how == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif how == "changed":
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place + draw(st.integers(0, 9)) :]
    elif how == "odd":
        content = draw(st.sampled_from(ODD) | st.binary(max_size=50))
    elif how == "suffix":
        suffix = draw(st.sampled_from(["png", "txt", "jpeg", "", "tif", "npz", "PNG"]))
    return suffix, content


LINKS = ["nowhere", ".", "..", "/dev/null", "/dev/zero", "0.png", "x" * 200]  # where links lead to
ENTRIES = st.one_of(files(), st.sampled_from(LINKS), NAMES, st.tuples(NAMES, files()))
TREES = st.dictionaries(NAMES, st.lists(ENTRIES, max_size=3), max_size=4)  # class -> files, links, folders


def grow(root, tree, whole):
    """Write a tree of classes; with `whole`, each also has pictures that can be read."""
    for name, entries in tree.items():
        (root / name).mkdir(parents=True)
        for number, entry in enumerate(entries):
            with contextlib.suppress(FileExistsError, NotADirectoryError):  # two of one name
                plant(root / name, number, entry)
        for number in range(2 if whole else 0):
            (root / name / f"whole{number}.png").write_bytes(PICTURE)
    root.mkdir(exist_ok=True)


def plant(folder, number, entry):
    """Put a file, a link (beside the folder too), an empty folder or one with a file into a folder."""
    if isinstance(entry, str) and entry in LINKS:
        (folder / f"{number}.png").symlink_to(entry)
        (folder.parent / f"link{number}").symlink_to(entry)
    elif isinstance(entry, str):
        (folder / entry).mkdir()
    elif isinstance(entry[1], tuple):
        (folder / entry[0]).mkdir()
        plant(folder / entry[0], number, entry[1])
    else:
        (folder / f"{number}.{entry[0]}").write_bytes(entry[1])


def stored(spec, folder):
    """Write a source as a store in `folder`, as stage `prepare` does: all of it, or nothing and one line."""
    said = answer(lambda: write_store(open_source(spec, folder / "raw", 8, 3), folder / "data" / "store"))
    if said is None:
        store = open_store(folder / "data" / "store", verify=True)
        assert store.images.shape[1:] == (8, 8, 3) and len(store.images) == len(store.labels)
    assert not any((folder / "data").glob("*")) if said else names_in(folder / "data") == ["store"]
    return said


@cases(80)
@given(TREES, st.booleans())
def test_any_folder_of_images_is_stored_or_refused(tree, whole):
    with empty_folder() as folder:
        grow(folder / "images", tree, whole)
        stored(f"folder:{folder / 'images'}", folder)


@cases(60)
@given(files())
def test_any_file_in_a_folder_is_stored_or_named(file):
    with empty_folder() as folder:
        grow(folder / "images", {"a": [file]}, whole=True)
        said = stored("folder:images", folder)
        assert said is None or f"a/0.{file[0]}" in said


@cases(40)
@given(
    SOURCES
    | st.tuples(st.sampled_from(["folder:", "npz:", ""]), st.text(max_size=9) | st.sampled_from(WORDS)).map("".join)
)
def test_any_name_of_a_source_is_refused_where_there_is_none(spec):
    with empty_folder() as folder:
        (folder / "params.yaml").write_text(PARAMS)
        (folder / "data").mkdir()
        assert spec == "sklearn:digits" or stored(spec, folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model that looks at small images, and weights that it predicts."""
    folder = tmp_path_factory.mktemp("model")
    predictor = Predictor.untrained("convnet3", 3, 32)
    predictor.save(folder / "model.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    predictor.predict(images, [0, 1, 0, 1]).save(folder / "weights.safetensors")
    return folder


@cases(60)
@given(TREES, st.booleans(), st.booleans(), st.booleans())
def test_any_folder_is_predicted_from_and_classified_or_refused(model, tree, whole, skip_bad, classify):
    with empty_folder() as folder:
        grow(folder / "images", tree, whole)
        command = ["predict", "--model", str(model / "model.safetensors")]
        if classify:
            command = ["classify", "--weights", str(model / "weights.safetensors")]
        command += ["--data", "images", "--out", "out", *(["--skip-bad"] if skip_bad else [])]
        said = answer(main, command)
        assert names_in(folder) == (["images"] if said else ["images", "out"])
        if not said and not classify:
            assert len(PredictedNetwork.load(folder / "out").classes) >= 2


ARRAYS = st.one_of(
    st.builds(
        lambda shape, kind: np.zeros(shape, kind),
        st.lists(st.integers(0, 5), max_size=5),
        st.sampled_from(
            ["u1", "u1", "u1", ">i8", "u8", "f4", "f2", "c8", "?", "U3", "S3", "O", "M8[s]", "V3", "u1,f4"]
        ),
    ),
    st.lists(st.integers(-2, 4) | st.sampled_from([2**63 - 1, -(2**63)]), max_size=6).map(np.array),
    st.lists(st.text(max_size=3), max_size=4).map(np.array),
)
GOOD = {
    "images": np.arange(6 * 5 * 7 * 3, dtype=np.uint8).reshape(6, 5, 7, 3),
    "labels": np.array([0, 1, 0, 1, 1, 0]),
    "class_names": np.array(["a", "b"]),
}


def npz(arrays):
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


@cases(80)
@given(st.sampled_from(list(GOOD)), ARRAYS, st.sampled_from(["set", "set", "remove", "add", "bytes", "no text"]))
def test_any_arrays_in_an_npz_are_stored_or_refused(name, array, how):
    arrays = dict(GOOD)
    if how in ("remove", "bytes"):
        del arrays[name]
    elif how == "set":
        arrays[name] = array
    elif how == "no text":
        arrays["class_names"] = np.frombuffer(b"\xff" * 8, "<U1")  # of what are no characters
    else:
        arrays["more"] = array
    with empty_folder() as folder:
        (folder / "x.npz").write_bytes(npz(arrays))
        if how == "bytes":
            with zipfile.ZipFile("x.npz", "a") as archive:
                archive.writestr(name, b"no array")
        said = stored("npz:x.npz", folder)
        assert said is None or "x.npz" in said


@cases(60)
@given(st.integers(0, 2000), st.binary(max_size=6), st.booleans(), st.sampled_from([npz(GOOD), npz({})]))
def test_any_bytes_as_an_npz_are_stored_or_refused(place, middle, cut, whole):
    place %= len(whole)
    with empty_folder() as folder:
        (folder / "x.npz").write_bytes(whole[:place] + middle + (b"" if cut else whole[place + len(middle) :]))
        said = stored("npz:x.npz", folder)
        assert said is None or "x.npz" in said


# As a user starts it

LONG = "x" * 300  # no file can be called so


@pytest.mark.parametrize(
    "command",
    [
        f"predict --model {{model}}/model.safetensors --data {LONG} --out out",
        f"predict --model {{model}}/model.safetensors --data images --out {LONG}",
        "predict --model {model}/model.safetensors --data images --out images",
        "predict --model {model}/model.safetensors --data images --out images/a/0.png/out",
        f"predict --model {LONG} --data images --out out",
        f"classify --weights {{model}}/weights.safetensors --data images --out {LONG}",
        f"info {LONG}.safetensors",
    ],
)
def test_a_path_that_cannot_be_is_named(model, command):
    with empty_folder() as folder:
        grow(folder / "images", {"a": [("png", PICTURE)], "b": [("png", PICTURE)]}, whole=False)
        said = answer(main, command.format(model=model).split())
        assert said and (LONG[:150] in said or "images" in said)
        assert names_in(folder) == ["images"]


def test_a_file_where_a_store_is_to_be_is_left_alone():
    with empty_folder() as folder:
        (folder / "store").write_text("mine")
        said = answer(lambda: write_store(open_source("sklearn:digits", folder, 8, 1), folder / "store"))
        assert said.startswith(f"{folder / 'store'}: cannot be written") and names_in(folder) == ["store"]


def test_without_the_packages_of_the_experiment_a_command_says_how_to_get_them():
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import pipeline"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: the experiment needs ray and mlflow; run `make setup`"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("stage", ["check", "prepare"])
def test_a_command_ends_with_one_line_and_exit_code_2(stage, tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"\xff setting: digits")
    command = [sys.executable, "-m", f"pipeline.{stage}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: params.yaml: not YAML") and done.stderr.count("\n") == 1
    assert names_in(tmp_path) == ["params.yaml"]
