"""The baselines: closed-form twins, what no method may depend on, and that each learns."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.groups import groups as make_groups
from pipeline.params import resolve
from pipeline.prepare import prepare
from pipeline.project import split_model
from pipeline.runs.class_split import open_bench
from pipeline.runs.measurement import open_method
from pudnet.augmentation import augmented
from pudnet.baselines import LEARNED, SCRATCH, Adapter, Scratch, ScratchConfig, load_method, make_method
from pudnet.baselines.meta_deepbdc import BDCNetwork, MetaDeepBDCConfig, bdc
from pudnet.card import Card, write_tensors
from pudnet.cca import held_out_correlation
from pudnet.config import ModelConfig, TrainConfig, apply_variant
from pudnet.controls import StaticTrunk
from pudnet.data.images import StoreImages
from pudnet.data.store import Store
from pudnet.errors import UserError
from pudnet.evaluation import FROM, ON, adapt_input, mean_interval, twin_accuracies, twin_accuracy
from pudnet.gradient_centralization import centralized
from pudnet.hypernet import PudNet
from pudnet.learner import MetaLearner
from pudnet.model import build_model
from pudnet.predictor import Predictor
from pudnet.scratch import rise_and_fall, scratch_network, train
from pudnet.targets import build_target
from pudnet.training import Trainer, arranged
from tests.nets import Depthwise
from tests.smallest import shrink

ROOT = Path(__file__).parent.parent

CPU = torch.device("cpu")
TRAINED = ["pudnet", "static_trunk", *LEARNED]
METHODS = [*TRAINED, *SCRATCH]
K, SUPPORT = 2, 5
CONFIG = TrainConfig(support_per_class=SUPPORT)


# Closed-form twins


def test_bdc_is_double_centring_of_the_distances_between_channels():
    features, tau = torch.randn(3, 5, 7, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64)
    for image, found in zip(features, bdc(features, tau), strict=True):
        a = [[math.sqrt(math.exp(-0.7) * float(((p - q) ** 2).sum()) + 1e-5) for q in image] for p in image]
        rows = [sum(row) / 5 for row in a]
        columns = [sum(a[k][j] for k in range(5)) / 5 for j in range(5)]
        expected = [[a[k][j] - rows[k] - columns[j] + sum(rows) / 5 for j in range(5)] for k in range(5)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.sum(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["convnet3", "convnet3_multilevel"])
@pytest.mark.parametrize(("size", "blocks", "side"), [(8, 2, 2), (32, 3, 4)])
def test_bdc_features_are_the_upper_triangle_of_the_last_map_that_is_large_enough(name, size, blocks, side):
    """At 8 px ConvNet-3's third block leaves one position, so the second is the last. Levels do not count."""
    target = build_target(name, 1, size)
    network = BDCNetwork(target, MetaDeepBDCConfig(channels=64)).eval()
    assert network.tau.item() == pytest.approx(math.log(1 / (2 * side**2)))
    maps = images = torch.randn(2, 1, size, size)
    for block in list(target.network.eval().children())[:blocks]:
        maps = block(maps)
    matrix = bdc(maps.flatten(2), network.tau)
    expected = torch.stack([matrix[:, i, j] for i in range(64) for j in range(i, 64)], 1)
    torch.testing.assert_close(network(images), expected)


def test_of_a_resnet_on_small_images_bdc_cuts_the_last_stage_off():
    target = build_target("resnet18", 3, 32)
    method, own = make_method("meta_deepbdc", {}, target)
    assert own.features == 64 * 65 // 2
    assert {conv.name.split(".")[1] for conv in own.convs} == {"conv1", "layer1", "layer2", "layer3"} | {"0"}
    losses = method.learner(4, 2, TrainConfig(support_per_class=3)).losses(
        torch.randn(1, 8, 3, 32, 32), torch.tensor([[0] * 4 + [1] * 4]), 0.9
    )
    losses.total.backward()
    assert all(p.grad is not None for p in method.trunk.parameters())


