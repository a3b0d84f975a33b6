"""The curves of a run for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..libraries import needed


class Curves:
    """A context that writes curves to ``folder``, or nothing if it is None; ``done`` steps are finished already."""

    def __init__(self, folder: Path | None, done: int = 0) -> None:
        self.step = done
        self.writer: Any = None
        if folder is not None:
            self.writer = summary_writer()(str(folder), purge_step=done + 1)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def update(self, loss: float, accuracies: Sequence[tuple[int, float]], learning_rate: float) -> None:
        """Count a step with this loss; ``accuracies`` are the (step, %) pairs so far."""
        self.step += 1
        if self.writer is None:
            return
        self.writer.add_scalar("loss", loss, self.step)
        self.writer.add_scalar("learning rate", learning_rate, self.step)
        if accuracies and accuracies[-1][0] == self.step:
            self.writer.add_scalar("accuracy", accuracies[-1][1], self.step)


def summary_writer() -> Any:
    """torch's SummaryWriter; raises UserError if tensorboard is not installed."""
    needed("tensorboard", "--tensorboard")
    return needed("torch.utils.tensorboard", "--tensorboard").SummaryWriter
