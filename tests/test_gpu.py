"""What means something on a GPU: `pytest -m gpu` there. Where there is none, the same on the CPU as far as it goes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # where torch's documentation has them
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pudnet.baselines import LEARNED, make_method
from pudnet.config import ModelConfig, TrainConfig, apply_variant
from pudnet.controls import StaticTrunk
from pudnet.cpu import plain_layers
from pudnet.data.images import StoreImages
from pudnet.data.looks import LOOKS
from pudnet.device import wants_bf16
from pudnet.hypernet import PudNet
from pudnet.learner import MetaLearner
from pudnet.network import PredictedNetwork
from pudnet.predictor import Predictor
from pudnet.targets import build_target, shared
from pudnet.training import Trainer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="compares a GPU with the CPU, and there is none")
KINDS = ["pudnet", "pudnet_plus", "static_trunk", "mixed", *LEARNED]  # mixed: PudNet+ in its pretraining
# What the host waits for: a value, or the number of values, that it has to know before it can go on.
WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "bincount", "_unique2", "equal"}


class Operators(TorchDispatchMode):
    """The names of all operators that run, backward's too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def make_learner(kind, k=2, target="convnet3", channels=1, size=8):
    """A learner over six training classes, and how it is trained."""
    torch.manual_seed(0)
    plain, model, config = build_target(target, channels, size), ModelConfig(hidden=16), TrainConfig()
    if kind in LEARNED:
        return make_method(kind, {}, plain)[0].learner(6, k, replace(config, support_per_class=3)), config
    if kind in ("pudnet_plus", "mixed"):
        model, config = apply_variant("pudnet_plus", replace(model, sketch_images=6), config)
        config = replace(config, pretraining_share=0.95 if kind == "mixed" else 0.0)
    config = replace(config, support_per_class=3)
    network = StaticTrunk(plain) if kind == "static_trunk" else PudNet(replace(model, sketch_images=6), plain)
    return MetaLearner(network, plain, config, 6, k), config


def make_trainer(digits, images, kind="pudnet", groups=12, **changes):
    learner, config = make_learner(kind)
    config = replace(config, **{"precision": "fp32", "report_every": 4, **changes})
    return Trainer(learner, images, digits.train[:groups], digits.split.train_classes, config)


@pytest.fixture
def images(digits):
    return StoreImages(digits.store, DEVICE)


@pytest.fixture
def vectorised(monkeypatch):
    """On the CPU too several groups in one call, as a GPU takes them."""
    monkeypatch.setattr(shared, "one_by_one", shared.together)


def losses_and_gradients(learner, images, labels):
    """The groups' losses, and what they teach together."""
    learner.zero_grad()
    losses = learner.losses(images, labels, 0.9)
    losses.total.sum().backward()
    parts = (losses.total, losses.metric, losses.full, losses.kl, losses.accuracy)
    return torch.stack([part.detach().double() for part in parts]), [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in learner.parameters()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_several_groups_at_once_cost_and_teach_what_they_do_one_by_one(kind, vectorised):
    learner = make_learner(kind)[0].to(DEVICE).double()
    images = torch.randn(3, 24, 1, 8, 8, dtype=torch.float64, device=DEVICE)
    labels = torch.tensor([[1, 4], [0, 5], [2, 1]], device=DEVICE).repeat_interleave(12, 1)
    alone = [losses_and_gradients(learner, images[g : g + 1], labels[g : g + 1]) for g in range(3)]
    losses, gradients = losses_and_gradients(learner, images, labels)
    assert_close(losses, torch.cat([each for each, _ in alone], 1), rtol=1e-9, atol=1e-10)
    for found, *each in zip(gradients, *(own for _, own in alone), strict=True):
        assert_close(found, sum(each), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing(kind, digits, images, vectorised):
    trainer = make_trainer(digits, images, kind, groups=4, groups_per_step=2)
    if DEVICE.type == "cuda":
        trainer._step(trainer.table[:2])  # what is allocated and chosen once
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._step(trainer.table[2:4])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    plain_layers(trainer.learner)  # a GPU has no others
    with Operators() as seen:
        trainer._step(trainer.table[:2])
    assert {"convolution_backward", "_fused_adam_"} < seen.names and not seen.names & WAITING


@pytest.mark.filterwarnings("error:There is a performance drop")  # what vmap does group by group
@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, "convnet3") for kind in KINDS if kind != "musml"]  # which needs gradients to go forward
    + [(kind, "resnet18") for kind in ("pudnet", "pudnet_plus", "static_trunk")],
)
def test_nothing_of_a_step_is_left_on_the_host(kind, target, digits):
    """On tensors that have a GPU for their device, and no values: what asks for one, or mixes devices, fails."""
    learner, config = make_learner(kind, target=target)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = StoreImages(digits.store, torch.device("cuda"))
        trainer = Trainer(learner, images, digits.train[:2], digits.split.train_classes, config)
        assert trainer._losses(trainer.table[:2]).total.device.type == "cuda"


