"""Meta-training (Algorithm 1): Adam updates on task groups, with exact resume and recovery from NaN losses."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from pudnet.augmentation import augmented
from pudnet.config import TrainConfig
from pudnet.cpu import accelerate, compiling_pays, keep_freed_memory
from pudnet.data.images import StoreImages
from pudnet.device import flushing_denormals, wants_bf16
from pudnet.errors import RunFailed, UserError
from pudnet.gpu import compile_parts
from pudnet.learner import Learner
from pudnet.objective import Losses

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3  # in a row, before training is given up
WARM_UP, START = 0.2, 0.04  # one-cycle schedule: share of training in which the rate rises, and the factor at its start


def half_cosine(done: float) -> float:
    """Half a cosine wave: falls from 1 at `done` = 0 to 0 at `done` = 1."""
    return (1 + math.cos(math.pi * done)) / 2


def one_cycle(done: float) -> float:
    """The factor of the learning rate: rises to 1 during warm-up, then falls to 0."""
    if done < WARM_UP:
        return 1 - (1 - START) * half_cosine(done / WARM_UP)
    return half_cosine((done - WARM_UP) / (1 - WARM_UP))


def arranged(table: np.ndarray, number: int, seed: int, mixed: int) -> np.ndarray:
    """A table of groups (G, N) as pass `number` has it: from the second pass on in a new order, drawn from `seed`.

    The images of the first `mixed` groups are shuffled across groups, in the first pass alike for every seed.
    """
    rng = np.random.default_rng([seed, number] if number else 0)
    if number:
        table = table[rng.permutation(len(table))]
    if mixed <= 0:
        return table
    first = table[:mixed]
    return np.concatenate([rng.permutation(first.ravel()).reshape(first.shape), table[mixed:]])


def group_seed(seed: int, g: int) -> int:
    """A seed for one group, so that its result does not depend on other groups or their number."""
    return int(np.random.SeedSequence([seed, g]).generate_state(1)[0])


@dataclass(frozen=True)
class Report:
    """Means over the task groups since the last report. Accuracy is in percent."""

    groups: int  # seen so far
    loss: float
    metric_loss: float
    full_loss: float
    kl_loss: float
    train_accuracy: float
    grad_norm: float  # before it is clipped
    groups_per_second: float
    rollbacks: int  # so far


class Trainer:
    """Trains a method on a table of task groups (G, N), which it passes `config.passes` times.

    The first pass has the table's own order, each later one an order drawn from `seed`. All numbers of groups count
    over the passes.

    `run` yields a report every `report_every` groups. Between two reports `state_dict` gives a checkpoint; training
    that continues from it by `load_state_dict` ends with the same weights, bit for bit on one CPU. Raises `UserError`
    if the support set would take all images of a group.

    With several `workers` (processes of one torch.distributed group), each process has its own trainer and `rank`. They
    split the groups of a step and add up their gradients, so that each makes the update that one process would make
    (but for dropout, whose random numbers differ).
    """

    def __init__(
        self,
        learner: Learner,
        images: StoreImages,
        table: np.ndarray,
        train_classes: tuple[int, ...],
        config: TrainConfig,
        seed: int = 0,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        self.config, self.images, self.seed = config, images, seed
        self.rank, self.workers = rank, workers
        per_class = table.shape[1] // len(images.block_classes(table[0]))
        if per_class <= config.support_per_class:
            raise UserError(
                f"train.support_per_class: is {config.support_per_class}, but groups have {per_class} images of each "
                "class, so none is left to train on; lower it or raise groups.images_per_group"
            )
        self.device = images.device
        self.size, self.total = len(table), config.groups(len(table))  # groups of one pass, and of all
        columns = np.zeros(images.labels.max() + 1, dtype=np.int64)
        columns[list(train_classes)] = np.arange(len(train_classes))
        self.columns = images.beside(columns[images.labels])  # each row's class, in 0..K-1 (training classes)
        self.learner = learner.to(self.device, memory_format=torch.channels_last)
        if self.device.type == "cpu":
            keep_freed_memory()
            accelerate(self.learner, compiling_pays(self.learner, self.total, table.shape[1], images.image_size))
        self.compiled = self.device.type == "cuda" and config.compile != "none"
        if self.compiled:
            compile_parts(self.learner, config.compile)
        self.parameters = list(learner.parameters())
        self.autocast = wants_bf16(config.precision, self.device)
        self.random = torch.Generator(self.device) if config.augment != "none" else None
        self.groups, self.rollbacks = 0, 0
        self.in_order = table
        self._begin_pass(0)
        self.last: Report | None = None  # the last report with finite losses

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        """Made when it is first used: torch then imports its compiler, which takes seconds."""
        return torch.optim.Adam(self.parameters, lr=self._rate(), fused=True)

    def run(self) -> Iterator[Report]:
        """Train on the groups that are left. Raises `RunFailed` if the loss does not stay finite.

        Raises `RuntimeError` if the workers go on from different groups, since they have read different checkpoints.
        """
        self._check_together()
        good, failures = copy.deepcopy(self.state_dict()), 0
        while self.groups < self.total:
            report = self._interval()
            if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
                self.last = report
                good, failures = copy.deepcopy(self.state_dict()), 0
                yield report
                continue
            failures += 1
            at_end = self.groups == self.total
            if failures == MAX_ROLLBACKS or (at_end and self.last is None):
                raise RunFailed(
                    f"training: the loss was not finite in the last {failures} interval(s) before group "
                    f"{self.groups}; lower train.learning_rate or train.clip_norm"
                )
            self._roll_back(good)
            if at_end:  # no groups are left: report the last good weights
                yield replace(self.last, groups=self.groups, rollbacks=self.rollbacks)

    def _roll_back(self, good: dict) -> None:
        """Go back to the last good weights, but skip the groups that led to the NaN."""
        reached, rollbacks = self.groups, self.rollbacks + 1
        logger.warning(
            "the loss was not finite before group %d; going on with the weights of group %d, groups between skipped",
            reached,
            good["groups"],
        )
        self.load_state_dict(good)
        self.groups, self.rollbacks = reached, rollbacks
        self._set_rate()

    def _interval(self) -> Report:
        """Train until the next report: to the end of the step that reaches a multiple of `report_every` groups.

        With one worker only its end waits for the device.
        """
        start, begin = time.perf_counter(), self.groups
        due = min(self.total, (begin // self.config.report_every + 1) * self.config.report_every)
        with flushing_denormals(self.device):
            sums = [self._step(groups) for groups in self._steps(begin, due)]
            trained = self.groups - begin
            means = (self._added(torch.stack(sums).sum(0)) / trained).tolist()
        return Report(
            groups=self.groups,
            loss=means[0],
            metric_loss=means[1],
            full_loss=means[2],
            kl_loss=means[3],
            train_accuracy=100 * means[4],
            grad_norm=means[5],
            groups_per_second=trained / (time.perf_counter() - start),
            rollbacks=self.rollbacks,
        )

    def _steps(self, begin: int, due: int) -> Iterator[np.ndarray | Tensor]:
        """The groups of each step from group `begin` to the step that reaches `due`; they are counted over all passes.

        A step has no groups of two passes: the last of a pass, and of the training, may be smaller.
        """
        while begin < due:
            number, first = divmod(begin, self.size)
            if number != self.number:
                self._begin_pass(number)
            step = self.table[first : first + min(self.config.groups_per_step, self.total - begin)]
            yield step
            begin += len(step)

    def _begin_pass(self, number: int) -> None:
        mixed = round(self.learner.mixed_share * self.total) - number * self.size
        self.number = number
        self.table = self.images.beside(arranged(self.in_order, number, self.seed, mixed))

    def _step(self, groups: np.ndarray | Tensor) -> Tensor:
        """One update on groups (B, N) -> losses, accuracy and gradient norm, summed over this worker's groups (6,)."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's graph outputs may be overwritten
        torch.manual_seed(group_seed(self.seed, self.groups + self.rank))  # for dropout, so that resume is exact
        own = groups[self.rank :: self.workers]
        losses = self._losses(own) if len(own) else None  # the last step may have fewer groups than workers
        self.optimizer.zero_grad()
        if losses:
            (losses.total.sum() / len(groups)).backward()
        self._add_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.groups += len(groups)
        self._set_rate()
        if not losses:
            return torch.zeros(6, device=self.device)
        parts = (losses.total.detach(), losses.metric, losses.full, losses.kl, losses.accuracy)
        return torch.stack([*(part.float().sum() for part in parts), norm * len(own)])

    def _add_gradients(self) -> None:
        """Add up the workers' gradients, in one all-reduce.

        A parameter that no worker has a gradient of keeps none, so that Adam passes over it, as in one process.
        """
        if self.workers == 1:
            return
        there = torch.tensor([float(p.grad is not None) for p in self.parameters], device=self.device)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        added = self._added(torch.cat([there, *(gradient.flatten() for gradient in own)]))
        there, *parts = added.split([len(own), *(p.numel() for p in self.parameters)])
        for parameter, gradient, part, owners in zip(self.parameters, own, parts, there.tolist(), strict=True):
            parameter.grad = gradient.copy_(part.view_as(gradient)) if owners else None  # keeps its memory layout

    def _check_together(self) -> None:
        groups = self._added(torch.tensor(self.groups, dtype=torch.float64, device=self.device)).item()
        if groups != self.workers * self.groups:
            raise RuntimeError(f"the workers do not all go on from group {self.groups}")

    def _added(self, values: Tensor) -> Tensor:
        """The sum over the workers."""
        if self.workers > 1:
            torch.distributed.all_reduce(values)
        return values

    def _losses(self, groups: np.ndarray | Tensor) -> Losses:
        labels = torch.as_tensor(self.columns[self.images.rows(groups)]).long()
        images = self._augmented(self.images(groups))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.learner.losses(images, labels, self.groups / self.total)

    def _augmented(self, images: Tensor) -> Tensor:
        """Change this worker's groups of the step (B, N, C, H, W), each at random by its own number.

        So it makes no difference which worker has a group, or whether training was interrupted before it.
        """
        if self.random is None:
            return images
        changed = []
        for group, own in enumerate(images):
            number = self.groups + self.rank + group * self.workers
            self.random.manual_seed(group_seed(self.seed, number))
            changed.append(augmented(own, self.config.augment, self.random))
        return torch.stack(changed)

    def _set_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()

    def _rate(self) -> float:
        """The learning rate of the next step."""
        done = min(1.0, self.groups / self.total)
        rate = self.config.learning_rate * self.learner.rate(done)
        if self.config.schedule == "cosine":
            rate *= half_cosine(done)
        if self.config.schedule == "one_cycle":
            rate *= one_cycle(done)
        return rate

    def state_dict(self) -> dict:
        """Everything that the rest of the run depends on, as plain tensors and numbers."""
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "groups": self.groups,
            "rollbacks": self.rollbacks,
            "last": asdict(self.last) if self.last else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.groups, self.rollbacks = state["groups"], state["rollbacks"]
        self.last = Report(**state["last"]) if state["last"] else None