def test_bdc_reduces_channels_and_refuses_a_target_without_maps():
    target = build_target("convnet3", 1, 16)
    assert BDCNetwork(target, MetaDeepBDCConfig(channels=6))(torch.randn(2, 1, 16, 16)).shape == (2, 21)
    with pytest.raises(UserError, match="no map of 1000 positions at 16 px"):
        BDCNetwork(target, MetaDeepBDCConfig(positions=1000))


def explicitly_centralized(values: torch.Tensor) -> torch.Tensor:
    """By loops: from each output's slice its mean is taken."""
    found = values.clone()
    for o in range(len(values)):
        entries = values[o].reshape(-1).tolist()
        found[o] = values[o] - sum(entries) / len(entries)
    return found


def test_centralized_gradients_are_those_of_explicit_loops():
    conv, head, bias = torch.randn(4, 3, 3, 3), torch.randn(5, 7), torch.randn(5)
    weights = [torch.nn.Parameter(w.clone()) for w in (conv, head, bias)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    gradients = [weight.grad.clone() for weight in weights]
    centralized(torch.optim.SGD(weights, lr=0.1)).step()  # its update is the gradient, scaled
    steps = [explicitly_centralized(gradients[0]), explicitly_centralized(gradients[1]), gradients[2]]
    for weight, old, step in zip(weights, (conv, head, bias), steps, strict=True):
        torch.testing.assert_close(weight.detach(), old - 0.1 * step)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_centralized_update_is_the_optimizers_own_less_its_means(kind):
    start = [torch.randn(4, 3, 3, 3), torch.randn(4)]
    plain, central = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    for weights in (plain, central):
        torch.manual_seed(0)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
    kind(plain, lr=0.1).step()
    centralized(kind(central, lr=0.1)).step()
    expected = start[0] + explicitly_centralized(plain[0].detach() - start[0])
    torch.testing.assert_close(central[0].detach(), expected)
    torch.testing.assert_close(central[1], plain[1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_the_update_of_a_step_that_computes_its_gradients_itself_is_centralized_too(kind):
    weights = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))]
    start, points = [w.detach().clone() for w in weights], torch.randn(6, 3)
    optimizer = centralized(kind(weights, lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = (points @ weights[0].T + weights[1]).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = [(w.detach() - s).abs() for w, s in zip(weights, start, strict=True)]
    assert all(m.max() > 1e-3 for m in moved)
    torch.testing.assert_close((weights[0].detach() - start[0]).mean(1), torch.zeros(4), rtol=0, atol=1e-5)


def method_of(name: str, **config):
    return make_method(name, config, build_target("convnet3", 1, 8))[0]


def test_protonet_logits_are_minus_squared_distances_to_class_means():
    support = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 6.0]])  # means (1, 0) and (0, 5)
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    logits = method_of("protonet", scale=0.5).logits(queries, support, torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(logits, torch.tensor([[0.0, -13.0], [-1.0, -8.0]]))


def test_deepbdc_scores_by_squared_distances_to_class_means_too():
    support, labels, queries = torch.randn(6, 4), [0, 1, 2, 0, 1, 2], torch.randn(3, 4)
    logits = method_of("meta_deepbdc").logits(queries, support, torch.tensor(labels), 3)
    for query, row in zip(queries, logits.tolist(), strict=True):
        for k in range(3):
            own = [image for image, label in zip(support, labels, strict=True) if label == k]
            mean = [sum(float(image[d]) for image in own) / 2 for d in range(4)]
            assert row[k] == pytest.approx(-sum((float(query[d]) - mean[d]) ** 2 for d in range(4)), abs=1e-4)


@pytest.mark.parametrize("features", [3, 9])
def test_r2d2_regresses_the_classes_on_features_with_a_penalty(features):
    """A twin: ordinary least squares, by the normal equations, on rows to which sqrt(ridge) I is added as data."""
    support, labels, queries = torch.randn(6, features), torch.tensor([0, 1, 2, 0, 1, 1]), torch.randn(4, features)
    x, y = support.numpy().astype(float), np.eye(3)[labels]
    count = np.array([1, 2 / 3, 2, 1, 2 / 3, 2 / 3])[:, None]  # of an image: classes count alike
    mean = (count * x).mean(0)
    size = math.sqrt((count * (x - mean) ** 2).sum() / 6)
    penalty = np.vstack([np.sqrt(count) * (x - mean) / size, math.sqrt(0.5) * np.eye(features)])
    truth = np.vstack([np.sqrt(count) * (y - 1 / 3), np.zeros((features, 3))])
    weights = np.linalg.lstsq(penalty, truth, rcond=None)[0]
    expected = 7.0 * (1 / 3 + (queries.numpy() - mean) / size @ weights)
    method = method_of("r2d2", ridge=0.5, scale=7.0)
    for found in (method.logits(queries, support, labels, 3), method.rule(support, labels, 3)(queries)):
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-4, atol=1e-5)


