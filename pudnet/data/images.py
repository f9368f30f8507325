"""Reads a store's images by index and normalises them on the device, without a DataLoader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pudnet.data.looks import with_looks
from pudnet.data.store import Store


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images: uint8 (..., N, H, W, C) -> float (..., N, C, H, W), less `mean`, divided by `std`.

    In memory the result is channels_last, as the images were, so that nothing is moved.
    """
    width = images.shape[-2]
    scale, shift = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)  # (W * C,), since long rows are fast
    scaled = torch.addcmul(shift, images.flatten(-2).float(), scale)
    return scaled.unflatten(-1, images.shape[-2:]).movedim(-1, -3)


class StoreImages:
    """Gives a store's images by index, on a device.

    A GPU gets a copy of the whole uint8 array. On a CPU the array stays memory-mapped, so that all processes share it.
    Indices may be arrays; on a GPU they should be tensors made by `beside`, so that no step waits for a copy. An index
    is the row of an image, or names its look too (pudnet/data/looks.py).
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self.device = device
        self.image_size = store.image_size
        self.labels = np.asarray(store.labels)
        self.mean = torch.tensor(store.mean, device=device)
        self.std = torch.tensor(store.std, device=device)
        on_device = device.type != "cpu"
        self._resident = torch.from_numpy(np.array(store.images)).to(device) if on_device else None
        self._mapped = store.images
        self._looks_beside = False  # whether a table made by `beside` has looks: a GPU would have to wait to find out

    def beside(self, indices: np.ndarray) -> np.ndarray | Tensor:
        """Put a table of indices, such as group tables, on the device that holds the images.

        On a GPU it becomes an int32 tensor (int64 if needed); on a CPU it stays the same array.
        """
        if self._resident is None:
            return indices
        small = indices.max(initial=0) < 2**31
        self._looks_beside |= self._has_looks(indices)
        return torch.from_numpy(indices.astype(np.int32 if small else np.int64)).to(self.device)

    def __call__(self, indices: np.ndarray | Tensor) -> Tensor:
        """Images `indices` (..., N) of the store -> normalised float images (..., N, C, H, W)."""
        return normalize(self.raw(indices), self.mean, self.std)

    def raw(self, indices: np.ndarray | Tensor) -> Tensor:
        """Images `indices` (..., N) of the store, with their looks: uint8 (..., N, H, W, C)."""
        looked = self._has_looks(indices) if isinstance(indices, np.ndarray) else self._looks_beside
        if self._resident is None:
            images = torch.from_numpy(self._mapped[self.rows(indices)])  # a copy: the map is read-only
        else:
            if isinstance(indices, np.ndarray):
                indices = torch.from_numpy(indices.astype(np.int64)).pin_memory().to(self.device, non_blocking=True)
            images = self._resident[self.rows(indices)]
        if not looked:
            return images
        looks = indices // len(self.labels)
        return with_looks(images, looks if isinstance(looks, Tensor) else torch.from_numpy(looks.astype(np.int64)))

    def rows(self, indices: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """The rows of images in the store, whatever their looks."""
        return indices % len(self.labels)

    def _has_looks(self, indices: np.ndarray) -> bool:
        return bool(indices.max(initial=0) >= len(self.labels))

    def block_classes(self, indices: np.ndarray) -> np.ndarray:
        """The class id of each block of a group (N,), in order: (k,)."""
        labels = self.labels[self.rows(indices)]
        return labels[np.sort(np.unique(labels, return_index=True)[1])]
