"""The fine-tuning methods, alone or combined: the classifier that is trained and the loss of one step.

A method is built on a pretrained network. ``prepare`` computes what the method needs before the first step. Then every
batch gives a loss and the logits of the new task.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks import Network
from .data import Batch, InOrder
from .parts import PARTS, Classify, Delta, Part, Penalty, Plain, new_head
from .recipes import RECIPES, parse

P = TypeVar("P")


class Method(nn.Module):
    """A fine-tuning method or a combination: cross-entropy plus the term of each part.

    Args:
        network: the method's own copy of the pretrained network, which it trains.
        num_classes: number of classes of the new task.
        name: a method or a combination, see :func:`~talib_fast.training.recipes.parse`.
        trade_offs: weight of each part's term; a missing one is the recipe's.
        own: settings that only one method has, for example ``bss.k``; a missing one is the recipe's.
        source_dtype: dtype in which delta's pretrained network computes; None: the network's own.
        class_weights: weight ``[num_classes]`` of every class in the cross-entropy; None: equal weights.

    Attributes:
        classifier: the trained module; in evaluation mode it maps images to logits ``[B, num_classes]``.
        parts: the parts by name.
        views: how many augmentations of its images a batch must hold.
        knowledge: what ``prepare`` returned.

    Raises:
        UsageError: the name is wrong, or the network lacks something that the method needs.
        ValueError: the class weights have another shape.
    """

    classifier: Any
    class_weights: Tensor | None

    def __init__(
        self,
        network: Network,
        num_classes: int,
        name: str,
        trade_offs: Mapping[str, float],
        source_dtype: torch.dtype | None = None,
        class_weights: Tensor | None = None,
        own: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check(name, network)
        if class_weights is not None and class_weights.shape != (num_classes,):
            raise ValueError(f"expected class_weights [{num_classes}], got {list(class_weights.shape)}")
        names = parse(name)
        self.name = "+".join(names)
        self.knowledge: dict[str, Tensor] = {}
        self.register_buffer("class_weights", class_weights, persistent=False)
        parts = {
            part: PARTS[part](trade_offs.get(part, RECIPES[part].trade_off), **own_settings(part, own or {}))
            for part in names
        }
        if not any(isinstance(part, Plain) for part in parts.values()):
            parts = {"plain": Plain(), **parts}
        self.parts = nn.ModuleDict(parts)
        self.views = self._base.views
        for part in self._of(Part):
            part.change(network)
        self.classifier = self._base.build(network, num_classes)
        for part in self._of(Part):
            part.watch(self.classifier, network, source_dtype)

    @property
    def head(self) -> nn.Linear:
        """The new task's head."""
        return new_head(self.classifier)

    def train(self, mode: bool = True) -> "Method":
        super().train(mode)
        self._base.hold(self.classifier)
        return self

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The optimiser's groups of trainable parameters; the backbone's learning rate is a tenth of ``lr``."""
        groups = self.classifier.get_parameters(lr)
        learning = [[weight for weight in group["params"] if weight.requires_grad] for group in groups]
        return [{**group, "params": weights} for group, weights in zip(groups, learning, strict=True) if weights]

    def prepare(self, images: InOrder) -> dict[str, Tensor]:
        """Compute what the method needs before the first step, with the pretrained network."""
        found: dict[str, Tensor] = {}
        for part in self._of(Part):
            found |= part.prepare(self.classifier, images)
        return found

    def use(self, knowledge: dict[str, Tensor]) -> None:
        """Take what ``prepare`` returned, in this run or, by a checkpoint, in the run that it continues."""
        self.knowledge = knowledge
        for part in self._of(Part):
            part.use(knowledge)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a training step (0-dim) and the logits ``[B, num_classes]``.

        The mean of the ranks' losses is the loss of the whole batch.
        """
        added: list[Tensor] = []
        with inputs_of(self.head) as features:
            logits = self._base(self._watched(added), batch, added)
        added += [penalty(features[-1]) for penalty in self._of(Penalty)]
        return sum(added, self.cross_entropy(logits, batch.labels)), logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of the batch, each sample multiplied by its class's weight."""
        if self.class_weights is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, self.class_weights, reduction="sum") / len(labels)

    def _of(self, kind: type[P]) -> list[P]:
        return [part for part in self.parts.values() if isinstance(part, kind)]

    @property
    def _base(self) -> "Plain":
        return self._of(Plain)[0]

    def _watched(self, added: list[Tensor]) -> Classify:
        """The classifier; if delta is a part, a call also appends delta's distance to ``added``."""
        delta = next(iter(self._of(Delta)), None)
        if delta is None:
            return self.classifier

        def classify(images: Tensor) -> Any:
            output, distance = delta(images)
            added.append(distance)
            return output

        return classify


def check(name: str, network: Network) -> None:
    """Raise UsageError if the method's name is wrong, or if the network lacks something that one of its parts needs."""
    for part in parse(name):
        PARTS[part].check(network)


def own_settings(part: str, own: Mapping[str, float]) -> dict[str, float]:
    """The settings of a part besides its trade-off."""
    return {name: own.get(f"{part}.{name}", setting.default) for name, setting in RECIPES[part].own.items()}


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A context in which the module's inputs are appended to the list."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()
