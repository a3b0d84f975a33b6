"""One run: train one method with one seed, measure what it costs, and lose nothing when it is interrupted."""

import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..storage import write_atomically
from . import parallel
from .common import UserError, differences
from .data import InOrder, TaskData, mixed_seed
from .memory import PeakMemory
from .methods import METHODS
from .networks import Network
from .options import RECIPES, Options
from .stepbar import StepBar

MOMENTUM = 0.9
DECAY_AT, DECAY_BY = 0.6, 0.1  # after 60 % of the steps the learning rate falls to a tenth
EVALUATIONS = 6
CHECKPOINT_SECONDS = 30.0


class DivergedError(UserError):
    """The loss of a run is not a number any more."""


@dataclass
class Record:
    """What a run has done so far.

    ``losses``, ``cross_entropies`` (the part of the loss that all methods share) and ``step_seconds`` have an entry
    per step, ``accuracies`` holds (step, % of the test images).
    """

    method: str
    seed: int
    losses: list[float] = field(default_factory=list)
    cross_entropies: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    preparation_seconds: float = 0.0
    peak_mib: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)

    def result(self) -> dict[str, Any]:
        """What results.json keeps of a finished run."""
        kept = asdict(self)
        return {
            "method": kept.pop("method"),
            "seed": kept.pop("seed"),
            "accuracy": self.accuracies[-1][1],
            "seconds_per_step": statistics.median(kept.pop("step_seconds")),
            **kept,
        }


class Run:
    """One method trained with one seed.

    Args:
        network: stays as it is; the run trains a copy.
        data: the seed's images.
        settings: what a checkpoint must agree with to be continued.
        checkpoint: file that an interrupted run leaves and the next one continues.

    Everything random is a function of the seed, the step's number and the rank, so a continued run ends where an
    uninterrupted one would have. Several ranks compute what one would with the whole batches.
    """

    def __init__(
        self,
        method: str,
        seed: int,
        network: Network,
        data: TaskData,
        options: Options,
        device: torch.device,
        settings: dict[str, Any],
        checkpoint: Path,
    ) -> None:
        self.record = Record(method, seed)
        self.data, self.options, self.device = data, options, device
        self.settings, self.checkpoint = {**settings, "method": method, "seed": seed}, checkpoint
        torch.manual_seed(mixed_seed(seed, "build"))
        source_dtype = None if options.source_dtype == "network" else getattr(torch, options.source_dtype)
        self.method = METHODS[method](network.clone(), data.num_classes, options.trade_offs[method], source_dtype)
        self.method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = self.method.classifier.get_parameters(options.lr)
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.SGD(
            groups, momentum=MOMENTUM, nesterov=True, weight_decay=RECIPES[method].weight_decay
        )
        half = options.amp and device.type != "cpu"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.autocast = torch.autocast(device.type, torch.float16 if half else torch.bfloat16, enabled=options.amp)
        steps = options.steps
        self.evaluate_at = {math.ceil(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}

    def finish(self) -> Record:
        """Train until the last step; raises KeyboardInterrupt, with everything saved, when the user interrupts."""
        memory = PeakMemory(self.device)
        if not self._load():
            self._prepare()
        if parallel.world_size() > 1:
            parallel.synchronize(self.method, self.device)
        title = f"{self.record.method}, seed {self.record.seed}"
        saved_at = time.monotonic()
        show = parallel.rank() == 0
        with interrupts_deferred() as interrupted, StepBar(title, self.options.steps, self.record.step, show) as bar:
            before = self.record.peak_mib
            while self.record.step < self.options.steps:
                self._step()
                if self.record.step in self.evaluate_at:
                    self._evaluate()
                bar.update(self.record.losses[-1], self.record.accuracies)
                self.record.peak_mib = max(before, memory.mib())
                due = parallel.rank() == 0 and time.monotonic() - saved_at > CHECKPOINT_SECONDS
                # read once: a signal after this is for the next step
                stop, save = parallel.summed(interrupted.is_set(), due)
                if stop or save:
                    parallel.from_first(self._save)
                    saved_at = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        return self.record

    def _prepare(self) -> None:
        start = time.perf_counter()
        self._use(
            parallel.from_first(
                lambda: {name: value.cpu() for name, value in self.method.prepare(self.data.train).items()}
            )
        )
        self.record.preparation_seconds = time.perf_counter() - start

    def _use(self, knowledge: dict[str, Tensor]) -> None:
        self.method.use({name: value.to(self.device) for name, value in knowledge.items()})

    def _step(self) -> None:
        start = time.perf_counter()
        step = self.record.step
        # rank 0 draws what a single process would; dropout should not be the same for every share of the batch
        own = (parallel.rank(),) if parallel.rank() else ()
        torch.manual_seed(mixed_seed(self.record.seed, "step", step, *own))
        decay = DECAY_BY if step >= DECAY_AT * self.options.steps else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * decay
        batch = self.data.batch(step, self.method.views)
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
        if method not in ("plain", "stochnorm"):
            remedies.append(f"or --trade-off {method}={self.options.trade_offs[method]:g}")
        if self.options.amp:
            remedies.append("or leave out --amp")
        where = f"at step {self.record.step + 1} of {self.options.steps}"
        return f"{method} with seed {self.record.seed} diverged, its loss is {loss} {where}: {', '.join(remedies)}"

    def _evaluate(self) -> None:
        parallel.share_statistics(self.method.classifier)
        with self.autocast:
            self.record.accuracies.append((self.record.step, accuracy(self.method.classifier, self.data.test)))

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
        """Continue from the checkpoint; False if there is none."""
        state = parallel.from_first(self._read)
        if state is None:
            return False
        try:
            self.method.load_state_dict(state["method"])
            self._use(state["knowledge"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.record = Record(**state["record"])
        except Exception as error:  # each part has its own errors for a state that does not fit
            raise self._damaged() from error
        return True

    def _read(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            difference = differences(state["settings"], self.settings)
        except Exception as error:  # zip, pickle and torch each have their own errors for a broken file
            raise self._damaged() from error
        if difference:
            raise UserError(
                f"the checkpoint {self.checkpoint} was made with other settings ({difference}): "
                "remove it or choose another --out"
            )
        return state

    def _damaged(self) -> UserError:
        return UserError(f"the checkpoint {self.checkpoint} is damaged: remove it to start that run anew")


@torch.no_grad()
def accuracy(classifier: nn.Module, images: InOrder) -> float:
    """How many of the images the classifier puts into the right class, in %."""
    classifier.eval()
    mine = images.part(slice(parallel.rank(), None, parallel.world_size()))
    right = sum((classifier(batch).argmax(1) == labels).sum() for batch, labels in mine)
    return 100 * parallel.summed(int(right))[0] / len(images.labels)


@contextmanager
def interrupts_deferred() -> Iterator[threading.Event]:
    """Within it, Ctrl-C and SIGTERM set the event instead of raising; a second one raises at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
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
