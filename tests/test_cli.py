"""The command `pudnet`, as a user types it: what it writes and says, and one line for what it cannot take."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from pudnet import PredictedNetwork, Predictor
from pudnet.cli import main
from pudnet.locations import shipped

ROOT = Path(__file__).parent.parent


def write_digits(folder, classes, count, start=0):
    """Real digits as PNG files, a subfolder for each class."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for label in classes:
        (folder / str(label)).mkdir(parents=True)
        for row in np.flatnonzero(digits.target == label)[start : start + count]:
            Image.fromarray(images[row]).resize((24, 24)).save(folder / str(label) / f"{row:04}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_digits(folder / "data", (0, 1, 4), 10)
    write_digits(folder / "new", (0, 1, 4), 20, start=10)
    (folder / "flat").mkdir()
    for file in (folder / "new").rglob("*.png"):
        (folder / "flat" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def weights(photos):
    path = photos / "w.safetensors"
    assert main(["predict", "--data", str(photos / "data"), "--out", str(path)]) == 0
    return path


def test_predict_and_classify_work_right_after_set_up(photos, weights, capsys):
    out = photos / "classes.csv"
    assert main(["classify", "--weights", str(weights), "--data", str(photos / "new"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    right = [row["class"] == row["label"] for row in rows]
    assert len(rows) == 60 and np.mean(right) > 0.8  # digits, with a model that was trained on photos
    assert "60 images (made 32x32 px, colour, as the model's training data was)" in said
    low, high = (100 * end for end in binomtest(sum(right), 60).proportion_ci(method="wilson"))
    assert f"accuracy {100 * np.mean(right):.2f} % (95% interval: {low:.1f} to {high:.1f}) of 60 labelled" in said


@pytest.mark.parametrize("model", sorted(shipped()))
def test_every_shipped_model_tells_digits_apart(model, photos, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    assert main(["predict", "--model", model, "--data", str(photos / "data"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["classify", "--weights", str(out), "--data", str(photos / "new")]) == 0
    assert float(capsys.readouterr().out.split("accuracy ")[1].split()[0]) > 80


def test_predict_says_what_it_looked_at(photos, tmp_path, capsys):
    command = ["predict", "--data", str(photos / "new"), "--sketch", "51", "--out", str(tmp_path / "w.safetensors")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "convnet3 for 3 classes, predicted from 51 of 60 images (made 32x32 px, colour, as" in said
    assert PredictedNetwork.load(tmp_path / "w.safetensors").card.provenance["support_images"] == 51


def test_predict_names_the_network_that_these_images_chose(tmp_path, capsys):
    data, out = write_digits(tmp_path / "data", range(10), 20), tmp_path / "w.safetensors"
    assert main(["predict", "--model", "fashion-convnet3", "--data", str(data), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: convnet3_multilevel for 10 classes")
    assert PredictedNetwork.load(out).card.target == "convnet3_multilevel"


def test_images_without_labels_are_classified_too(photos, weights, tmp_path, capsys):
    command = ["classify", "--weights", str(weights), "--data", str(photos / "flat"), "--out", str(tmp_path / "c.csv")]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("60 images (made ")
    assert {row["label"] for row in csv.DictReader((tmp_path / "c.csv").open())} == {""}


def test_finetune_writes_a_better_network_and_both_curves(photos, weights, tmp_path, capsys):
    out, curve = tmp_path / "tuned.safetensors", tmp_path / "curve.csv"
    command = ["finetune", "--weights", str(weights), "--data", str(photos / "new"), "--epochs", "3"]
    assert main([*command, "--out", str(out), "--curve", str(curve)]) == 0
    rows = list(csv.DictReader(curve.open()))
    assert [(row["start"], int(row["epoch"])) for row in rows] == [
        (s, e) for s in ("predicted", "random") for e in range(4)
    ]
    said = capsys.readouterr().out
    assert "accuracies on 12 others" in said
    right = round(float(rows[3]["accuracy"]) * 12 / 100)
    low, high = (100 * end for end in binomtest(right, 12).proportion_ci(method="wilson"))
    assert f" -> {100 * right / 12:.2f} % (95% interval: {low:.1f} to {high:.1f})\nfrom random weights: " in said
    assert PredictedNetwork.load(out).card.provenance["finetuned_epochs"] == 3


def test_export_and_info(weights, tmp_path, capsys):
    assert main(["export", "--weights", str(weights), "--out", str(tmp_path / "w.pt2")]) == 0
    assert "gives the same logits" in capsys.readouterr().out and (tmp_path / "w.pt2").is_file()
    assert main(["info", str(weights)]) == 0
    said = capsys.readouterr().out
    for line in ("kind: network", "setting: cifar100", "split_seed: 0", "variant: pudnet_plus", "git_commit: "):
        assert line in said
    assert "calibration_images: 30" in said


def test_every_shipped_model_has_a_card_of_its_own_figures():
    names = {"cifar100-convnet3", "fashion-convnet3"}
    assert set(shipped()) == names | {f"{name}-pretrained-ridge" for name in names}
    for name, path in shipped().items():
        test = Predictor.load(name).card.provenance["test"]
        card = path.with_suffix(".md").read_text()
        assert f"{test['accuracy']:.2f} ± {test['ci95']:.2f} %" in card and test["test_groups"] == 500
        assert path.stat().st_size < 4e6


def test_skip_bad_goes_on_and_counts(photos, weights, tmp_path, capsys):
    folder = write_digits(tmp_path / "data", (0, 1), 4)
    (folder / "0" / "0000.png").write_text("no image")
    command = ["--data", str(folder), "--out", str(tmp_path / "out")]
    for start in (["predict"], ["classify", "--weights", str(weights)]):
        assert main([*start, *command]) == 2
        told = capsys.readouterr().err
        assert f"{folder / '0' / '0000.png'} cannot be read as an image" in told and "--skip-bad" in told
        assert not (tmp_path / "out").exists()
        assert main([*start, *command, "--skip-bad"]) == 0
        assert f"1 file(s) that cannot be read were left out, the first {folder / '0' / '0000.png'}" in (
            capsys.readouterr().out
        )
        (tmp_path / "out").unlink()


def test_classify_says_which_images_the_weights_were_predicted_from(photos, weights, capsys):
    command = ["classify", "--weights", str(weights), "--data"]
    assert main([*command, str(photos / "data")]) == 0
    assert "of 30 labelled; 30 of them are images that the weights were made from" in capsys.readouterr().out
    assert main([*command, str(photos / "new")]) == 0
    assert "made from" not in capsys.readouterr().out
    assert main(["info", str(weights)]) == 0
    assert "looked_at: 30 images, by their checksums" in capsys.readouterr().out


def test_folders_that_are_no_class_are_said_and_names_stay_readable(photos, weights, tmp_path, capsys):
    new = write_digits(tmp_path / "new", (0, 7, 9), 2)
    assert main(["classify", "--weights", str(weights), "--data", str(new)]) == 0
    assert "of 2 labelled; 4 are in folders that are none of its classes (7, 9)" in capsys.readouterr().out
    assert main(["classify", "--weights", str(weights), "--data", str(new), "--out", str(tmp_path / "c.csv")]) == 0
    labels = [row["label"] for row in csv.DictReader((tmp_path / "c.csv").open())]
    assert labels == ["0", "0", "7", "7", "9", "9"]
    capsys.readouterr()
    (new / "7").rename(new / "\u0446\u0438\u0444\u0440\u0430")
    assert main(["predict", "--data", str(new), "--out", str(tmp_path / "w.safetensors")]) == 0
    assert main(["info", str(tmp_path / "w.safetensors")]) == 0
    assert "- \u0446\u0438\u0444\u0440\u0430\n" in capsys.readouterr().out


def test_names_in_two_unicode_forms_are_one_class(tmp_path, capsys):
    """Folders that come from a Mac, and labels from Python, which stay as they are."""
    one, other = "caf\u00e9", "the\u0301"  # the second in the form of a Mac
    new = write_digits(tmp_path / "new", (0, 1), 20)
    for folder, name in (("0", one), ("1", other)):
        (new / folder).rename(new / name)
    images = [Image.open(file) for name in (one, other) for file in sorted((new / name).iterdir())]
    network = Predictor.load("cifar100-convnet3").predict(images[:5] + images[20:25], [one] * 5 + [other] * 5)
    network.save(tmp_path / "w.safetensors")
    command = ["--weights", str(tmp_path / "w.safetensors"), "--data", str(new)]
    assert main(["classify", *command]) == 0
    assert "of 40 labelled" in capsys.readouterr().out
    assert main(["finetune", *command, "--out", str(tmp_path / "o.safetensors"), "--epochs", "1"]) == 0


def test_files_of_a_type_that_is_not_read_are_said(weights, tmp_path, capsys):
    folder = write_digits(tmp_path / "data", (0, 1, 4), 20)
    (folder / "0" / "x.psdx").write_text("no image")
    for command in ("predict", f"classify --weights {weights}", f"finetune --weights {weights} --epochs 1"):
        assert main([*command.split(), "--data", str(folder), "--out", str(tmp_path / "out")]) == 0
        assert "passed over, since their type is not read: 1 .psdx" in capsys.readouterr().out


@pytest.fixture
def bad(photos, weights, tmp_path):
    """What a user may hand over by mistake."""
    write_digits(tmp_path / "one", (3,), 2)
    (tmp_path / "none").mkdir()
    for part in ("train", "val"):
        write_digits(tmp_path / "set" / part, (0, 1), 2)
    (tmp_path / "text.safetensors").write_text("no tensors at all, but long enough to have a header")
    damaged = bytearray(weights.read_bytes())
    (tmp_path / "cut.safetensors").write_bytes(damaged[:-100])
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    header = json.loads(bytes(damaged[8 : 8 + int.from_bytes(damaged[:8], "little")]))
    card = json.loads(header["__metadata__"]["pudnet"])
    from pudnet.card import Card, read_tensors, write_tensors

    tensors, _ = read_tensors(weights)
    write_tensors(tmp_path / "other.safetensors", tensors, Card(**{**card, "target": "resnet18"}))
    write_tensors(tmp_path / "later.safetensors", tensors, Card(**{**card, "format": 99}))
    return tmp_path


PREDICT = "predict --data {data} --out {tmp}/o.safetensors"
CLASSIFY = "classify --weights {weights} --data {data}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "predict --data {tmp}/one --out {tmp}/o",
            "labels: need images of at least two classes, got 1 (3); in a folder, a subfolder for each",
        ),
        ("predict --data {tmp}/none --out {tmp}/o", "none has no images"),
        ("predict --data {tmp}/absent --out {tmp}/o", "absent: no such folder"),
        (
            "predict --data {tmp}/set --out {tmp}/o",
            "set: subfolders called train, val are taken for parts of a dataset",
        ),
        (
            "finetune --weights {weights} --data {tmp}/set --out {tmp}/o",
            "not for classes; give one of them, as {tmp}/",
        ),
        ("predict --data {data} --out {tmp}/text.safetensors/o", "text.safetensors/o: cannot be written"),
        (
            "predict --data {flat} --out {tmp}/o",
            "flat: has no subfolders; it needs one subfolder of images for each class",
        ),
        ("predict --data {data} --out .", ".: cannot be written (it is a folder)"),
        ("predict --data {data} --out {tmp}/none", "none: cannot be written (it is a folder)"),
        ("predict --data {data} --out {tmp}/o.pth", "o.pth: this command writes .safetensors"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o.onnx", "o.onnx: this command writes .safetensors"),
        ("predict --data {tmp}/absent --out .", ".: cannot be written (it is a folder)"),  # before a file is read
        (PREDICT + " --model {tmp}", "is a folder, not a file"),
        (PREDICT + " --model " + 300 * "x", "xxx: no such file, nor a model"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o --curve {tmp}/none", "none: cannot be written"),
        ("export --weights {weights} --out {weights}", "write it over another of its files; give another name"),
        (CLASSIFY + " --out {weights}", "write it over another of its files; give another name"),
        ("predict --data {data} --model {weights} --out {weights}", "this command would write it over another"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o --curve {tmp}/o", "/o: this command would write"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o --curve {weights}", "write it over another"),
        ("predict --data {data} --out {tmp}/o.ONNX", "o.ONNX: this command writes .safetensors"),
        (PREDICT + " --model {weights}", "holds a predicted network, not a trained PudNet"),
        (PREDICT + " --model {tmp}/text.safetensors", "text.safetensors: not a PudNet file"),
        (PREDICT + " --model {tmp}/pickle.pt", "pickle.pt: not a PudNet file"),
        (PREDICT + " --model absent", "absent: no such file, nor a model that ships with the project (cifar100-conv"),
        (PREDICT + " --model models:/absent/1", "models:/absent/1: no mlflow.db here"),
        (PREDICT + " --model s3://x/y", "s3://x/y: nothing is installed that reads s3:/"),
        (PREDICT + " --support 0", "support_per_class: must be an integer of at least 1, got 0"),
        (PREDICT + " --target resnet18", "target: this file is for convnet3, not for resnet18"),
        ("classify --weights {tmp}/cut.safetensors --data {data}", "cut.safetensors: not a PudNet file"),
        ("classify --weights {tmp}/other.safetensors --data {data}", "tensors do not fit its card"),
        ("classify --weights {tmp}/later.safetensors --data {data}", "written in format 99, this version reads"),
        (CLASSIFY + " --target resnet18", "target: this file is for convnet3, not for resnet18"),
        (CLASSIFY + " --out {tmp}/text.safetensors/o", "text.safetensors/o: cannot be written"),
        ("classify --weights {weights} --data {weights}", "w.safetensors: is a file, not a folder"),
        ("finetune --weights {weights} --data {tmp}/one --out {tmp}/o", "two classes"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o --epochs 0", "epochs: must be an integer"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o --held-out 0.99", "too few to hold"),
        ("finetune --weights {weights} --data {data} --out {tmp}/o --learning-rate 0", "learning_rate: must be"),
        ("export --weights {weights} --out {tmp}/o.h5", "exports end in .onnx, .pt2, .safetensors"),
        ("info {tmp}/pickle.pt", "pickle.pt: not a PudNet file"),
    ],
)
def test_mistakes_are_said_in_one_line(command, message, bad, photos, weights, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = sorted(bad.rglob("*"))
    places = {"tmp": bad, "data": photos / "data", "flat": photos / "flat", "weights": weights}
    assert main(command.format(**places).split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message.replace("{tmp}", str(bad)) in said
    assert sorted(bad.rglob("*")) == before


def test_usage_errors_end_with_2_and_help_is_quick():
    done = subprocess.run([sys.executable, "-m", "pudnet.cli", "predict"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--data" in done.stderr
    code = "import sys, pudnet.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
