"""Reads a store's images by index and normalises them on the device, without a DataLoader."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
    Indices may be arrays; on a GPU they should be tensors made by `beside`, so that no step waits for a copy.
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

    def beside(self, indices: np.ndarray) -> np.ndarray | Tensor:
        """Put a table of indices, such as group tables, on the device that holds the images.

        On a GPU it becomes an int32 tensor (int64 if needed); on a CPU it stays the same array.
        """
        if self._resident is None:
            return indices
        small = indices.max(initial=0) < 2**31
        return torch.from_numpy(indices.astype(np.int32 if small else np.int64)).to(self.device)

    def __call__(self, indices: np.ndarray | Tensor) -> Tensor:
        """Rows `indices` (..., N) of the store -> normalised float images (..., N, C, H, W)."""
        return normalize(self.raw(indices), self.mean, self.std)

    def raw(self, indices: np.ndarray | Tensor) -> Tensor:
        """Rows `indices` (..., N) of the store, uint8 (..., N, H, W, C)."""
        if self._resident is None:
            return torch.from_numpy(self._mapped[indices])  # fancy indexing copies out of the read-only map
        if isinstance(indices, np.ndarray):
            indices = torch.from_numpy(indices.astype(np.int64)).pin_memory().to(self.device, non_blocking=True)
        return self._resident[indices]

    def block_classes(self, indices: np.ndarray) -> np.ndarray:
        """The class id of each block of a group (N,), in order: (k,)."""
        labels = self.labels[indices]
        return labels[np.sort(np.unique(labels, return_index=True)[1])]
