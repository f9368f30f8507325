"""Adds the trained model, with a model card, to those that ship with the project: `python -m pipeline.publish`.

It is no DVC stage: run it by hand after `dvc repro evaluate`, as `models/pretrained/make.sh` does.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipeline.params import PLUS, Params
from pipeline.project import PUDNET, RESULTS, read_result, write
from pipeline.reporting.model_card import model_card
from pipeline.runs.class_split import Bench, open_bench
from pipeline.runs.summary import summary
from pipeline.stage import run_stage
from pudnet.card import read_tensors, write_tensors
from pudnet.errors import UserError
from pudnet.evaluation import FROM, time_prediction
from pudnet.locations import SHIPPED
from pudnet.predictor import Predictor

MOST_IMAGES = 1000  # a published model that reads labels looks at all images that it is given, up to this many
BETWEEN = 250  # the card has accuracy and time also from this many images


def publish(params: Params) -> None:
    """Write models/pretrained/SETTING-TARGET.safetensors and its card.

    The name of a variant that is neither the paper's nor PudNet+ comes last.
    """
    tensors, card = read_tensors(PUDNET)
    metrics = read_result(RESULTS / "metrics.json", lambda path: json.loads(path.read_text()), "evaluate")
    seed, trained_as = card.provenance.get("split_seed"), [card.provenance.get(key) for key in ("setting", "variant")]
    known = trained_as == [params.setting, params.variant] and card.target == params.target
    if not known or str(seed) not in metrics["splits"]:
        raise UserError(
            f"{PUDNET}: its setting, variant, target or split is not params.yaml's; run `dvc repro evaluate`"
        )
    split = metrics["splits"][str(seed)]
    bench = open_bench(params, seed)
    predictor = bench.load(PUDNET)
    most = MOST_IMAGES if predictor.reads_labels else predictor.sketch_images
    measured = _measure(params, bench, predictor, {predictor.sketch_images, min(BETWEEN, most), most})
    test = {key: measured[-1][key] for key in ("accuracy", "ci95", "test_groups", "images")}
    card = dataclasses.replace(card, sketch_images=most, provenance={**card.provenance, "test": test})
    own = [] if params.variant in ("pudnet", PLUS) else [params.variant.replace("_", "-")]
    name = "-".join([params.setting, params.target, *own])
    write_tensors(SHIPPED / f"{name}.safetensors", tensors, card)
    write(SHIPPED / f"{name}.md", model_card(name, params, card, split, bench.tables["test"].shape[2], measured))
    print(f"publish: {SHIPPED / name}.safetensors, {sum(t.numel() for t in tensors.values()) * 4 / 1e6:.1f} MB")


def _measure(params: Params, bench: Bench, predictor: Predictor, counts: set[int]) -> list[dict[str, Any]]:
    """Accuracy on test groups, and times, by the number of images that a prediction looks at."""
    groups, rows = bench.tables["test"][:, FROM], []
    for images in sorted({min(count, groups.shape[1]) for count in counts}):
        predictor.sketch_images = images
        accuracy = summary(bench.accuracies(f"from {images} images", predictor))
        timing = time_prediction(predictor, bench.images, groups[: params.evaluate.timing_groups], bench.bf16)
        rows.append({**accuracy, **dataclasses.asdict(timing), "images": images})
    return rows


if __name__ == "__main__":
    run_stage(publish)
