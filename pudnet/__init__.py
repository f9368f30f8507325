"""PudNet: predict the convolution weights of a network for an image dataset it has never seen."""

from pudnet.network import PredictedNetwork
from pudnet.predictor import Predictor

__all__ = ["PredictedNetwork", "Predictor"]