def test_matchnet_sums_the_attention_to_each_class():
    support, labels, queries = torch.randn(5, 3), [0, 1, 1, 0, 2], torch.randn(4, 3)
    found = method_of("matchnet", scale=7.0).logits(queries, support, torch.tensor(labels), 3).softmax(1)
    for query, row in zip(queries, found, strict=True):
        cosines = [float(query @ s / (query.norm() * s.norm())) for s in support]
        exps = [math.exp(7 * c) for c in cosines]
        expected = [sum(e for e, y in zip(exps, labels, strict=True) if y == k) / sum(exps) for k in range(3)]
        assert row.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "scale"), [("pretrained", 1.0), ("meta_baseline", 10.0), ("musml", 10.0)])
def test_cosine_methods_compare_with_class_means(name, scale):
    support, labels, queries = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.randn(2, 3)
    logits = method_of(name).logits(queries, support, labels, 2)
    means = torch.stack([(support[0] + support[3]) / 2, (support[1] + support[2]) / 2])
    expected = [[scale * float(q @ m / (q.norm() * m.norm())) for m in means] for q in queries]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_musml_support_loss_leaves_each_image_out_of_its_own_centroid():
    method, support, labels = method_of("musml"), torch.randn(6, 4), [0, 0, 0, 1, 1, 1]
    losses = []
    for i in range(6):
        means = [torch.stack([support[j] for j in range(6) if labels[j] == k and j != i]).mean(0) for k in range(2)]
        logits = torch.stack([10 * torch.cosine_similarity(support[i], mean, dim=0) for mean in means])
        losses.append(-float(logits.log_softmax(0)[labels[i]]))
    found = method.support_loss(support, torch.tensor(labels), 2).item()
    assert found == pytest.approx(sum(losses) / 6, rel=1e-4)


def test_musml_inner_steps_go_down_the_support_loss_by_its_numeric_gradient():
    torch.manual_seed(0)
    method = method_of("musml", inner_steps=1, inner_rate=0.01)
    images, labels = torch.randn(8, 1, 8, 8), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])

    def loss_at(v):
        with torch.no_grad():
            features = method.trunk.shared(images, method.trunk.generate(0, torch.tensor(v)))
            return method.support_loss(features, labels, 2).item()

    v = method.descend(0, images, labels, 2)
    slopes = [(loss_at([0.5 + d, 0.5 + e]) - loss_at([0.5 - d, 0.5 - e])) / 2e-2 for d, e in ((1e-2, 0), (0, 1e-2))]
    assert v.tolist() == pytest.approx([0.5 - 0.01 * slope for slope in slopes], abs=2e-4)


