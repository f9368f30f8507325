"""Meta-training on real digits: it learns, resumes bit for bit, and outlives NaN."""

import copy
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pudnet.baselines import LEARNED, make_method
from pudnet.card import Card
from pudnet.config import VARIANTS, ModelConfig, TrainConfig, apply_variant
from pudnet.controls import StaticTrunk
from pudnet.data.images import StoreImages
from pudnet.device import wants_bf16
from pudnet.errors import RunFailed, UserError
from pudnet.evaluation import mean_interval, twin_accuracies
from pudnet.hypernet import PudNet
from pudnet.learner import MetaLearner
from pudnet.predictor import Predictor
from pudnet.targets import build_target
from pudnet.training import Trainer, arranged

pytestmark = pytest.mark.numeric

KINDS = ["pudnet", "static_trunk"]
CPU = torch.device("cpu")


class PoisonedImages(StoreImages):
    """The digits, with NaN for pixels in some groups."""

    def __init__(self, store, bad):
        super().__init__(store, CPU)
        self.bad = {tuple(group) for group in bad.tolist()}

    def __call__(self, indices):
        poison = [float("nan") if tuple(group) in self.bad else 1.0 for group in np.atleast_2d(indices).tolist()]
        return super().__call__(indices) * torch.tensor(poison).view(-1, *[1] * (indices.ndim + 2))


def make_trainer(digits, table, kind="pudnet", seed=0, images=None, model=None, **changes):
    torch.manual_seed(seed)
    target, classes = build_target("convnet3", 1, 8), len(digits.split.train_classes)
    config = TrainConfig(**{"precision": "fp32", "report_every": 4, **changes})
    if kind in LEARNED:
        learner = make_method(kind, {}, target)[0].learner(classes, 2, config)
    else:
        network = StaticTrunk(target) if kind == "static_trunk" else PudNet(model or ModelConfig(), target)
        learner = MetaLearner(network, target, config, classes, 2)
    return Trainer(learner, images or digits.images, table, digits.split.train_classes, config)


def make_card(digits):
    store = digits.store
    return Card("pudnet", "convnet3", 1, 8, store.mean, store.std, 10.0, 10, asdict(ModelConfig()))


def weights(trainer):
    return trainer.learner.state_dict()