@needs_gpu
def test_a_predicted_networks_features_are_those_of_the_cpu():
    pixels, labels = np.random.default_rng(0).random((60, 3, 32, 32), dtype=np.float32), [0, 1, 2] * 20
    for target in ("convnet3", "resnet18"):
        found = []
        for device in ("cpu", DEVICE):
            untrained = Predictor.untrained(target, channels=3, image_size=32)
            predictor = Predictor(untrained.model.to(device), untrained.card, untrained.target)
            predictor.bf16 = False
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                found.append(predictor.predict(pixels, labels).features(pixels).cpu())
        assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_what_may_be_compiled_is_one_graph_and_the_same(vectorised):
    """The back end `eager` traces, and compiles nothing: seconds."""
    learner = make_learner("pudnet")[0].to(DEVICE)
    group = torch.randn(2, 24, 1, 8, 8, device=DEVICE), torch.tensor([[1] * 12 + [4] * 12] * 2, device=DEVICE)
    expected = losses_and_gradients(learner, *group)
    whole = {"backend": "eager", "fullgraph": True, "dynamic": False}
    learner.model.shared.compile(**whole)
    learner.model.generate = torch.compile(learner.model.generate, **whole)
    assert_close(losses_and_gradients(learner, *group), expected, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("how", ["kernels", "graphs"])
def test_a_compiled_training_is_the_same(how, digits, images):
    plain, compiled = (
        list(make_trainer(digits, images, groups_per_step=2, compile=each).run())[-1] for each in ("none", how)
    )
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-2)


@needs_gpu
def test_the_whole_set_lies_on_the_gpu_and_a_group_is_an_index(digits, images):
    group = digits.train[:2]
    rows = images.beside(group)
    assert rows.is_cuda and images.raw(rows).is_cuda and images.raw(rows).dtype == torch.uint8
    for found in (images(rows), images(group)):
        assert_close(found.cpu(), digits.images(group))
    inverted = group + len(images.labels) * list(LOOKS).index("inverted")
    for found in (images(images.beside(inverted)), images(inverted)):
        assert_close(found.cpu(), digits.images(inverted))


def test_a_training_goes_on_from_its_checkpoint_as_it_was(digits, images, tmp_path):
    whole, stopped = (make_trainer(digits, images, groups_per_step=2) for _ in range(2))
    expected = list(whole.run())
    next(stopped.run())
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = make_trainer(digits, images, groups_per_step=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    before = stopped.learner.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in resumed.learner.state_dict().items())
    found = list(resumed.run())
    exact = 0 if DEVICE.type == "cpu" else 1e-3  # a GPU adds up in no fixed order
    assert [report.loss for report in found] == pytest.approx([report.loss for report in expected[1:]], rel=exact)


@pytest.mark.skipif(not wants_bf16("auto", DEVICE), reason="this processor has no bf16 instructions")
@pytest.mark.parametrize("kind", ["pudnet", "pudnet_plus"])
def test_bf16_losses_are_within_a_twentieth_of_fp32s(kind, digits, images):
    full, half = (
        list(make_trainer(digits, images, kind, precision=precision, groups_per_step=2).run())[-1]
        for precision in ("fp32", "bf16")
    )
    assert half.loss == pytest.approx(full.loss, rel=0.05) and half.loss != full.loss


@pytest.mark.parametrize("variant", ["pudnet", "pudnet_plus", "pretrained_ridge"])
def test_a_model_on_the_device_predicts_finetunes_and_exports(variant, digits, tmp_path):
    Predictor.untrained("convnet3", channels=1, image_size=8, variant=variant).save(tmp_path / "model.safetensors")
    predictor = Predictor.load(tmp_path / "model.safetensors", device=DEVICE)
    pixels, labels = (digits.store.images[digits.train[0]], digits.store.labels[digits.train[0]])
    predictor.sketch_images = 20
    network, *_ = several = predictor.predict_many([(pixels, labels), (pixels[:20], [0, 1] * 10)])
    assert network(pixels).device.type == DEVICE.type and all(len(each.classify(pixels)) == 40 for each in several)
    assert_close(predictor.predict(pixels, labels)(pixels), network(pixels), rtol=0.05, atol=0.05)
    tuned = predictor.finetune(network, pixels, labels, epochs=1, held_out=0.25)
    assert tuned.trained_on == 30 and tuned.network(pixels).isfinite().all()
    network.save(tmp_path / "network.safetensors")
    again = PredictedNetwork.load(tmp_path / "network.safetensors")
    assert_close(again(pixels), network(pixels).cpu(), rtol=1e-2, atol=1e-2)
    network.export(tmp_path / "network.pt2")  # is read again and compared
