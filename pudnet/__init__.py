"""PudNet: predict the convolution weights of a network for an image dataset it has never seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pudnet.network import PredictedNetwork
    from pudnet.predictor import Predictor

__all__ = ["PredictedNetwork", "Predictor"]


def __getattr__(name: str) -> Any:
    """Import a class only when it is used: torch takes seconds to import, and `pudnet --help` does not need it."""
    if name == "Predictor":
        from pudnet.predictor import Predictor as found
    elif name == "PredictedNetwork":
        from pudnet.network import PredictedNetwork as found
    else:
        raise AttributeError(f"module 'pudnet' has no attribute {name!r}")
    return found
