"""The one training loop: gradient steps on an objective, on any device, in one process or several.

For t = 0, 1, ... over shuffled batches B_t, with the rate of tools/optimizers.py::

    g_t = gradient of the mean objective over B_t, scaled so that |g_t| <= clip
    w_{t+1} = optimizer(w_t, g_t, rate(t))

On lightning-fabric: mixed precision (Micikevicius et al. 2018, arXiv:1710.03740) and distributed data
parallel (tools/processes.py). What was reached is kept every epoch, every minute and when an interrupt or a
time limit ends it, so that training goes on and ends with the same weights. A loss that is no number, or a
hundred times what it was, ends training with the weights that were kept last.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featherweight.errors import DataError, RecipeError
from featherweight.method import Context, NoCheckpoint, Precision, Silent
from featherweight.tools.layout import layout
from featherweight.tools.learner import Learner, leaves_some_out
from featherweight.tools.objectives import Objective
from featherweight.tools.optimizers import Average, make_optimizer, rate_factor
from featherweight.tools.simulated import Simulated
from featherweight.tools.train_settings import History, TrainSettings
from featherweight.tools.training_examples import Batch, TrainingExamples

if TYPE_CHECKING:
    from featherweight.tools.processes import Seat

State = dict[str, Tensor]

_SAVE_S = 60.0
_EXPLODED = 100.0  # times the first losses, which count as 1 at least
_RECENT = 10  # steps that the first and the last losses are means of


def train(
    net: Simulated,
    objective: Objective,
    examples: TrainingExamples,
    settings: TrainSettings,
    context: Context,
) -> History:
    """Train a network in place.

    Args:
        net: Ends with the weights of the best epoch where examples are held back, else of the last update.
        objective: What is made small; its parameters are trained too.
        examples: What is trained on, and what is held back.
        settings: How.
        context: Device, progress, and the checkpoint from which training goes on.

    Raises:
        RecipeError: Nothing is left to train, or the loss diverged before anything was kept.
        DataError: Labels are missing or do not fit.
        RunnerError: A process that trained beside this one died.
    """
    from featherweight.tools.processes import together  # lightning takes seconds to import

    if not any(one.requires_grad for one in net.parameters()):
        raise RecipeError("no parameter is left to train", fix="let where select layers with weights")
    size = min(settings.batch_size, len(examples)) // settings.accumulate
    if size < settings.devices:
        raise DataError(
            f"{settings.devices} processes cannot share {size} examples of a batch",
            fix=f"--devices {max(size, 1)}, or a larger batch_size",
        )
    objective.attach(net)
    saved = context.checkpoint.load()

    def work(seat: Seat) -> History:
        return _Training(net, objective, examples, settings, context, seat).run(saved)

    with torch.random.fork_rng(devices=[]):
        history: History = together(settings.devices, work)
    return history


class _Training:
    """One process's side of a training run."""

    def __init__(
        self,
        net: Simulated,
        objective: Objective,
        examples: TrainingExamples,
        settings: TrainSettings,
        context: Context,
        seat: Seat,
    ) -> None:
        from featherweight.tools.processes import make_fabric

        self.examples, self.settings, self.context, self.seat = examples, settings, context, seat
        first = seat.rank == 0
        self.progress = context.progress if first else Silent()
        self.checkpoint = context.checkpoint if first else NoCheckpoint()
        self.learner = Learner(net, objective)
        few = examples.few()
        unused = seat.size > 1 and leaves_some_out(self.learner, few)
        precision = _precision(settings, context, self.progress)
        self.fabric = make_fabric(seat, _device(context), precision, unused=unused)
        self.ordered = layout(net, few.inputs)
        optimizer = make_optimizer(
            self.learner,
            settings.optimizer,
            settings.learning_rate,
            momentum=settings.momentum,
            decay=settings.weight_decay,
            slow=list(net.formats.parameters()),
            slow_rate=settings.step_rate,
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.wrapped, self.optimizer = self.fabric.setup(self.learner, optimizer)
        self.average = None if settings.ema is None else Average(self.learner, settings.ema)
        self.per_epoch = examples.steps(settings.batch_size)
        total = settings.steps or max(1, round(settings.epochs * self.per_epoch))
        self.history = History(steps=total)
        self.best: tuple[float, int, State] | None = None  # loss held back, epoch, weights
        self.kept: tuple[int, State] | None = None  # step and weights of the last checkpoint
        self.done = self.saved = 0  # updates, and those in the last checkpoint
        self.whole = True  # weights are those after so many updates
        self.saved_at = time.monotonic()

    # ---- the loop

    def run(self, saved: Mapping[str, Any] | None) -> History:
        """Train from where it was left."""
        from featherweight.tools.processes import shared_statistics

        self._restore(saved)
        self._train_mode()
        try:
            with shared_statistics(self.seat):
                diverged = self._loop()
        except BaseException:  # interrupted or out of time: what was done is kept
            if self.whole and self.done > self.saved:
                self._save()
            raise
        if diverged is not None:
            return self._fall_back(self.done, diverged)
        self._finish()
        return self.history

    def _loop(self) -> float | None:
        """The updates that are left; the loss of one that diverges ends them."""
        history, begun = self.history, self.done
        if self._is_unjudged():
            self._end_epoch()
        steps: Iterable[int] = range(begun, history.steps)
        for step in self.progress.track(steps, self._words(), history.steps - begun):
            if history.stopped:
                break
            loss = self._update(step)
            if self._diverges(loss):
                return loss
            history.losses.append(loss)
            self.done, self.whole = step + 1, True
            if self._ends_epoch():
                self._end_epoch()
                self._save()
            elif self._is_time_to_save():
                self._save()
        return None

    def _update(self, step: int) -> float:
        """One update; the loss of the whole batch."""
        settings, net, total = self.settings, self.learner.net, self.history.steps
        net.advance(step / total)
        self.learner.objective.advance(step / total)
        factor = rate_factor(step, total, settings.warmup, settings.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        before = {name: one.clone() for name, one in self.learner.named_buffers()}
        try:
            loss = self._differentiate(step)
        except BaseException:  # statistics of a batch that does not count
            for name, value in before.items():
                self.learner.get_buffer(name).copy_(value)
            raise
        self.whole = False  # until the update is done as a whole
        self.history.rates.append(settings.learning_rate * factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        if step + 1 == total:
            net.advance(1.0)
        return loss

    def _differentiate(self, step: int) -> float:
        """Gradients of a whole batch, clipped; its loss."""
        settings, parts = self.settings, self.settings.accumulate
        torch.manual_seed(hash((settings.seed, step, self.seat.rank)) % 2**63)
        mean = torch.zeros((), device=self.fabric.device)
        whole = parts * self.seat.size
        for part in range(parts):
            batch = self.examples.batch(
                step, settings.batch_size, whole, part * self.seat.size + self.seat.rank
            )
            with self.fabric.no_backward_sync(self.wrapped, enabled=part < parts - 1 and self.seat.size > 1):
                loss = self.wrapped(*self._placed(batch)) * (batch.weight / parts)
                self.fabric.backward(loss)
            mean += loss.detach()
        if settings.clip is not None:
            self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=settings.clip, error_if_nonfinite=False
            )
        return float(self.fabric.all_reduce(mean, reduce_op="mean"))

    def _ends_epoch(self) -> bool:
        return self.done % self.per_epoch == 0 or self.done == self.history.steps

    def _is_unjudged(self) -> bool:
        """Whether an epoch ended and was interrupted before it was judged."""
        epochs = -(-self.done // self.per_epoch)
        return self._ends_epoch() and len(self.examples.held) > 0 and len(self.history.validation) < epochs

    def _end_epoch(self) -> None:
        """Judge the epoch by the examples that are held back, and tell how it went."""
        history, epoch = self.history, -(-self.done // self.per_epoch)
        recent = history.losses[-self.per_epoch :]
        said = f"epoch {epoch}: loss {sum(recent) / len(recent):.4g}"
        if len(self.examples.held):
            value = self._held_back_loss()
            history.validation.append(value)
            said += f", {value:.4g} on the examples held back"
            settled = self.done >= self.settings.settled * history.steps
            if settled and math.isfinite(value) and (self.best is None or value < self.best[0]):
                self.best = (value, epoch, self._result())
            since = epoch - (0 if self.best is None else self.best[1])
            if settled and self.settings.patience is not None and since >= self.settings.patience:
                history.stopped = f"no better for {since} epochs"
        self.progress.note(said)

    @torch.no_grad()
    def _held_back_loss(self) -> float:
        """Mean loss over the examples held back, of the weights that would be the result."""
        now = self.learner.state_dict()
        if self.average is not None:
            now = _copied(now)
            self.learner.load_state_dict(self.average.into(now))
        self.learner.eval()
        total = torch.zeros(2, dtype=torch.float64)
        parts = (self.settings.batch_size, self.seat.size, self.seat.rank)
        try:
            for batch in self.examples.held_back(*parts):
                with self.fabric.autocast():
                    loss = float(self.learner(*self._placed(batch)))
                total += torch.tensor([loss * batch.weight, batch.weight], dtype=torch.float64)
            total = self.fabric.all_reduce(total, reduce_op="sum")
        finally:
            if self.average is not None:
                self.learner.load_state_dict(now)
        self._train_mode()
        return float(total[0] / total[1])

    def _finish(self) -> None:
        """Put the weights in place that are the result."""
        first, last = (_mean(list(part)) for part in self._ends())
        if self.best is None and last > 2 * first:
            self.progress.note(
                f"warning: the loss rose in training, from {first:.3g} to {last:.3g}; "
                f"a learning_rate below {self.settings.learning_rate:.2g} may help"
            )
        result = self._result() if self.best is None else self.best[2]
        if _finite(result):
            self.learner.load_state_dict(result)
        else:
            self._fall_back(self.history.steps - 1, math.nan)

    def _ends(self) -> tuple[Iterable[float], Iterable[float]]:
        losses = self.history.losses
        return losses[:_RECENT], deque(losses, maxlen=_RECENT)

    # ---- what goes wrong

    def _diverges(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        first, last = self._ends()
        recent = [*last, loss][-_RECENT:]
        begun = len(self.history.losses) >= 2 * _RECENT
        return begun and _mean(recent) > _EXPLODED * max(_mean(list(first)), 1.0)

    def _fall_back(self, step: int, loss: float) -> History:
        """End with the weights that were kept last."""
        rate = self.settings.learning_rate
        what = f"training diverged: the loss is {loss:.3g} at step {step + 1} of {self.history.steps}"
        fix = f"a smaller learning_rate, such as {rate / 10:.1g}, or clip: 1"
        kept = self.kept if self.best is None else (self.best[1] * self.per_epoch, self.best[2])
        if kept is None:
            raise RecipeError(what, fix=fix)
        self.learner.load_state_dict(kept[1])
        self.history.stopped = what
        self.progress.note(f"warning: {what}; the weights of step {kept[0]} are kept. Try {fix}")
        return self.history

    # ---- checkpoints

    def _is_time_to_save(self) -> bool:
        late = time.monotonic() - self.saved_at >= _SAVE_S
        return late if self.seat.size == 1 else bool(self.fabric.broadcast(late))

    def _save(self) -> None:
        result = self._result()
        if not _finite(result):
            return
        self.kept = (self.done, result)
        self.checkpoint.save(
            {
                "about": self._about(),
                "step": self.done,
                "learner": self.learner.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "average": None if self.average is None else self.average.state(),
                "best": self.best,
                "kept": None if self.average is None else self.kept[1],
                "losses": self.history.losses,
                "rates": self.history.rates,
                "validation": self.history.validation,
                "stopped": self.history.stopped,
            }
        )
        self.saved, self.saved_at = self.done, time.monotonic()

    def _restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from a checkpoint of this training."""
        if saved is None or saved.get("about") != self._about():
            return
        self.learner.load_state_dict(saved["learner"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        if self.average is not None:
            self.average.load(saved["average"])
        self.best = saved["best"]
        self.done = self.saved = saved["step"]
        self.kept = (self.done, saved["kept"] or saved["learner"])
        for name in ("losses", "rates", "validation", "stopped"):
            setattr(self.history, name, saved[name])
        self.progress.note(f"training goes on after step {self.done} of {self.history.steps}")

    def _about(self) -> list[str]:
        """What a checkpoint must be of."""
        shapes = {name: tuple(value.shape) for name, value in self.learner.state_dict().items()}
        return [repr(self.settings), repr(shapes), str(len(self.examples)), str(len(self.examples.held))]

    def _result(self) -> State:
        """A copy of the weights that would be the result now."""
        state = _copied(self.learner.state_dict())
        return state if self.average is None else _copied(self.average.into(state))

    # ---- how it runs

    def _train_mode(self) -> None:
        self.learner.train()
        for path in self.settings.frozen:
            self.learner.net.module.get_submodule(path).training = False

    def _words(self) -> str:
        return "training" if self.seat.size == 1 else f"training in {self.seat.size} processes"

    def _placed(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None, float]:
        device = self.fabric.device
        inputs = tuple(self.ordered(one.to(device)) for one in batch.inputs)
        targets, others = (None if one is None else one.to(device) for one in (batch.targets, batch.others))
        return inputs, targets, others, batch.share


def _device(context: Context) -> torch.device:
    if context.device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return context.device


def _precision(settings: TrainSettings, context: Context, progress: Any) -> Precision:
    if settings.precision == "16-mixed" and _device(context).type == "cpu":
        progress.note("warning: CPUs do not train in float16; bf16-mixed is used")
        return "bf16-mixed"
    return settings.precision


def _copied(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _finite(state: State) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())