def test_musml_takes_the_subspace_of_the_lowest_support_loss_and_learns_by_their_softmax():
    torch.manual_seed(0)
    method = method_of("musml", subspaces=3, softness=0.5)
    images, labels = torch.randn(1, 12, 1, 8, 8), torch.tensor([[0] * 6 + [1] * 6])
    support, own = images[0].unflatten(0, (2, 6))[:, :4].flatten(0, 1), torch.tensor([0] * 4 + [1] * 4)
    ends = [method.descend(k, support, own, 2) for k in range(3)]
    losses = [method.support_loss_at(k, v, support, own, 2).item() for k, v in enumerate(ends)]
    best = min(range(3), key=lambda k: losses[k])
    chosen = method.weights(support, own)
    expected = method.trunk.generate(best, ends[best])
    assert all(torch.equal(chosen[name], expected[name]) for name in expected) and len(set(losses)) == 3

    learner, outcomes = method.learner(4, 2, TrainConfig(support_per_class=4)), []
    for k, v in enumerate(ends):
        features = method.trunk.shared(images[0], method.trunk.generate(k, v)).detach().view(2, 6, -1)
        centroids = features[:, :4].mean(1)
        logits = 10 * torch.cosine_similarity(features[:, 4:].flatten(0, 1)[:, None], centroids[None], dim=2)
        outcomes.append(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1, 1])).item())
    exps = [math.exp(-o / (0.5 * (1 - 0.4))) for o in outcomes]
    total = sum(e * o for e, o in zip(exps, outcomes, strict=True)) / sum(exps)
    assert learner.losses(images, labels, 0.4).total.item() == pytest.approx(total, rel=1e-4)


def test_musml_writes_weights_and_losses_in_fp32_under_autocast():
    method = method_of("musml")
    images, labels = torch.randn(1, 12, 1, 8, 8), torch.tensor([[0] * 6 + [1] * 6])
    with torch.autocast("cpu", torch.bfloat16):
        weights = method.weights(images[0], labels[0])
        losses = method.learner(4, 2, TrainConfig(support_per_class=3)).losses(images, labels, 0.0)
    assert {w.dtype for w in weights.values()} == {torch.float32} == {losses.total.dtype}


def test_scratch_centralises_all_that_gc_changes(toy):
    """The mean of each output's weights is where it began, whatever Adam did: without weight decay."""
    store, images, train_table, _ = toy
    for gc in (True, False):
        config = ScratchConfig(epochs=2, weight_decay=0.0)
        torch.manual_seed(0)
        network = scratch_network(build_target("convnet3", 1, 8), 2, CPU)
        before = [p.detach().clone() for p in network.parameters() if p.ndim > 1]
        train(network, images(train_table[0]), torch.arange(2).repeat_interleave(20), config, bf16=False, gc=gc)
        after = [p.detach() for p in network.parameters() if p.ndim > 1]
        assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        moved = [(a.flatten(1).mean(1) - b.flatten(1).mean(1)).abs().max() for a, b in zip(after, before, strict=True)]
        assert (max(moved) < 1e-6) == gc


def test_held_out_correlation_finds_the_largest_one_that_was_put_in():
    """Columns x_i and r_i x_i + sqrt(1 - r_i^2) z_i correlate by r_i, however they are mixed."""
    x, z = np.random.default_rng(0).normal(size=(2, 4000, 3))
    r = np.array([0.9, 0.5, 0.0])
    y = x * r + z * np.sqrt(1 - r**2)
    mixed = x @ np.array([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 3.0]])
    assert held_out_correlation(mixed + 5, 3 * y - 1, 3) == pytest.approx(0.9, abs=0.01)
    with pytest.raises(UserError, match="7 points are too few"):
        held_out_correlation(x[:14], y[:14], 3)
    with pytest.raises(UserError, match="depend on each other"):
        held_out_correlation(x[:, [0, 0]], y, 2)


# A toy problem: a small figure somewhere in noise tells the classes apart


@pytest.fixture(scope="module")
def toy():
    """6 classes of 120 images of 8 px, a 4x4 figure each, at a random place; half are to test on; groups of 2 x 20."""
    rng = np.random.default_rng(0)
    figures = rng.choice([-1.0, 1.0], size=(6, 4, 4))
    labels = np.repeat(np.arange(6), 120)
    images = rng.normal(128, 25, size=(720, 8, 8, 1))
    for image, label in zip(images, labels, strict=True):
        y, x = rng.integers(0, 5, 2)
        image[y : y + 4, x : x + 4, 0] += 50 * figures[label]
    pixels = images.clip(0, 255).astype(np.uint8)
    store = Store(pixels, labels, tuple("abcdef"), (0.5,), (0.18,), "toy")
    rows = np.arange(720).reshape(6, 2, 60)

    def group(half, per_class):
        classes = rng.choice(6, 2, replace=False)
        return np.stack([rng.choice(rows[c, half], per_class, replace=False) for c in classes])

    train = np.stack([group(0, 20).ravel() for _ in range(90)])
    test = np.stack([group(1, 40).reshape(2, 2, 20).swapaxes(0, 1).reshape(2, 40) for _ in range(16)])
    return store, StoreImages(store, CPU), train, test


