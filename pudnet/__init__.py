"""PudNet: predict the convolution weights of a network for an image dataset it has never seen."""

from pudnet.predictor import PredictedNetwork, Predictor

__all__ = ["PredictedNetwork", "Predictor"]
