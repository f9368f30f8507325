"""The hypernetwork: sketch -> context -> weight generator."""

from pudnet.hypernet.model import PudNet

__all__ = ["PudNet"]
