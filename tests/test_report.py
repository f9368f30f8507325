"""The report stage on a synthetic results folder."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from pipeline.params import Params, resolve
from pipeline.report import write_report
from pipeline.reporting.answer import answer_rows
from pipeline.reporting.drawing import to_svg
from pipeline.reporting.figures import search_figure
from pipeline.reporting.methods import label
from pipeline.reporting.numbers import duration, plus_minus, signed
from pipeline.reporting.page import verdict
from pipeline.reporting.paper import load_reported, paper_figures
from pipeline.reporting.results import PRODUCERS, histogram, read_results
from pudnet.errors import UserError
from pudnet.predictor import Predictor

ROOT = Path(__file__).parent.parent
SPLITS = (0, 1, 2)
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CHANCE = {
    "pudnet": 95.1,
    "protonet": 93.3,
    "scratch_adam_1": 90.2,
    "scratch_adam_5": 96.4,
    "scratch_gc_1": 90.6,
    "scratch_gc_5": 96.9,
    "pudnet_plus": 96.2,
    "static_trunk": 94.8,
    "constant_sketch": 94.9,
    "shuffled_sketch": 94.2,
    "random_weights": 88.3,
}


def run_of(setting: str = "fashion") -> Params:
    own = {"setting": setting, "splits": len(SPLITS)}
    return resolve(yaml.safe_load((ROOT / "params.yaml").read_text()) | own)


def write_search(folder, rng):
    rows = [
        (split, eta, depth, 400, 92 - 2 * split + depth / 4 - 20 * (eta - 0.2) ** 2 + rng.normal(0, 0.2), 0.4, 0.5)
        for split in SPLITS
        for eta in (0.0, 0.1, 0.2, 0.3, 0.5)
        for depth in (1, 2, 4)
    ]
    frame = pd.DataFrame(rows, columns=["split_seed", "eta", "depth", "groups", "accuracy", "ci95", "loss"])
    frame.to_csv(folder / "search.csv", index=False)
    best = frame.loc[frame.groupby("split_seed")["accuracy"].idxmax()]
    chosen = {
        int(r.split_seed): {"eta": r.eta, "depth": int(r.depth), "accuracy": r.accuracy} for r in best.itertuples()
    }
    (folder / "best.yaml").write_text(yaml.safe_dump({"splits": chosen}))
    return chosen


def write_accuracies(folder, rng, groups):
    rows = []
    for split in SPLITS:
        test = rng.permutation(CLASSES)[:4]
        pairs = [sorted(rng.choice(test, 2, replace=False)) for _ in range(groups)]
        hardness = {tuple(pair): abs(rng.normal(0, 3)) for pair in pairs}
        for method, level in CHANCE.items():
            for group, pair in enumerate(pairs):
                loss = hardness[tuple(pair)] * (100 - level) / 5 + abs(rng.normal(0, 1))
                rows.append((method, split, group, "; ".join(pair), max(50.0, 97.5 - loss)))
    columns = ["method", "split_seed", "group", "classes", "accuracy"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "accuracies.csv", index=False)


def write_tuning(folder):
    cells = [("protonet", None, "scale 1.0", 80.0), ("protonet", None, "scale 0.01", 82.5)]
    cells += [("scratch_gc", 5, "batch 50", 94.0)]
    tuning = [(name, 0, epochs, cell, 100, accuracy, 1.5, accuracy > 81) for name, epochs, cell, accuracy in cells]
    columns = ["method", "split_seed", "epochs", "cell", "groups", "accuracy", "ci95", "chosen"]
    pd.DataFrame(tuning, columns=columns).to_csv(folder / "tuning.csv", index=False)


def write_curves(folder, rng):
    steps = np.arange(20, 2001, 20)
    parts = []
    for method in ("pudnet", "static_trunk"):
        for split in SPLITS:
            noise = rng.normal(0, 0.03, (3, len(steps)))
            metric, full, kl = np.exp(-steps / 500) * np.array([[0.5], [1.5], [0.6]]) + 0.2 + noise
            columns = {"method": method, "split_seed": split, "groups": steps, "loss": metric + full + kl}
            columns |= {"metric_loss": metric, "full_loss": full, "kl_loss": kl, "train_accuracy": 97 - 10 * metric}
            parts.append(pd.DataFrame(columns))
    pd.concat(parts).to_csv(folder / "loss_curves.csv", index=False)


def write_weights(folder):
    predictor = Predictor.untrained("convnet3", channels=1, image_size=28)
    for group in range(4):
        names = CLASSES[2 * group : 2 * group + 2]
        images = np.random.default_rng(group).integers(0, 60 * (group + 1), (24, 28, 28, 1), dtype=np.uint8)
        network = predictor.predict(images, names * 12)
        network.save(folder / "weights" / "split-0" / f"group-{group:03d}.safetensors")


def write_summaries(folder, chosen, groups):
    def per_split(level):
        return {str(s): {"accuracy": level - s, "ci95": 0.4} for s in SPLITS}

    pudnet = per_split(CHANCE["pudnet"])
    for split, row in pudnet.items():
        test = CLASSES[int(split) : int(split) + 4]
        rest = [name for name in CLASSES if name not in test]
        row |= {k: chosen[int(split)][k] for k in ("eta", "depth")}
        row |= {"test_groups": groups, "test_classes": test, "train_classes": rest}
    metrics = {"setting": "fashion", "target": "convnet3", "accuracy": CHANCE["pudnet"], "ci95": 0.31}
    metrics |= {"test_groups": groups * len(SPLITS), "train_groups": 2000, "passes": 2.5, "splits": pudnet}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    methods = {
        name: {
            "accuracy": a,
            "ci95": 0.29,
            "test_groups": 300,
            "difference": a - 95.1,
            "difference_ci95": 0.12,
            "splits": per_split(a),
        }
        for name, a in CHANCE.items()
        if name != "pudnet"
    }
    (folder / "baselines.json").write_text(json.dumps({"methods": methods}))
    times = {"pudnet": 9.4, "pudnet_plus": 12.9, "protonet": 7.7, "static_trunk": 7.6}
    times |= {f"scratch_{name}_{epochs}": 61.0 * epochs for name in ("adam", "gc") for epochs in (1, 5)}
    (folder / "adaptation.json").write_text(json.dumps({"threads": 3, "milliseconds": times}))
    timing = {
        "device": "cpu",
        "threads": 2,
        "images": 600,
        "sketch_ms": 4.21,
        "generation_ms": 1.93,
    }
    timing |= {
        "sketch_images": 100,
        "calibration_images": 100,
        "calibration_ms": 31.4,
        "total_ms": 37.6,
        "epoch_ms": 214.0,
        "epoch_ratio": 5.69,
    }
    (folder / "timing.json").write_text(json.dumps(timing))


def build_results(folder, groups=40):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    chosen = write_search(folder, rng)
    write_accuracies(folder, rng, groups)
    write_tuning(folder)
    write_curves(folder, rng)
    write_weights(folder)
    write_summaries(folder, chosen, groups)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = build_results(tmp_path_factory.mktemp("run") / "results")
    write_report(run_of(), folder)
    return folder


@pytest.fixture(scope="module")
def page(results):
    return (results / "report.html").read_text()


def test_every_methods_figure_stands_with_its_interval(page):
    assert "95.10 ± 0.31" in page
    for name, accuracy in CHANCE.items():
        assert label(name) in page
        if name != "pudnet":
            assert f"{accuracy:.2f} ± 0.29" in page
            assert f"{signed(accuracy - 95.1, 0.12)}" in page


def test_times_have_the_threads_that_they_were_measured_with(page):
    assert "in one process with 3 threads" in page  # whatever `resources.cpus` is now


def test_the_papers_figures_stand_beside(page):
    assert "96.64 ± 0.34" in page
    assert "Adam, 30 epochs" in page and "99.97 ± 0.02" in page


def test_of_one_test_group_there_is_no_interval(tmp_path):
    folder = build_results(tmp_path / "results")
    compared = json.loads((folder / "baselines.json").read_text())
    for name, numbers in compared["methods"].items():
        if name.startswith("scratch"):
            numbers |= {"ci95": None, "difference_ci95": None, "test_groups": 1}
    (folder / "baselines.json").write_text(json.dumps(compared))
    write_report(run_of(), folder)
    assert (folder / "plots" / "race.png").stat().st_size > 0


def test_the_answer_has_each_method_that_was_run(results):
    found = {row.method: row for row in answer_rows(read_results(results))}
    assert list(found) == ["pudnet_plus", "pudnet", "protonet", "scratch_adam_5", "random_weights"]
    assert (found["pudnet"].accuracy, found["pudnet"].milliseconds) == (95.1, 9.4)
    assert found["scratch_adam_5"].label == "Adam from scratch, 5 epochs" and found["scratch_adam_5"].groups == 300


MEASURE = """<iframe id="page" width="{width}" height="4000" srcdoc="{page}"></iframe><script>
onload = () => {{
  const body = document.getElementById("page").contentDocument.body
  body.querySelectorAll("details").forEach(part => part.open = true)
  const said = part => part.tagName + " " + part.textContent.slice(0, 40)
  const shown = part => !part.closest(".scroll") || part.closest(".methods")  // other tables may scroll
  const end = body.ownerDocument.documentElement.clientWidth + 1
  const wide = [...body.querySelectorAll("*")].filter(part => shown(part) && part.getBoundingClientRect().right > end)
  const parts = picture => picture.querySelectorAll("path, image").length
  const drawn = picture => picture.getBoundingClientRect().height > 40 && parts(picture) > 3
  const empty = [...body.querySelectorAll("figure")].filter(one => ![...one.querySelectorAll("svg")].some(drawn))
  document.title = JSON.stringify({{wide: wide.map(said), empty: empty.map(said)}})
}}</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])  # a phone, a screen
def test_nothing_of_the_page_is_cut_off_and_no_figure_is_empty(width, page, tmp_path):
    (tmp_path / "measure.html").write_text(MEASURE.format(width=width, page=html.escape(page)))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "measure.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert found == {"wide": [], "empty": []}