def same(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_go_down(kind, digits):
    reports = list(make_trainer(digits, digits.train, kind, report_every=20).run())
    assert [report.groups for report in reports] == [20, 40, 60]
    first, last = reports[0], reports[-1]
    assert last.loss < 0.9 * first.loss and last.full_loss < 0.9 * first.full_loss
    assert last.metric_loss < 0.9 * first.metric_loss and last.train_accuracy > first.train_accuracy
    assert last.loss == pytest.approx(last.metric_loss + last.full_loss + last.kl_loss, rel=1e-5)


def test_full_head_has_a_column_for_each_training_class(digits):
    group = digits.train[0]
    trainer = make_trainer(digits, group[None])
    truth = [digits.split.train_classes.index(label) for label in digits.store.labels[group]]
    with torch.no_grad():
        images = digits.images(group)
        predicted = trainer.learner.model.generate(trainer.learner.model.sketch(images))
        full = trainer.learner.objective.head(trainer.learner.model.shared(images, predicted))
    (report,) = trainer.run()
    expected = torch.nn.functional.cross_entropy(full, torch.tensor(truth)).item()
    assert full.shape == (40, 6) and report.full_loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_all_that_it_has(variant, digits):
    model, config = apply_variant(variant, ModelConfig(hidden=16), TrainConfig())
    trainer = make_trainer(digits, digits.train[:2], model=model, **vars(config) | {"precision": "fp32"})
    before = {name: p.detach().clone() for name, p in trainer.learner.model.named_parameters()}
    (report,) = trainer.run()
    assert np.isfinite(report.loss)
    unchanged = {name for name, p in trainer.learner.model.named_parameters() if torch.equal(p, before[name])}
    pretrained = config.pretraining_share == 1
    assert unchanged == ({"regression.log_ridge", "regression.log_scale"} if pretrained else set())
    assert (report.full_loss == 0) == (config.full_weight == 0 and not pretrained)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("kind", [*KINDS, "meta_baseline", "musml"])
def test_resumed_run_ends_with_the_same_weights_bit_for_bit(kind, schedule, digits, tmp_path):
    table = digits.train[:10]
    whole = make_trainer(digits, table, kind, schedule=schedule)
    expected = list(whole.run())
    stopped = make_trainer(digits, table, kind, schedule=schedule)
    next(stopped.run())
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed = make_trainer(digits, table, kind, seed=1, schedule=schedule)
    assert not same(weights(resumed), weights(stopped))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = list(resumed.run())
    assert [report.groups for report in found] == [8, 10]
    assert [report.loss for report in found] == [report.loss for report in expected[1:]]
    assert same(weights(resumed), weights(whole)) and not same(weights(resumed), weights(stopped))


def test_several_groups_a_step_are_one_update_on_their_mean_loss(digits):
    together = make_trainer(digits, digits.train[:3], groups_per_step=3)
    single = make_trainer(digits, digits.train[:3])
    losses = [single._losses(digits.train[g : g + 1]).total[0] for g in range(3)]
    torch.stack(losses).mean().backward()
    expected = [parameter.grad for parameter in single.parameters]
    (report,) = together.run()
    assert report.groups == 3 and report.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    torch.testing.assert_close([p.grad for p in together.parameters], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("every", "reports"), [(1, [3, 6, 9, 10]), (4, [6, 9, 10]), (100, [10])])
def test_a_report_comes_after_a_whole_step(every, reports, digits, monkeypatch):
    """So the search, which reports more often, makes the steps of the final training."""
    trainer, sizes = make_trainer(digits, digits.train[:10], groups_per_step=3, report_every=every), []
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda groups: sizes.append(len(groups)) or step(groups))
    assert [report.groups for report in trainer.run()] == reports and sizes == [3, 3, 3, 1]


@pytest.mark.parametrize("poison", ["images", "weights"])
def test_run_goes_on_from_the_last_good_weights_without_the_groups_that_broke_them(poison, digits, caplog):
    table = digits.train[:12]
    images = PoisonedImages(digits.store, table[5:6]) if poison == "images" else None
    trainer = make_trainer(digits, table, images=images)
    run = trainer.run()
    first = next(run)
    assert (first.groups, first.rollbacks) == (4, 0) and not caplog.records
    if poison == "weights":
        with torch.no_grad():
            next(trainer.learner.model.parameters()).fill_(float("nan"))
    (last,) = run
    assert (last.groups, last.rollbacks) == (12, 1)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "before group 8" in record.message and "of group 4" in record.message
    without = make_trainer(digits, np.delete(table, range(4, 8), axis=0))
    list(without.run())
    assert same(weights(trainer), weights(without))


def test_after_a_nan_the_rate_is_the_schedules_at_the_group_that_follows(digits):
    table = digits.train[:12]
    trainer = make_trainer(digits, table, images=PoisonedImages(digits.store, table[5:6]), schedule="cosine")
    used = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (used.append((trainer.groups, trainer.optimizer.param_groups[0]["lr"])), step())
    list(trainer.run())
    expected = {group: 0.001 * (1 + math.cos(math.pi * group / 12)) / 2 for group in range(12)}
    assert [group for group, _ in used] == list(range(12))
    assert all(rate == pytest.approx(expected[group]) for group, rate in used)


