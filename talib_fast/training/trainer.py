"""One run: train one method with one seed, measure its cost, and save its state when it is interrupted."""

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..networks import Network
from ..storage import write_atomically
from . import parallel
from .data import Batch, InOrder, TaskData
from .memory import PeakMemory
from .methods import Method
from .options import Options
from .recipes import ALONE, parse, weight_decay
from .results import differences
from .schedules import factor
from .splits import mixed_seed
from .stepbar import StepBar
from .tensorboard import Curves

MOMENTUM = 0.9
CHECKPOINT_SECONDS = 30.0


class DivergedError(UserError):
    """The loss of a run is infinite or not a number."""


@dataclass(frozen=True)
class Answers:
    """For each image: the predicted class, its probability, and the cross-entropy."""

    predicted: list[int]
    probabilities: list[float]
    cross_entropies: list[float]

    def right(self, images: InOrder) -> list[bool]:
        return [label == predicted for label, predicted in zip(images.labels.tolist(), self.predicted, strict=True)]

    def accuracy(self, images: InOrder) -> float:
        """The share of the images that are predicted right, in %."""
        return 100 * sum(self.right(images)) / len(self.predicted)


@dataclass
class Record:
    """The course of a run so far.

    Attributes:
        losses, cross_entropies, step_seconds: one entry per step; the cross-entropy is the part of the loss that all
            methods share.
        accuracies: pairs of step and accuracy in %, on the validation images or, without any, on the test images.
        seconds: for each accuracy, the time of all steps until then.
        preparation_seconds: the time of :meth:`Method.prepare`.
        peak_mib: the highest memory use.
        answers: the latest predictions: for the validation images in a trial, else for the test images.
    """

    method: str
    seed: int
    losses: list[float] = field(default_factory=list)
    cross_entropies: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    preparation_seconds: float = 0.0
    peak_mib: float = 0.0
    answers: "Answers | None" = None

    @property
    def step(self) -> int:
        return len(self.losses)

    def result(self, data: TaskData) -> dict[str, Any]:
        """The entry of a finished run in results.json."""
        assert data.test is not None and self.answers is not None
        kept = asdict(self)
        del kept["answers"]
        validation = {} if data.val is None else {"val_accuracy": self.accuracies[-1][1]}
        return {
            "method": kept.pop("method"),
            "seed": kept.pop("seed"),
            "accuracy": self.answers.accuracy(data.test),
            **validation,
            "train_images": len(data.train.labels),
            "val_images": 0 if data.val is None else len(data.val.labels),
            "test_images": len(data.test.labels),
            "seconds_per_step": statistics.median(kept.pop("step_seconds")),
            **kept,
        }