def test_the_race_says_when_training_from_scratch_passes_a_prediction(page):
    found = re.search(
        r"Adam from scratch\s+passes PudNet \((.*?) %\) with\s+5 epochs.*?after\s+305 ms,\s+(\d+) times", page, re.S
    )
    assert found and found[2] == "32"  # 305 ms over 9.4 ms
    for text in ("7.70 ms", "scale 0.01", "82.50 ± 1.50", "Adam, 5 epochs", "seconds for a test group"):
        assert text in page


def test_the_page_shows_splits_times_and_movement(page):
    for text in (
        "Trouser",
        "37.6 ms",
        "5.7 times",
        "block2.conv.weight",
        "moved ",
        "dvc repro",
        "split_seeds: [0, 1, 2]",
    ):
        assert text in page


def test_the_page_asks_the_network_for_nothing(page):
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import\s*(\S*)""", page)
    assert all(link.startswith(("data:", "#", '"#', "'#")) for parts in links for link in parts if link)
    assert "http://" not in page and "https://" not in page


def test_every_colour_of_a_picture_follows_the_scheme(page):
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", pictures)) <= {"#ffffff"}


def test_two_renderings_are_the_same_bytes(results):
    files = [results / "report.html", *sorted((results / "plots").iterdir())]
    before = [file.read_bytes() for file in files]
    write_report(run_of(), results)
    assert [file.read_bytes() for file in files] == before


def test_plot_files(results):
    names = {file.name for file in (results / "plots").iterdir()}
    pictures = {"distribution.png", "race.png", "search.png", "filters.png", "filter_differences.png"}
    assert names == {"search.csv", "loss_curves.csv", "accuracy_histogram.csv"} | pictures
    bins = pd.read_csv(results / "plots" / "accuracy_histogram.csv")
    assert (bins.groupby("method")["groups"].sum() == 120).all()


def test_dvcs_plot_has_its_axis_after_a_search_of_anything(tmp_path):
    folder = build_results(tmp_path / "results", groups=4)
    search, best = pd.read_csv(folder / "search.csv"), yaml.safe_load((folder / "best.yaml").read_text())["splits"]
    search.drop(columns="eta").to_csv(folder / "search.csv", index=False)
    for cell in best.values():
        del cell["eta"]
    (folder / "best.yaml").write_text(yaml.safe_dump({"splits": best}))
    params = run_of()
    write_report(params, folder)
    assert set(pd.read_csv(folder / "plots" / "search.csv").eta) == {params.model.eta}


def test_a_variant_in_a_setting_that_the_paper_lacks(tmp_path):
    folder = build_results(tmp_path / "results", groups=4)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "variant": "without_kl"}))
    write_report(run_of(setting="digits"), folder)
    page = (folder / "report.html").read_text()
    assert "the paper has no result for this setting." in page and "96.64 ±" not in page
    (folder / "metrics.json").write_text(json.dumps({**metrics, "variant": "pudnet_plus"}))
    write_report(run_of(setting="fashion"), folder)
    assert "the paper has no result for this variant." in (folder / "report.html").read_text()
    assert "Without KL" in page and "a variant of the method, “Without KL”" in page


def test_one_split_no_kept_weights_and_an_unknown_method(tmp_path):
    folder = build_results(tmp_path / "results")
    for file in (folder / "weights" / "split-0").iterdir():
        file.unlink()
    for name in ("search.csv", "accuracies.csv", "loss_curves.csv"):
        frame = pd.read_csv(folder / name).query("split_seed == 0")
        frame.replace({"static_trunk": "two_<b>stage"}).to_csv(folder / name, index=False)
    text = (
        (folder / "baselines.json")
        .read_text()
        .replace("static_trunk", "two_<b>stage")
        .replace('"ci95": 0.29', '"ci95": NaN')
    )
    (folder / "baselines.json").write_text(text)
    methods = {m: row for m, row in json.loads(text)["methods"].items() if not m.startswith("scratch_")}
    (folder / "baselines.json").write_text(json.dumps({"methods": methods}))
    write_report(run_of(), folder)
    page = (folder / "report.html").read_text()
    assert "Against training from scratch" not in page
    assert "No predicted weights were kept" in page
    assert "Two &lt;b&gt;stage" in page and "<b>" not in page
    assert "nan" not in page.lower().replace("pronan", "")


@pytest.mark.parametrize(
    ("name", "stage"), [("search.csv", "search"), ("baselines.json", "baselines"), ("weights", "evaluate")]
)
def test_a_missing_result_is_named_with_its_stage(tmp_path, name, stage):
    for other in set(PRODUCERS) - {name}:
        (tmp_path / other).touch()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is missing.*dvc repro {stage}"):
        write_report(run_of(), tmp_path)


@pytest.mark.parametrize(
    ("setting", "target", "accuracy", "table"),
    [
        ("fashion", "convnet3", 96.64, "table 1"),
        ("imagenet", "resnet18", 71.57, "table 2"),
        ("cifar100", "resnet34", 72.87, "table 8"),
        ("cifar100-animals10", "convnet3", 35.15, "table 3"),
        ("cifar100-cifar10", "resnet18", 51.05, "table 6"),
        ("imagenet-cifar10", "resnet18", 45.07, "table 7"),
    ],
)
def test_the_papers_figure_is_found(setting, target, accuracy, table):
    found = paper_figures(load_reported(), setting, target)["pudnet"]
    assert (found.accuracy, found.table) == (accuracy, table)


def test_ablations_are_found_and_absent_figures_are_not():
    found = paper_figures(load_reported(), "cifar100", "resnet18")
    assert (found["without_kl"].accuracy, found["without_kl"].table) == (70.27, "table 4")
    assert paper_figures(load_reported(), "digits", "convnet3") == {}
    assert paper_figures(load_reported(), "fashion", "resnet34") == {}


def test_histogram_counts_every_group_at_both_ends():
    frame = pd.DataFrame({"method": "a", "accuracy": [100.0, 100.0, 87.3]})
    bins = histogram(frame)
    assert bins["groups"].sum() == 3 and bins["groups"].iloc[-1] == 2
    assert histogram(frame[:2])["groups"].sum() == 2


def test_words_and_numbers():
    assert plus_minus(95.1, 0.3) == "95.10 ± 0.30"
    assert plus_minus(35.15, float("nan")) == "35.15"
    assert signed(-0.3, 0.12) == "−0.30 ± 0.12"
    assert (duration(0.421), duration(37.62), duration(2140)) == ("0.42 ms", "37.6 ms", "2.14 s")
    assert verdict(-0.3, 0.12) == "0.30 ± 0.12 points below PudNet"
    assert verdict(0.1, 0.12) == "not measurably different from PudNet (+0.10 ± 0.12 points)"
    assert (label("gc_1"), label("my_method")) == ("GC, 1 epoch", "My method")


def test_any_knob_can_be_searched(results):
    search = read_results(results).search.drop(columns="eta").assign(pooling="mean")
    changed = replace(
        read_results(results), search=search[["split_seed", "pooling", "depth", "groups", "accuracy", "ci95"]]
    )
    assert changed.knobs == ["depth", "pooling"]
    best = {0: {"depth": 2, "pooling": "mean", "accuracy": 93.0}}
    svg = to_svg(search_figure(changed.search, best, "depth", "pooling"), "search")
    assert "pooling mean" in svg and svg == to_svg(search_figure(changed.search, best, "depth", "pooling"), "search")


def test_pudnet_plus_stands_beside_pudnet_and_not_among_the_baselines(page):
    rows = re.findall(r'<th scope="row(?:group)?">(.*?)<', page[page.index("Accuracy on unseen classes") :])
    assert rows[:4] == ["PudNet", "PudNet+", "ProtoNet", "Adam, 1 epoch"]
    assert page.count("PudNet+ uses the labels of up to 90 images") == 2
