"""Target networks: the networks whose convolution weights are predicted.

A target is an ordinary `nn.Module` that maps images to feature vectors: one of `TARGETS` (`build.py`), or a
module of your own. Its convolution weights are predicted for each group. Everything else (BatchNorm's affine
parameters, biases, linear layers) is learned, and the same for all groups.
"""

from pudnet.targets.build import (
    ALL_BLOCKS,
    all_blocks,
    build_target,
    check_target_name,
    has_all_blocks,
    is_import_path,
    target_code,
    target_name,
)
from pudnet.targets.calibration import Calibrator, calibrate
from pudnet.targets.convnet3 import WIDTH, Block, ConvNet3, Level, MultilevelConvNet3, last_block_alone
from pudnet.targets.shared import SharedTarget, check_together, map_at, together
from pudnet.targets.target import ConvShape, Target, Weights, draw_convolutions, norms, own_weights, put_tensors

__all__ = [
    "ALL_BLOCKS",
    "WIDTH",
    "Block",
    "Calibrator",
    "ConvNet3",
    "ConvShape",
    "Level",
    "MultilevelConvNet3",
    "SharedTarget",
    "Target",
    "Weights",
    "all_blocks",
    "build_target",
    "calibrate",
    "check_target_name",
    "check_together",
    "draw_convolutions",
    "has_all_blocks",
    "is_import_path",
    "last_block_alone",
    "map_at",
    "norms",
    "own_weights",
    "put_tensors",
    "target_code",
    "target_name",
    "together",
]
