"""The progress of a run: a bar on a terminal, or a line per evaluation elsewhere."""

import sys
from collections.abc import Sequence
from typing import Any


class StepBar:
    """A context that shows progress if ``show``; ``done`` of the ``total`` steps are finished already."""

    def __init__(self, title: str, total: int, done: int = 0, show: bool = True) -> None:
        self.title, self.total, self.step, self.show = title, total, done, show
        self.bar: Any = None
        if show and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(desc=title, total=total, initial=done, unit="step", leave=False, dynamic_ncols=True)

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, loss: float, accuracies: Sequence[tuple[int, float]]) -> None:
        """Count a step with this loss; ``accuracies`` are the (step, %) pairs so far."""
        self.step += 1
        latest = f", accuracy {accuracies[-1][1]:.1f} %" if accuracies else ""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}{latest}", refresh=False)
            self.bar.update()
        elif self.show and accuracies and accuracies[-1][0] == self.step:
            print(f"  {self.title}: step {self.step}/{self.total}, loss {loss:.3f}{latest}", file=sys.stderr)