class Run:
    """One method, trained with the seed of its data.

    All random numbers are functions of the seed, the step's number and the rank. So a continued run gives the same
    result as an uninterrupted one. Several ranks compute the same as one rank with the whole batches.

    Args:
        method: name of the method.
        data: the seed's images.
        network: the pretrained network; the run trains a copy of it.
        options: resolved options with the number of steps.
        device: where the run computes.
        settings: the settings that a checkpoint must have to be continued.
        checkpoint: the file that an interrupted run leaves and the next one continues.
        title: label of the progress bar.
        curves: folder for TensorBoard's files; None: write none.
    """

    def __init__(
        self,
        method: str,
        data: TaskData,
        network: Network,
        options: Options,
        device: torch.device,
        settings: dict[str, Any],
        checkpoint: Path,
        title: str,
        curves: Path | None = None,
    ) -> None:
        assert options.steps is not None and options.lr is not None
        seed = data.seed
        self.steps, self.curves, self.title = options.steps, curves, title
        self.record = Record(method, seed)
        self.data, self.options, self.device = data, options, device
        self.settings, self.checkpoint = {**settings, "method": method, "seed": seed}, checkpoint
        torch.manual_seed(mixed_seed(seed, "build"))
        source_dtype = None if options.source_dtype == "network" else getattr(torch, options.source_dtype)
        weights = balanced_weights(data.train.labels, data.num_classes) if options.class_weights else None
        self.method = Method(
            network.clone(), data.num_classes, method, options.trade_offs, source_dtype, weights, options.own
        )
        self.method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = self.method.parameter_groups(options.lr)
        self.rates = [group["lr"] for group in groups]
        self.optimizer = build_optimizer(options, method, groups)
        half = options.amp and device.type != "cpu"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.autocast = torch.autocast(device.type, torch.float16 if half else torch.bfloat16, enabled=options.amp)
        times = options.evaluations
        self.evaluate_at = {math.ceil(self.steps * part / times) for part in range(1, times + 1)}

    def finish(self, until: Callable[[Record], bool] | None = None) -> Record:
        """Train until the last step, or until ``until`` is true after an evaluation.

        Raises:
            DivergedError: the loss is infinite or not a number.
            KeyboardInterrupt: the user interrupted; the state of the run is saved.
        """
        memory = PeakMemory(self.device)
        if not self._load():
            self._prepare()
        if parallel.world_size() > 1:
            parallel.synchronize(self.method, self.device)
        saved_at = time.monotonic()
        first = parallel.rank() == 0
        with (
            interrupts_deferred() as interrupted,
            StepBar(self.title, self.steps, self.record.step, show=first) as bar,
            Curves(self.curves if first else None, self.record.step) as curves,
        ):
            before = self.record.peak_mib
            batches = self.data.batches(self.record.step, self.steps, self.method.views)
            ended = self._ended(until)  # an interrupted run may have ended with its last evaluation
            while self.record.step < self.steps and not ended:
                self._step(batches)
                if self.record.step in self.evaluate_at:
                    self._evaluate()
                ended = self._ended(until)
                bar.update(self.record.losses[-1], self.record.accuracies)
                curves.update(self.record.losses[-1], self.record.accuracies, self.optimizer.param_groups[-1]["lr"])
                self.record.peak_mib = max(before, memory.mib())
                due = first and time.monotonic() - saved_at > CHECKPOINT_SECONDS
                # the flag is read once per step, so that all ranks stop after the same step
                stop, save = parallel.summed(interrupted.is_set(), due)
                if stop or save:
                    parallel.from_first(self._save)
                    saved_at = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        return self.record

    def _prepare(self) -> None:
        start = time.perf_counter()
        prepared, name = self.data.knowledge, self.method.name
        if name not in prepared:  # other trials of the method start from the same network, so they share the result
            prepared[name] = parallel.from_first(
                lambda: {part: value.cpu() for part, value in self.method.prepare(self.data.train).items()}
            )
        self._use(prepared[name])
        self.record.preparation_seconds = time.perf_counter() - start

    def _use(self, knowledge: dict[str, Tensor]) -> None:
        self.method.use({name: value.to(self.device) for name, value in knowledge.items()})

    def _step(self, batches: Iterator[Batch]) -> None:
        start = time.perf_counter()
        step = self.record.step
        # Rank 0 draws the same numbers as a single process. Other ranks draw others, so that dropout differs.
        own = (parallel.rank(),) if parallel.rank() else ()
        torch.manual_seed(mixed_seed(self.record.seed, "step", step, *own))
        scale = factor(self.options.schedule, step, self.steps, self.options.warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * scale
        batch = next(batches)
        self.method.train()
        with self.autocast:
            loss, logits = self.method(batch)
        cross_entropy = F.cross_entropy(logits.detach().float(), batch.labels)
        totals = parallel.summed(*torch.stack([loss.detach(), cross_entropy]).tolist())
        values = [total / parallel.world_size() for total in totals]
        if not math.isfinite(values[0]):
            raise DivergedError(self._divergence(values[0]))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        parallel.average_gradients(self.method.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.record.losses.append(values[0])
        self.record.cross_entropies.append(values[1])
        self.record.step_seconds.append(time.perf_counter() - start)

    def _divergence(self, loss: float) -> str:
        method = self.record.method
        remedies = [f"lower --lr {self.options.lr:g}"]
        for part in parse(method):
            if part not in (*ALONE, "stochnorm"):
                remedies.append(f"or --trade-off {part}={self.options.trade_offs[part]:g}")
        if self.options.amp:
            remedies.append("or leave out --amp")
        where = f"at step {self.record.step + 1} of {self.steps}"
        return f"{method} with seed {self.record.seed} diverged with a loss of {loss} {where}: {', '.join(remedies)}"

    def _evaluate(self) -> None:
        parallel.share_statistics(self.method.classifier)
        images = self.data.test if self.data.val is None else self.data.val
        assert images is not None
        found = self._answers(images)
        self.record.accuracies.append((self.record.step, found.accuracy(images)))
        self.record.seconds.append(sum(self.record.step_seconds))
        if self.record.step == self.steps and self.data.test not in (None, images):
            found = self._answers(self.data.test)
        self.record.answers = found

    def _ended(self, until: Callable[[Record], bool] | None) -> bool:
        """Whether the last step had an evaluation and ``until`` is true after it."""
        return until is not None and self.record.step in self.evaluate_at and until(self.record)

    def _answers(self, images: InOrder) -> Answers:
        with self.autocast:
            return answers(self.method.classifier, images)

    def _save(self) -> None:
        state = {
            "settings": self.settings,
            "record": asdict(self.record),
            "method": self.method.state_dict(),
            "knowledge": self.method.knowledge,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def _load(self) -> bool:
        """Continue from the checkpoint; returns False if there is none."""
        state = parallel.from_first(self._read)
        if state is None:
            return False
        try:
            self.method.load_state_dict(state["method"])
            self._use(state["knowledge"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            found = state["record"].pop("answers")
            self.record = Record(**state["record"], answers=Answers(**found) if found else None)
        except Exception as error:  # method, optimiser and scaler raise different errors for a state that does not fit
            raise self._damaged() from error
        return True

    def _read(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            difference = differences(state["settings"], self.settings)
        except Exception as error:  # zip, pickle and torch raise different errors for a broken file
            raise self._damaged() from error
        if difference:
            raise UserError(
                f"the checkpoint {self.checkpoint} was made with other settings ({difference}): "
                "remove it or choose another --out"
            )
        return state

    def _damaged(self) -> UserError:
        return UserError(f"the checkpoint {self.checkpoint} is damaged: remove it to start that run again")


def build_optimizer(options: Options, method: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser; ``--weight-decay`` applies to the methods whose recipe has a weight decay."""
    decay = weight_decay(method)
    if decay and options.weight_decay is not None:
        decay = options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay)
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, weight_decay=decay)


@torch.no_grad()
def answers(classifier: nn.Module, images: InOrder) -> Answers:
    """The classifier's predictions for the images; each rank computes a share, and every rank gets all of them."""
    classifier.eval()
    mine = slice(parallel.rank(), None, parallel.world_size())
    found = torch.zeros(3, len(images.labels), dtype=torch.float64)
    parts = []
    for batch, labels in images.part(mine):
        logits = classifier(batch).float()
        probabilities, predicted = logits.softmax(1).max(1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        parts.append(torch.stack([predicted.double(), probabilities.double(), losses.double()]).cpu())
    if parts:
        found[:, mine] = torch.cat(parts, 1)
    whole = torch.tensor(parallel.summed(*found.flatten().tolist()), dtype=torch.float64)
    predicted, probabilities, losses = whole.view(3, -1).tolist()
    return Answers([int(place) for place in predicted], probabilities, losses)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """One weight per class, inversely proportional to its number of images; the mean over all images is 1."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (num_classes * counts.float())


@contextmanager
def interrupts_deferred() -> Iterator[threading.Event]:
    """A context in which Ctrl-C and SIGTERM set the event instead of raising; a second signal raises at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