@pytest.fixture
def world_of_one(tmp_path):
    """torch.distributed with this process alone: what it adds up is its own."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_worker_makes_one_processs_updates_also_where_parts_begin_later(world_of_one, digits):
    model, _ = apply_variant("pudnet_plus", ModelConfig(), TrainConfig())
    trainers = [make_trainer(digits, digits.train[:8], model=model, pretraining_share=0.5) for _ in range(2)]
    trainers[1].workers = 2  # the first of two takes the only group of each step
    for trainer in trainers:
        list(trainer.run())
    assert same(weights(trainers[0]), weights(trainers[1]))


def test_nan_in_the_last_groups_leaves_the_last_good_weights(digits):
    table = digits.train[:6]
    trainer = make_trainer(digits, table, images=PoisonedImages(digits.store, table[4:]))
    assert [report.groups for report in trainer.run()] == [4, 6]
    good = make_trainer(digits, table[:4])
    list(good.run())
    assert same(weights(trainer), weights(good)) and trainer.rollbacks == 1


def test_nan_in_the_last_groups_ends_a_resumed_run_as_it_ends_a_whole_one(digits):
    table = digits.train[:6]
    whole, resumed = (make_trainer(digits, table, images=PoisonedImages(digits.store, table[4:])) for _ in range(2))
    run = whole.run()
    next(run)
    resumed.load_state_dict(whole.state_dict())
    assert [report.groups for report in run] == [report.groups for report in resumed.run()] == [6]
    assert same(weights(resumed), weights(whole))


def test_groups_without_queries_are_refused(digits):
    with pytest.raises(UserError, match="support_per_class"):
        list(make_trainer(digits, digits.train[:4], support_per_class=20).run())


@pytest.mark.parametrize(
    "groups",
    [
        40,
        8,  # the table ends before the third failure
    ],
)
@pytest.mark.parametrize("variant", ["pudnet", "pudnet_plus"])
def test_loss_that_stays_nan_fails_the_run(groups, variant, digits):
    table = digits.train[:groups]
    model, _ = apply_variant(variant, ModelConfig(), TrainConfig())
    trainer = make_trainer(digits, table, images=PoisonedImages(digits.store, table), model=model)
    with pytest.raises(RunFailed, match="not finite.*learning_rate"):
        list(trainer.run())
    assert trainer.groups <= 12  # three intervals, not the whole table


def test_gradient_is_clipped_to_its_norm_and_reported_as_it_was(digits):
    trainer = make_trainer(digits, digits.train[:1], clip_norm=0.01)
    (report,) = trainer.run()
    norm = torch.stack([p.grad.norm() for p in trainer.parameters]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3) and report.grad_norm > 0.1
    loose = make_trainer(digits, digits.train[:1], clip_norm=1e6)
    (unclipped,) = loose.run()
    norm = torch.stack([p.grad.norm() for p in loose.parameters]).norm().item()
    assert norm == pytest.approx(unclipped.grad_norm, rel=1e-4) == report.grad_norm


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [1, 1, 1]), ("cosine", [0.75, 0.25, 0])])
def test_learning_rate_follows_its_schedule(schedule, rates, digits):
    trainer = make_trainer(digits, digits.train[:3], schedule=schedule, learning_rate=0.01, report_every=1)
    found = [trainer.optimizer.param_groups[0]["lr"] for _ in trainer.run()]
    assert found == pytest.approx([0.01 * rate for rate in rates], abs=1e-9)


def test_each_pass_has_the_same_groups_in_an_order_of_its_own(digits):
    table = digits.train[:6]
    trainer = make_trainer(digits, table, passes=2.5, groups_per_step=4, report_every=9)
    steps = list(trainer._steps(0, trainer.total))
    assert trainer.total == 15 and [len(step) for step in steps] == [4, 2, 4, 2, 3]
    first, second, third = (np.concatenate(part) for part in (steps[:2], steps[2:4], steps[4:]))
    assert (first == table).all() and not (second == table).all() and not (third == second[:3]).all()
    rows = {tuple(group) for group in table.tolist()}
    assert {tuple(group) for group in second.tolist()} == rows > {tuple(group) for group in third.tolist()}
    assert [report.groups for report in trainer.run()] == [10, 15]


def test_workers_that_read_different_checkpoints_do_not_go_on(digits, monkeypatch):
    trainer = make_trainer(digits, digits.train[:4])
    trainer.workers, trainer.groups = 2, 4  # at its end: nothing is left to train
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(2))
    with pytest.raises(RuntimeError, match="the workers do not all go on from group 4"):
        next(trainer.run())
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(4))
    assert list(trainer.run()) == []


def test_the_share_of_mixed_groups_is_of_all_passes(digits):
    table, expected = digits.train[:6], [6, 3, 0]
    trainer = make_trainer(digits, table, "meta_baseline", passes=3)
    trainer.learner.mixed_share = 0.5
    for number, mixed in enumerate(expected):
        trainer._begin_pass(number)
        plain = arranged(table, number, 0, 0)
        assert (trainer.table[mixed:] == plain[mixed:]).all()
        assert [(a == b).all() for a, b in zip(trainer.table[:mixed], plain, strict=False)] == [False] * mixed
        assert sorted(trainer.table[:mixed].ravel()) == sorted(plain[:mixed].ravel())


def test_augmentation_depends_on_the_seed_and_the_number_of_a_group_alone(digits):
    def seen(seed=0, **options):
        """The images that a training learns from, one group after the other, of two passes."""
        trainer, groups = make_trainer(digits, digits.train[:3], passes=2, **options), []
        trainer.seed = seed
        losses = trainer.learner.losses
        trainer.learner.losses = lambda images, *rest: (groups.extend(images), losses(images, *rest))[1]
        list(trainer.run())
        return torch.stack(groups)

    plain, shifted, in_threes = seen(), seen(augment="shift"), seen(augment="shift", groups_per_step=3)
    assert torch.equal(shifted, in_threes)
    assert not torch.equal(shifted[0], seen(augment="shift", seed=1)[0])
    for images, others in zip(plain, shifted, strict=True):
        same = (images == others).flatten(1).all(1).float().mean()
        assert 0.02 < same < 0.3  # a ninth of the shifts by -1, 0, 1 pixels each way
    assert not torch.equal(shifted[0], shifted[np.argmax([torch.equal(plain[0], again) for again in plain[3:]]) + 3])


@pytest.mark.parametrize("kind", ["pudnet", "meta_baseline"])
def test_a_run_resumed_in_any_pass_ends_with_the_same_weights_bit_for_bit(kind, digits):
    options = {"passes": 2.5, "schedule": "one_cycle", "report_every": 1, "groups_per_step": 2, "augment": "shift"}
    whole = make_trainer(digits, digits.train[:4], kind, **options)
    states = [copy.deepcopy(whole.state_dict()) for _ in whole.run()]
    assert [state["groups"] for state in states] == [2, 4, 6, 8, 10] and whole.optimizer.param_groups[0]["lr"] == 0
    for done, state in enumerate(states[:-1], start=1):
        resumed = make_trainer(digits, digits.train[:4], kind, seed=1, **options)
        resumed.load_state_dict(state)
        assert [report.groups for report in resumed.run()] == [2, 4, 6, 8, 10][done:]
        assert same(weights(resumed), weights(whole))


def test_precision_is_what_was_asked_for():
    assert wants_bf16("bf16", CPU) and not wants_bf16("fp32", CPU)


@pytest.mark.skipif(not wants_bf16("auto", CPU), reason="this processor has no bf16 instructions")
def test_bf16_and_fp32_runs_end_within_their_intervals(digits):
    intervals = []
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(digits, digits.train, precision=precision)
        list(trainer.run())
        predictor = Predictor(trainer.learner.model, make_card(digits), build_target("convnet3", 1, 8))
        intervals.append(mean_interval(twin_accuracies(predictor, digits.images, digits.test, precision == "bf16")))
    (full, full_half), (half, half_half) = intervals
    assert abs(full - half) < full_half + half_half and full > 80


@pytest.mark.skipif(not wants_bf16("auto", CPU), reason="this processor has no bf16 instructions")
def test_bf16_stays_close_to_fp32(digits):
    trainers = [make_trainer(digits, digits.train[:8], precision=precision) for precision in ("fp32", "bf16")]
    full, half = (list(trainer.run())[-1] for trainer in trainers)
    assert half.loss == pytest.approx(full.loss, rel=0.05) and half.loss != full.loss
    assert all(p.dtype == torch.float32 for p in trainers[1].parameters)
    assert list(make_trainer(digits, digits.train[:8], precision="auto").run())[-1].loss == half.loss