def make(name, store):
    """A method before its training: what is trained, and what adapts."""
    torch.manual_seed(0)
    card = Card(name, "convnet3", 1, 8, store.mean, store.std, 10.0, SUPPORT, {})
    config = TrainConfig(precision="fp32", report_every=45, support_per_class=SUPPORT, full_weight=0.0, kl_weight=0.0)
    plain = build_target("convnet3", 1, 8)
    if name in SCRATCH:
        return None, config, Scratch(ScratchConfig(epochs=20), plain, CPU, bf16=False, gc=name == "scratch_gc")
    if name in LEARNED:
        method, target = make_method(name, {}, plain)
        return method.learner(6, K, CONFIG), config, Adapter(method, card, target)
    model, target = build_model(card)
    return MetaLearner(model, target, config, 6, K), config, Predictor(model, card, target)


@pytest.fixture(scope="module")
def trained(toy):
    """Every method, trained on the toy problem: name -> (before, adapter); `before` is its accuracy untrained."""
    store, images, train, test = toy
    found = {}
    for name in METHODS:
        learner, config, adapter = make(name, store)
        before = 50.0 if learner is None else twin_accuracies(adapter, images, test, bf16=False).mean()
        if learner is not None:
            list(Trainer(learner, images, train, tuple(range(6)), config).run())
            learner.eval()
            _, _, fresh = make(name, store)  # BatchNorm's affine parameters were copied when the adapter was made
            part = fresh.method if name in LEARNED else fresh.model
            part.load_state_dict(learner.model.state_dict())
            adapter = fresh
        found[name] = before, adapter
    return found


@pytest.mark.parametrize("name", METHODS)
def test_each_method_learns_the_toy_problem(name, toy, trained):
    _, images, _, test = toy
    torch.manual_seed(0)
    before, adapter = trained[name]
    after = twin_accuracies(adapter, images, test, bf16=False).mean()
    assert before + 10 < after > 82, (before, after)


