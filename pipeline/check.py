"""Stage `check`: checks all of params.yaml, and that the target's weights can be predicted."""

from __future__ import annotations

import sys

import torch

from pipeline.params import UNTRAINED, Params
from pipeline.project import RESULTS, write
from pipeline.runs.trial import make_spec, pick_device
from pipeline.stage import run_stage
from pudnet.baselines import SCRATCH
from pudnet.config import ModelConfig
from pudnet.errors import UserError
from pudnet.hypernet import PudNet
from pudnet.targets import Target, build_target, check_together

LARGEST = 10**9  # parameters of a hypernetwork: 4 GB; with Adam's state, gradients and a copy to go back to 28 GB
MUCH_LARGER = 8.0  # generator parameters per predicted weight; with generator_hidden 16: 3x3 layers 4, 1x1 layers 33


def check(params: Params) -> None:
    """Build target and hypernetwork once, so that a target that cannot be used stops here; print their sizes.

    Writes results/checked.txt, always the same: with it DVC knows that this stage comes first.
    """
    target = build_target(params.target, params.prepare.channels, params.prepare.image_size)
    if params.train.groups_per_step > 1 and pick_device(params.resources.gpus).type == "cuda":
        check_together(target)
    configured, _ = params.configured({})
    model, parameters = check_size(configured, target)
    sizes = {key: max(values) for key, values in params.search.space.items() if all(type(v) is int for v in values)}
    if (largest := params.configured(sizes)[0]) != configured:
        check_size(largest, target)
    print(
        f"check: {params.setting}, {params.target}, {params.variant}: params.yaml is sound; a hypernetwork of "
        f"{parameters:,} parameters for the {target.predicted:,} weights of {len(target.convs)} convolutions"
    )
    if overridden := params.overridden():
        print(f"check: {params.variant} sets {', '.join(overridden)} itself, not as params.yaml has them")
    if whole := _without_patience(params):
        print(f"check: {', '.join(whole)}: train.patience does not hold; they make all of train.passes")
    ratio = sum(parameter.numel() for parameter in model.generators.parameters()) / target.predicted
    if ratio > MUCH_LARGER:
        print(
            f"warning: the weight generators have {ratio:.0f} parameters for each weight that they "
            f"write; lower model.generator_hidden, which is {params.model.generator_hidden}",
            file=sys.stderr,
        )
    write(RESULTS / "checked.txt", "params.yaml is sound\n")


def _without_patience(params: Params) -> list[str]:
    """The methods that are trained for all passes, though `train.patience` is set (`TrialSpec.patience`)."""
    if params.train.patience is None:
        return []
    baselines = params.for_baselines(1)  # how many labels they get does not matter here
    trained = [method for method in params.methods_beside if method not in (*UNTRAINED, *SCRATCH)]
    specs = [make_spec(params, "pudnet", "pudnet", params.seed, {}, "train", 0)]
    specs += [make_spec(baselines, name, name, params.seed, {}, "train", 0) for name in trained]
    return [spec.name for spec in specs if spec.patience is None]


def check_size(config: ModelConfig, target: Target) -> tuple[PudNet, int]:
    """Build a hypernetwork without memory for its parameters, and count them; `UserError` if it is too large."""
    if config.filter_grid > target.image_size:
        raise UserError(f"model.filter_grid: must be at most prepare.image_size, {target.image_size}")
    try:
        with torch.device("meta"):
            model = PudNet(config, target)
    except (RuntimeError, TypeError) as error:  # overflowing sizes
        reason = str(error).partition("\n")[0]
        raise UserError(f"model: no hypernetwork can be made of these sizes ({reason})") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > LARGEST:
        sizes = ", ".join(
            f"{name} {getattr(config, name)}" for name in ("hidden", "generator_hidden", "extractor_channels")
        )
        raise UserError(f"model: a hypernetwork of {parameters:,} parameters, more than {LARGEST:,}; lower {sizes}")
    return model, parameters


if __name__ == "__main__":
    run_stage(check)
