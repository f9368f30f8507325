"""The hypernetwork against the paper's formulas: sketch, context, weight generator, and all of it together."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pudnet.config import VARIANTS, ModelConfig, TrainConfig, apply_variant
from pudnet.hypernet import PudNet
from pudnet.hypernet.context import AHRUContext, GRUCell, GRUContext
from pudnet.hypernet.generator import WeightGenerator
from pudnet.hypernet.sketch import Sketch, pool
from pudnet.targets import ConvShape, build_target

pytestmark = pytest.mark.numeric

SMALL = {"hidden": 16, "generator_hidden": 4, "extractor_channels": 16}
TABLE_12 = ["2conv", "3conv", "4conv", "1conv-1linear", "2conv-1linear", "3conv-1linear"]
POOLINGS = ["mean", "sum", "geometric_mean", "mean_var"]


def config(**changes):
    return ModelConfig(**{**SMALL, **changes})


def make_model(seed=0, channels=1, size=8, **changes):
    torch.manual_seed(seed)
    return PudNet(config(**changes), build_target("convnet3", channels, size))


def make_sketch(seed=0, channels=3, size=16, **changes):
    torch.manual_seed(seed)
    return Sketch(config(**changes), channels, size)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def arrays(module):
    return [p.detach().double().numpy() for p in (module.weight, module.bias)]


def gru_step(cell, h, a):
    """Section 3.4, line by line."""
    (w_gates, b_gates), (w_h, b_h) = arrays(cell.gates), arrays(cell.candidate)
    m = len(h)
    r = sigmoid(w_gates[:m] @ np.concatenate([h, a]) + b_gates[:m])
    z = sigmoid(w_gates[m:] @ np.concatenate([h, a]) + b_gates[m:])
    candidate = np.tanh(w_h @ np.concatenate([r * h, a]) + b_h)
    return (1 - z) * h + z * candidate


def layer_norm(x, norm):
    weight, bias = arrays(norm)
    return weight * (x - x.mean()) / np.sqrt(x.var() + norm.eps) + bias


# Context


def test_gru_cell_is_section_3_4_with_the_reset_before_the_product():
    torch.manual_seed(0)
    cell = GRUCell(5)
    h, a = 3 * noise(4, 5, seed=1), 3 * noise(4, 5, seed=2)
    expected = [gru_step(cell, h[i].double().numpy(), a[i].double().numpy()) for i in range(4)]
    assert_close(cell(h, a).double(), torch.tensor(np.array(expected)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [1, 3])
def test_gru_context_walks_the_layers_as_the_paper_writes_it(depth):
    torch.manual_seed(0)
    context = GRUContext(config(depth=depth, eta=0.3), steps=4)
    torch.nn.init.normal_(context.first)
    sketch = noise(depth, 16)
    states = [*sketch.double().numpy()]  # h_0 = s, one slice a layer
    w_o, b_o = arrays(context.output)
    a, mean = context.first.detach().double().numpy(), sketch.double().numpy().mean(0)
    for found in context(sketch, sketch):
        below = a
        for layer, cell in enumerate(context.cells):
            below = states[layer] = gru_step(cell, states[layer], below)
        a = sigmoid(w_o @ below + b_o)
        assert_close(found.double(), torch.tensor(0.7 * a + 0.3 * mean), rtol=1e-5, atol=1e-6)


def test_ahru_context_is_the_official_codes():
    torch.manual_seed(0)
    context = AHRUContext(config(depth=2, eta=0.3, context="ahru"), steps=3)
    for norm in [context.state_norm, *context.norms]:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    sketch = noise(2, 16)
    gru = {name: p.detach().double().numpy() for name, p in context.gru.named_parameters()}
    w_o, b_o = arrays(context.output)
    states, a = [*sketch.double().numpy()], context.first.detach().double().numpy()
    for norm, found in zip(context.norms, context(sketch, sketch), strict=True):
        below = a
        for layer in range(2):
            x, h = gru[f"weight_ih_l{layer}"] @ below, gru[f"weight_hh_l{layer}"] @ states[layer]
            x, h = (x + gru[f"bias_ih_l{layer}"]).reshape(3, -1), (h + gru[f"bias_hh_l{layer}"]).reshape(3, -1)
            r, z = sigmoid(x[0] + h[0]), sigmoid(x[1] + h[1])
            below = (1 - z) * np.tanh(x[2] + r * h[2]) + z * states[layer]
            states[layer] = layer_norm(below, context.state_norm)
        a = np.maximum(w_o @ below + b_o, 0)
        expected = layer_norm(0.7 * a + 0.3 * sketch.double().numpy().mean(0), norm)
        assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_eta_goes_from_no_residual_to_nothing_but_the_sketch(depth):
    sketch, other = noise(depth, 16, seed=1), noise(depth, 16, seed=2)
    only_sketch = GRUContext(config(depth=depth, eta=1.0), steps=3)(sketch, sketch)
    assert [c.shape for c in only_sketch] == [(16,)] * 3
    assert all(torch.equal(c, sketch.mean(0)) for c in only_sketch)
    no_residual = GRUContext(config(depth=depth, eta=0.0), steps=3)
    assert all(torch.equal(*pair) for pair in zip(no_residual(sketch, sketch), no_residual(other, sketch), strict=True))


@pytest.mark.parametrize(
    ("initial_state", "eta", "matters"), [("sketch", 0.0, True), ("random", 0.0, False), ("random", 0.2, True)]
)
def test_sketch_enters_by_the_initial_state_and_by_the_residual(initial_state, eta, matters):
    model = make_model(initial_state=initial_state, eta=eta)
    first, second = model.generate(noise(2, 16, seed=1)), model.generate(noise(2, 16, seed=2))
    assert all(torch.equal(first[name], second[name]) != matters for name in first)


@pytest.mark.parametrize("context", ["gru", "ahru", "none"])
def test_several_sketches_at_once_give_what_each_gives_alone(context):
    model = make_model(context=context)
    sketches = noise(3, 2, 16)
    together = model.generate(sketches)
    assert {name: w.shape[1:] for name, w in together.items()} == {c.name: c.shape for c in model.shared.convs}
    for group, sketch in enumerate(sketches):
        for name, weight in model.generate(sketch).items():
            assert_close(together[name][group], weight, rtol=1e-4, atol=1e-5)


# Sketch


@pytest.mark.parametrize(
    ("extractor", "normalization"),
    [(extractor, "group") for extractor in (*TABLE_12, "5conv", "5conv-1linear")]
    + [("3conv", "batch"), ("2conv-1linear", "batch"), ("3conv", "layer")],
)
def test_every_extractor_gives_one_slice_a_recurrent_layer(extractor, normalization):
    sketch = make_sketch(extractor=extractor, normalization=normalization, depth=3)
    first, second = sketch(noise(4, 3, 16, 16, seed=1)), sketch(noise(4, 3, 16, 16, seed=2))
    assert first.shape == (3, 16) and first.isfinite().all()
    if normalization != "batch":
        assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("how", POOLINGS)
def test_pooling_is_its_closed_form(how):
    features = noise(7, 3).double()
    expected = []
    for column in features.numpy().T:
        softplus = [math.log(1 + math.exp(x)) for x in column]
        mean = sum(column) / 7
        expected.append({"mean": mean, "sum": sum(column), "geometric_mean": math.prod(softplus) ** (1 / 7)}.get(how))
    if how == "mean_var":
        rows = features.numpy().T
        expected = [sum(row) / 7 for row in rows] + [sum((x - sum(row) / 7) ** 2 for x in row) / 7 for row in rows]
    assert_close(pool(features, how), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("normalization", ["batch", "group", "layer"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_order_of_the_images_does_not_matter(pooling, normalization):
    sketch, images = make_sketch(pooling=pooling, normalization=normalization, depth=3, hidden=5), noise(9, 3, 16, 16)
    assert sketch(images).shape == (3, 5)  # an odd size, which mean and variance share
    assert_close(sketch(images.flip(0)), sketch(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["group", "layer"])
def test_sketch_is_the_mean_of_the_images_own_so_duplicates_do_not_matter(normalization):
    sketch, images = make_sketch(normalization=normalization), noise(5, 3, 16, 16)
    each = torch.stack([sketch(image[None]) for image in images])
    assert_close(sketch(images), each.mean(0), rtol=1e-4, atol=1e-5)  # Eq. 3
    assert_close(sketch(torch.cat([images, images])), sketch(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("normalization", "same"), [("batch", True), ("group", False)])
def test_batch_norm_on_one_position_makes_all_sketches_the_same(normalization, same):
    """Why `group` is the default: BatchNorm over a group fixes the mean that the sketch is."""
    sketch = make_sketch(extractor="5conv", normalization=normalization, size=32)
    first, second = sketch(noise(6, 3, 32, 32)), sketch(2 * noise(6, 3, 32, 32, seed=1) + 1)
    assert torch.allclose(first, second, atol=1e-5) == same


# Weight generator


@pytest.mark.parametrize("f", [1, 3, 7])
def test_generator_is_a_linear_layer_and_two_1x1_convolutions(f):
    torch.manual_seed(0)
    generator = WeightGenerator(ConvShape("conv", (5, 2, f, f)), hidden=16, width=4)
    torch.nn.init.normal_(generator.expand[:, -1:])
    context = noise(3, 16)
    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    (w_l, b_l), (w_1, b_1) = (arrays(m) for m in (generator.linear, generator.mix))
    w_2, b_2 = np.split(generator.expand.detach().double().numpy(), [8], 1)
    with torch.no_grad():
        without_gradient = generator(context)
    assert_close(without_gradient, generator(context).detach())
    for found, a in zip(generator(context), context.double().numpy(), strict=True):
        maps = gelu(w_l @ a + b_l).reshape(4, f, f)
        kernels = np.empty((10, f, f))
        for y in range(f):
            for x in range(f):
                kernels[:, y, x] = w_2 @ gelu(w_1 @ maps[:, y, x] + b_1) + b_2[:, 0]
        expected = math.sqrt(2 / (2 * f * f)) * kernels.reshape(5, 2, f, f)
        assert_close(found.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [0, 1])
def test_weights_of_a_layer_span_few_dimensions_whatever_its_size(bias):
    torch.manual_seed(0)
    generator = WeightGenerator(ConvShape("conv", (16, 16, 3, 3)), hidden=64, width=4).double()
    torch.nn.init.constant_(generator.expand[:, -1:], bias)
    with torch.no_grad():
        weights = generator(3 * noise(400, 64).double()).flatten(1)  # (400, 2304)
    assert torch.linalg.matrix_rank(weights) == 2 * 4 * 9 + bias


@pytest.mark.parametrize("seed", range(3))
def test_predicted_weights_start_with_he_variance(seed, digits):
    torch.manual_seed(seed)
    model = PudNet(ModelConfig(), build_target("convnet3", 1, 8))
    on_noise = model.generate(model.sketch(noise(50, 1, 8, 8, seed=100 + seed)))
    on_digits = model.generate(model.sketch(digits.images(digits.train[seed])))
    for (name, weight), fan_in in zip(on_noise.items(), (9, 64 * 9, 64 * 9), strict=True):
        he = math.sqrt(2 / fan_in)
        assert 0.7 < weight.std() / he < 1.3
        assert 0.5 < on_digits[name].std() / he < 2


# The whole


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize(("context", "eta"), [("gru", 0.0), ("gru", 1.0), ("ahru", 0.2), ("none", 0.2)])
def test_gradient_of_every_predicted_layer_reaches_the_extractors_first_convolution(context, eta, layer):
    model = make_model(context=context, eta=eta, extractor="2conv-1linear")
    weight = [*model.generate(model.sketch(noise(5, 1, 8, 8))).values()][layer]
    (weight * noise(*weight.shape, seed=1)).sum().backward()
    gradient = model.extractor.blocks[0].weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-8


def test_gradient_of_every_layer_of_a_resnet_reaches_the_sketch_extractor():
    torch.manual_seed(0)
    model = PudNet(ModelConfig(extractor="5conv", eta=0.5, generator_hidden=2), build_target("resnet18", 3, 32))
    predicted = model.generate(model.sketch(noise(4, 3, 32, 32)))
    assert len(predicted) == 20
    for name, weight in predicted.items():
        (weight * noise(*weight.shape, seed=1)).sum().backward(retain_graph=True)
        gradient = model.extractor.blocks[0].weight.grad
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-8, name
        gradient.zero_()


def test_several_groups_have_the_sketches_and_weights_that_each_has_alone():
    for normalization in ("batch", "group"):
        model = make_model(normalization=normalization)
        images = torch.stack([noise(5, 1, 8, 8, seed=seed) for seed in range(3)])
        sketches = model.sketch(images)
        assert_close(sketches, torch.stack([model.sketch(group) for group in images]), rtol=1e-4, atol=1e-5)
        for name, found in model.generate(sketches).items():
            each = torch.stack([model.generate(sketch)[name] for sketch in sketches])
            assert_close(found, each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", ["gru", "ahru"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reloaded_model_predicts_the_same_weights_bit_for_bit(variant, context):
    changed, _ = apply_variant(variant, config(context=context), TrainConfig())
    first, second = (make_model(seed, **vars(changed)) for seed in (0, 1))
    group = noise(5, 1, 8, 8), torch.tensor([0, 0, 1, 1, 1])
    before = {name: weight.clone() for name, weight in second.generate(second.sketch(*group)).items()}
    second.load_state_dict(first.state_dict())
    expected, found = first.generate(first.sketch(*group)), second.generate(second.sketch(*group))
    for name in expected:
        assert torch.equal(found[name], expected[name]) and not torch.equal(found[name], before[name])


def test_constant_sketch_ignores_the_images_but_learns():
    model = make_model(sketch="constant")
    first, second = (model.generate(model.sketch(noise(5, 1, 8, 8, seed=seed))) for seed in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    first["block1.conv.weight"].square().sum().backward()
    assert model.constant.grad.abs().max() > 0
