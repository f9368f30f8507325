# %% [markdown]
# # PudNet in five minutes
#
# You have a few labelled images, and want a network that tells their classes apart. Usually you would train one.
# PudNet looks at the images once, and fits a small ConvNet to them, in one forward pass.
#
# This page does it with handwritten digits: predict a network, classify with it, look at its filters and its mistakes,
# compare it with one that is trained from scratch, and export it. It runs on a CPU, downloads nothing, and needs
# `matplotlib` beside PudNet itself (`pip install . matplotlib` in a clone of the repository).

# %%
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from pudnet import PredictedNetwork, Predictor
from pudnet.targets.convnet3 import ConvNet3

warnings.filterwarnings("ignore", message="images of")  # says that our images are resized for the model
torch.set_num_threads(1)
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. A few labelled images
#
# scikit-learn has 1,797 small pictures of digits. We give PudNet nine of each digit, 90 in all, and keep the others to
# test on.

# %%
digits = load_digits()
images, labels = np.rint(digits.images * 255 / 16).astype(np.uint8), digits.target  # (1797, 8, 8), (1797,)
shuffled = rng.permutation(len(images))
few = np.concatenate([shuffled[labels[shuffled] == digit][:9] for digit in range(10)])
new = np.setdiff1d(shuffled, few)

figure, axes = plt.subplots(1, 20, figsize=(12, 1))
for axis, row in zip(axes, few.reshape(10, -1)[:, :2].flat, strict=True):
    axis.imshow(images[row], cmap="gray")
    axis.set_title(labels[row])
    axis.axis("off")
plt.show()

# %% [markdown]
# ## 2. Predict a network
#
# `cifar100-convnet3` is a model that comes with PudNet. It was trained on many small sets of photos, and has never seen
# a digit. It converts the images to what it was trained on: 32 px, in colour.

# %%
predictor = Predictor.load("cifar100-convnet3")
network = predictor.predict(images[few], labels[few])

start = time.perf_counter()  # again, to time it: the first call in a process is slower
network = predictor.predict(images[few], labels[few])
seconds_to_predict = time.perf_counter() - start
print(f"a ConvNet for the digits {network.classes}, in {1000 * seconds_to_predict:.0f} ms")

# %% [markdown]
# For images of your own, `predictor.predict("photos/")` takes a folder with one subfolder for each class; Datasets,
# DataLoaders and lists of PIL images work, too.
#
# ## 3. Classify
#
# What you have now is an `nn.Module`. `network(images)` gives logits, `network.classify(images)` the classes.

# %%
found = np.array(network.classify(images[new]))
accuracy = 100 * np.mean(found == labels[new])
print(f"{accuracy:.1f} % of {len(new):,} new images are right")

# %% [markdown]
# ## 4. The filters
#
# PudNet+ writes the last layer's filters for the group of images. Here the same 90 images get other labels, "even" and
# "odd". Below are sixteen kernels of the last layer, averaged over their input channels, of each of the two networks.
# Most of a kernel is learned and the same for every group; the difference, drawn on a scale of its own, is what the
# labels decide.

# %%
parity = predictor.predict(images[few], np.where(labels[few] % 2, "odd", "even"))
layer = network.card.predicted[-1]  # its name in the state dict
kernels = [each.target_state_dict()[layer].mean(1)[:16] for each in (network, parity)]
rows = {"ten digits": kernels[0], "even or odd": kernels[1], "difference": kernels[0] - kernels[1]}

figure, axes = plt.subplots(3, 16, figsize=(12, 2.6))
for line, (name, row) in zip(axes, rows.items(), strict=True):
    limit = row.abs().max().item()
    for axis, kernel in zip(line, row, strict=True):
        axis.imshow(kernel, cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# ## 5. The mistakes

# %%
wrong = np.flatnonzero(found != labels[new])
figure, axes = plt.subplots(2, 10, figsize=(12, 3))
for axis, row in zip(axes.flat, wrong, strict=False):
    axis.imshow(images[new[row]], cmap="gray")
    axis.set_title(f"{labels[new[row]]}, not {found[row]}")
for axis in axes.flat:
    axis.axis("off")
figure.suptitle(f"{len(wrong)} mistakes, the first 20: what it is, and what it was taken for", y=1.1)
plt.show()

# %% [markdown]
# ## 6. Beside training from scratch
#
# The same ConvNet, with random weights and a linear layer, is trained by Adam on the same 90 images. Its test accuracy
# and the seconds spent on training so far make the curve; the star is the prediction.

# %%
pixels, targets = network.normalize(images[few]), torch.tensor(labels[few])
test_pixels, test_targets = network.normalize(images[new]), torch.tensor(labels[new])
torch.manual_seed(0)
scratch = nn.Sequential(ConvNet3(channels=3), nn.LazyLinear(10))
scratch(pixels)  # tells the linear layer its size
adam = torch.optim.Adam(scratch.parameters(), lr=1e-3)

seconds, epochs, curve = 0.0, 20, []
for epoch in range(1, epochs + 1):
    start = time.perf_counter()
    scratch.train()
    for batch in torch.randperm(len(pixels)).split(32):
        adam.zero_grad()
        nn.functional.cross_entropy(scratch(pixels[batch]), targets[batch]).backward()
        adam.step()
    seconds += time.perf_counter() - start
    if epoch in (1, 2, 3, 5, 10, epochs):
        with torch.no_grad():
            right = scratch.eval()(test_pixels).argmax(1) == test_targets
        curve.append((seconds, 100 * right.float().mean().item()))

print(f"predicted: {accuracy:.1f} % in {seconds_to_predict:.2f} s")
print(f"trained:   {curve[-1][1]:.1f} % in {curve[-1][0]:.2f} s, {epochs} epochs")
plt.figure(figsize=(6, 3.5))
plt.plot(*zip(*curve, strict=True), "o-", label=f"trained from scratch, 1 to {epochs} epochs")
plt.plot(seconds_to_predict, accuracy, "*", markersize=16, label="predicted")
plt.xscale("log")
plt.xlabel("seconds")
plt.ylabel("accuracy on new images, %")
plt.legend()
plt.show()

# %% [markdown]
# From these 90 images a prediction is as accurate as 20 epochs of training, in a fraction of the time. From more images
# of digits, which are not of the model's own kind, training gets half a point ahead: write 50 in place of 9 in step 1
# and see. A prediction is a good start for it, too: `predictor.finetune(network, images, labels)`.
#
# ## 7. Keep it, and use it elsewhere
#
# `save` writes weights that PudNet reads again. `export` writes a file that needs no PudNet: `.pt2` for PyTorch alone,
# `.onnx` for any runtime (`pip install '.[export]'` first). The exported network takes float images
# (N, 3, 32, 32) in 0..1.

# %%
folder = Path("example")
network.save(folder / "digits.safetensors")
network.export(folder / "digits.pt2")

same = PredictedNetwork.load(folder / "digits.safetensors")
deployed = torch.export.load(folder / "digits.pt2").module()
ready = torch.rand(5, 3, 32, 32)
print("loaded gives the same logits:", torch.allclose(same(ready), network(ready)))
print("exported gives the same logits:", torch.allclose(deployed(ready), network(ready), atol=1e-3))

# %% [markdown]
# ## With images of your own
#
#     pudnet predict --data photos/ --out mine.safetensors          # a subfolder of images for each class
#     pudnet classify --weights mine.safetensors --data new_photos/ --out classes.csv
#
# `examples/own_images.py` does the same with plots, and the README says what else there is.