@pytest.mark.parametrize("name", METHODS)
def test_shuffled_labels_give_chance(name, toy, trained):
    """Within twice the 95% interval: ten methods on any machine's rounding are too many chances for once."""
    _, images, _, test = toy
    torch.manual_seed(1)
    accuracies = []
    for group, twin in np.concatenate([test] * (1 if name in SCRATCH else 3)):
        mixed = torch.cat([torch.randperm(2) for _ in range(len(group) // 2)])  # half of each class has each label
        with torch.no_grad():
            adapted = trained[name][1].adapt(images(group), mixed, (0, 1))
        accuracies.append(twin_accuracy(adapted, images, twin, bf16=False))
    mean, half = mean_interval(accuracies)
    assert abs(mean - 50) <= 2 * half < 25


@pytest.mark.parametrize("name", METHODS)
def test_neither_the_order_nor_the_batches_of_queries_matter(name, toy, trained):
    _, images, _, test = toy
    torch.manual_seed(0)
    with torch.no_grad():
        adapted = trained[name][1].adapt(*adapt_input(trained[name][1], images, test[0, FROM]), (0, 1))
        queries = images(test[0, ON])
        logits, order = adapted.logits(queries), torch.randperm(40)
        torch.testing.assert_close(adapted.logits(queries[order]), logits[order], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.cat([adapted.logits(part) for part in queries.split(7)]), logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", LEARNED)
def test_a_file_brings_the_method_back(name, toy, trained, tmp_path):
    _, images, _, test = toy
    adapter = trained[name][1]
    write_tensors(tmp_path / "m.safetensors", adapter.method.state_dict(), adapter.predictor.card)
    loaded = load_method(tmp_path / "m.safetensors", CPU)
    first, second = (twin_accuracies(each, images, test[:2], bf16=False) for each in (adapter, loaded))
    assert first.tolist() == second.tolist()


# How they are trained


def test_pretraining_mixes_the_classes_of_the_very_same_images(toy):
    _, images, train, _ = toy
    assert method_of("pretrained").learner(6, K, CONFIG).mixed_share == 1
    mixed = arranged(train, 0, 0, len(train))
    assert mixed.shape == train.shape
    assert sorted(mixed.ravel()) == sorted(train.ravel())
    assert np.mean([len(images.block_classes(group)) for group in mixed]) > 5


@pytest.mark.parametrize("kind", ["pudnet", "static_trunk"])
def test_pudnet_plus_and_the_static_trunk_are_pretrained_likewise(kind, toy):
    _, images, train, _ = toy
    model_config, config = apply_variant("pudnet_plus", ModelConfig(sketch_images=4), TrainConfig(support_per_class=2))
    target = build_target("convnet3", 1, 8)
    model = PudNet(model_config, target) if kind == "pudnet" else StaticTrunk(target)
    learner = MetaLearner(model, target, replace(config, pretraining_share=0.25), 6, K)
    assert learner.mixed_share == 0.25
    mixed = arranged(train, 0, 0, 22)
    assert (mixed[22:] == train[22:]).all() and sorted(mixed[:22].ravel()) == sorted(train[:22].ravel())
    assert np.mean([len(images.block_classes(group)) for group in mixed[:22]]) > 5
    labels = torch.from_numpy(images.labels[train[0]])
    for done, head_learns in ((0.0, True), (0.25, False)):
        learner.zero_grad()
        cost = learner.losses(images(train[:1]), labels[None], done)
        cost.total.backward()
        assert (learner.objective.head.weight.grad is not None) == head_learns
        assert (cost.full > 0) == head_learns and (cost.metric > 0) != head_learns
        assert all(kernel.grad is not None for kernel in model.base_weights().values())
    with pytest.raises(UserError, match=r"train\.pretraining_share: without model\.base"):
        MetaLearner(PudNet(ModelConfig(), target), target, replace(config, pretraining_share=0.25), 6, K)


TWO_STAGES = {  # -> a method's own options, those of its training, and the second stage's rate
    "meta_baseline": ({"pretraining": 0.25, "meta_rate": 0.1}, {}, 0.1),
    "meta_deepbdc": ({"pretraining": 0.25, "meta_rate": 0.1}, {}, 0.1),
    "protonet": ({}, {"pretraining_share": 0.25}, 1.0),
    "matchnet": ({}, {"pretraining_share": 0.25}, 1.0),
    "r2d2": ({}, {"pretraining_share": 0.25}, 1.0),
}


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_are_pretraining_and_then_episodes(name, toy):
    _, images, train, _ = toy
    own, training, rate = TWO_STAGES[name]
    learner = method_of(name, **own).learner(6, K, replace(CONFIG, **training))
    assert learner.mixed_share == 0.25
    assert learner.rate(0.2) == 1.0 and learner.rate(0.25) == rate
    labels = torch.from_numpy(images.labels[train[0]])
    for done, head_learns in ((0.0, True), (0.5, False)):
        learner.zero_grad()
        cost = learner.losses(images(train[:1]), labels[None], done)
        cost.total.backward()
        assert (learner.head[1].weight.grad is not None) == head_learns
        assert (cost.full > 0) == head_learns and (cost.metric > 0) != head_learns


@pytest.mark.parametrize("name", LEARNED)
def test_methods_take_a_network_of_ones_own(name):
    method, target = make_method(name, {}, build_target(Depthwise(3), 3, 16))
    images, labels = torch.randn(1, 12, 3, 16, 16), torch.tensor([[0] * 6 + [3] * 6])
    losses = method.learner(4, 2, TrainConfig(support_per_class=3)).losses(images, labels, 0.9)
    losses.total.backward()
    assert all(p.grad is not None for p in method.trunk.parameters())
    card = Card(name, "tests.nets:Depthwise", 3, 16, (0.5,) * 3, (0.3,) * 3, 10.0, 3)
    with torch.no_grad():
        adapted = Adapter(method, card, target).adapt(images[0], labels[0].clamp_max(1), ("a", "b"))
    assert adapted.logits(images[0]).shape == (12, 2)


def test_the_rate_rises_falls_to_nothing_and_no_image_is_lost_by_augmenting():
    assert max(rise_and_fall(step, 12, 0.2) for step in range(12)) == 1.0
    rates = [rise_and_fall(step, 100, 0.2) for step in range(100)]
    assert rates[0] == 0.05 and max(rates) == rates[19] == 1.0 and 0 < rates[-1] < 0.02
    images = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    shifted, mirrored = augmented(images, "shift"), augmented(images, "shift_mirror")
    assert augmented(images, "none") is images
    assert len({tuple(each.flatten().tolist()) for each in shifted}) == 9  # by -1, 0, 1 pixels each way
    assert len({tuple(each.flatten().tolist()) for each in mirrored}) == 18
    assert any(torch.equal(each, images[0]) for each in shifted)
    assert any(torch.equal(each, images[0].flip(2)) for each in mirrored)


def test_scratch_gives_the_same_for_the_same_seed_and_leaves_the_target_alone(toy):
    store, images, _, test = toy
    _, _, scratch = make("scratch_gc", store)
    before = {name: tensor.clone() for name, tensor in scratch.target.network.state_dict().items()}
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        adapted = scratch.adapt(*adapt_input(scratch, images, test[0, FROM]), (0, 1))
        found.append(adapted.logits(images(test[0, ON])))
    assert torch.equal(*found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in scratch.target.network.state_dict().items())


def test_held_out_correlation_finds_what_is_shared_and_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    shared, alone = rng.normal(size=(200, 2)), rng.normal(size=(200, 40))
    x = shared @ rng.normal(size=(2, 30)) + 0.1 * rng.normal(size=(200, 30))
    y = shared @ rng.normal(size=(2, 40)) + 0.1 * alone
    assert held_out_correlation(x, y, 5) > 0.95
    chance = [held_out_correlation(x, rng.permutation(alone), 5) for _ in range(20)]
    assert abs(np.mean(chance)) < 0.1
    with pytest.raises(UserError, match="too few"):
        held_out_correlation(x[:20], y[:20], 5)


def test_the_bench_gives_as_many_labels_as_pudnet_plus_also_if_test_groups_have_other_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    shrink(tmp_path / "params.yaml")
    raw = yaml.safe_load((tmp_path / "params.yaml").read_text())
    raw["groups"] |= {"test_classes_per_group": 4, "images_per_group": None}
    params = resolve({**raw, "variant": "pudnet_plus"})
    prepare(params)
    make_groups(params)
    bench = open_bench(params, 0)
    assert (params.groups.classes_per_group, bench.test_classes) == (2, 4)
    plus = Predictor.untrained("convnet3", 1, 8, variant="pudnet_plus")
    plus.save(split_model("pudnet", 0))
    target = build_target("convnet3", 1, 8)
    for kind, model in (("r2d2", make_method("r2d2", {}, target)[0]), ("static_trunk", StaticTrunk(target))):
        card = replace(plus.card, kind=kind, model={} if kind == "r2d2" else None, support_per_class=43)
        write_tensors(split_model(kind, 0), model.state_dict(), card)
    group = bench.tables["test"][0, FROM]
    used = plus.adapt(*adapt_input(plus, bench.images, group), tuple(range(4))).card.labels_per_class
    assert used == 23  # of 90 images
    assert open_method(bench, params, "r2d2").predictor.support_per_class == used
    assert open_method(bench, params, "static_trunk").support_per_class == used
    assert open_method(bench, params, "random_weights").support_per_class == used
