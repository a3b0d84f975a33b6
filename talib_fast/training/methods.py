"""The fine-tuning methods: the classifier that one trains and the loss of one step, alone or combined.

A method is built on a pretrained network, learns in ``prepare`` what it has to know about it, and then turns every
batch into a loss and the logits of the new task.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..finetune import bi_tuning, classifier, co_tuning, lwf
from ..finetune.bss import BatchSpectralShrinkage
from ..finetune.delta import (
    AttentionBehavioralRegularization,
    BehavioralRegularization,
    IntermediateLayerGetter,
    L2Regularization,
    SPRegularization,
    channel_attention,
)
from ..finetune.frozen import frozen
from ..finetune.fusion import fuse
from ..finetune.knowledge_distillation import KnowledgeDistillationLoss
from ..finetune.norms import _StochNorm
from ..finetune.stochnorm import convert_model
from ..networks import Network
from . import parallel
from .data import Batch, InOrder
from .recipes import RECIPES, parse

HEAD_STEPS, HEAD_LR = 200, 0.01  # for the source network's own head of delta_attention
KEYS_PER_CLASS = 8  # a longer queue would hold the few labelled images again and again
KEY_MOMENTUM = 0.999

P = TypeVar("P")
Classify = Callable[[Tensor], Any]  # images to what the classifier gives for them in training


class Method(nn.Module):
    """A fine-tuning method, or several at once: cross-entropy, and what each part adds to it.

    Args:
        network: the method's own copy, which it trains.
        num_classes: number of classes of the new task.
        name: as :func:`~talib_fast.training.recipes.parse` takes it.
        trade_offs: weight of what each part adds; the recipes' where there is none.
        own: settings that only one method has, ``bss.k`` for example; the recipes' where there are none.
        source_dtype: what delta's pretrained network computes in; None: as the network does.
        class_weights: weight ``[num_classes]`` of every class in the cross-entropy; None: all alike.

    Attributes:
        classifier: what is trained; in evaluation mode it maps images to logits ``[B, num_classes]``.
        parts: by name.
        views: how many augmentations of its images a batch must hold.
        knowledge: what ``prepare`` found.

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
        """The optimiser's groups: what learns, the backbone at a tenth of the rate."""
        groups = self.classifier.get_parameters(lr)
        learning = [[weight for weight in group["params"] if weight.requires_grad] for group in groups]
        return [{**group, "params": weights} for group, weights in zip(groups, learning, strict=True) if weights]

    def prepare(self, images: InOrder) -> dict[str, Tensor]:
        """What the method must know before the first step, found with the network as it was pretrained."""
        found: dict[str, Tensor] = {}
        for part in self._of(Part):
            found |= part.prepare(self.classifier, images)
        return found

    def use(self, knowledge: dict[str, Tensor]) -> None:
        """Take what ``prepare`` returned, now or in the run that a checkpoint continues."""
        self.knowledge = knowledge
        for part in self._of(Part):
            part.use(knowledge)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a training step (0-dim) and the logits ``[B, num_classes]``.

        The mean of the ranks' losses is the loss of their joined batch.
        """
        added: list[Tensor] = []
        with inputs_of(self.head) as features:
            logits = self._base(self._watched(added), batch, added)
        added += [penalty(features[-1]) for penalty in self._of(Penalty)]
        return sum(added, self.cross_entropy(logits, batch.labels)), logits

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch, whose samples count by their class's weight."""
        if self.class_weights is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, self.class_weights, reduction="sum") / len(labels)

    def _of(self, kind: type[P]) -> list[P]:
        return [part for part in self.parts.values() if isinstance(part, kind)]

    @property
    def _base(self) -> "Plain":
        return self._of(Plain)[0]

    def _watched(self, added: list[Tensor]) -> Classify:
        """The classifier, with delta's distance added where delta watches it."""
        delta = next(iter(self._of(Delta)), None)
        if delta is None:
            return self.classifier

        def classify(images: Tensor) -> Any:
            output, distance = delta(images)
            added.append(distance)
            return output

        return classify


class Part(nn.Module):
    """What one method does beyond plain fine-tuning.

    ``trade_off`` is the weight of what it adds to the cross-entropy.
    """

    def __init__(self, trade_off: float = 0.0) -> None:
        super().__init__()
        self.trade_off = trade_off

    @staticmethod
    def check(network: Network) -> None:
        """Raise UsageError where the network lacks what the method needs."""

    def change(self, network: Network) -> None:
        """Change the network before the classifier is built on it."""

    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        """Take note of the pretrained weights, or of what is penalised, in the classifier."""

    def prepare(self, classifier: Any, images: InOrder) -> dict[str, Tensor]:
        return {}

    def use(self, knowledge: dict[str, Tensor]) -> None:
        """Take what the parts found in ``prepare``."""


class Plain(Part):
    """Builds the classifier of plain fine-tuning, from which the other classifiers differ in few places."""

    views = 1

    def build(self, network: Network, num_classes: int) -> Any:
        return classifier.Classifier(network.backbone, num_classes, pool_layer=network.pool_layer)

    def hold(self, classifier: Any) -> None:
        """Put what is not trained back into evaluation mode."""

    def forward(self, classify: Classify, batch: Batch, added: list[Tensor]) -> Tensor:
        """The batch's logits ``[B, num_classes]``; what the loss gets besides cross-entropy goes into ``added``."""
        logits, _ = classify(batch.images)
        return logits


class Linear(Plain):
    def build(self, network: Network, num_classes: int) -> Any:
        network.backbone.requires_grad_(False)
        return super().build(network, num_classes)

    def hold(self, classifier: Any) -> None:
        classifier.backbone.eval()


class TwoHeads(Plain):
    """A method that keeps the pretrained head beside the new one."""

    classifier_type: Callable[..., nn.Module]

    @staticmethod
    def check(network: Network) -> None:
        if network.head is None:
            raise UsageError(
                f"{network.name} has no pretrained head, which co_tuning and lwf need: leave the two out or choose "
                "another --network"
            )

    def build(self, network: Network, num_classes: int) -> Any:
        return self.classifier_type(network.backbone, num_classes, network.head, pool_layer=network.pool_layer)

    def forward(self, classify: Classify, batch: Batch, added: list[Tensor]) -> Tensor:
        source_logits, logits = classify(batch.images)
        added.append(self.trade_off * self.source_term(source_logits, batch))
        return logits

    def source_term(self, source_logits: Tensor, batch: Batch) -> Tensor:
        """The pretrained head's loss."""
        raise NotImplementedError


class CoTuning(TwoHeads):
    classifier_type = co_tuning.Classifier
    relationship: Tensor

    def __init__(self, trade_off: float) -> None:
        super().__init__(trade_off)
        self.source_loss = co_tuning.CoTuningLoss()

    def prepare(self, classifier: Any, images: InOrder) -> dict[str, Tensor]:
        source = source_classifier(classifier)
        relationship = co_tuning.Relationship(images, source, images.device, progress=False)
        return {"relationship": torch.from_numpy(relationship.relationship).to(images.device)}

    def use(self, knowledge: dict[str, Tensor]) -> None:
        self.relationship = knowledge["relationship"]

    def source_term(self, source_logits: Tensor, batch: Batch) -> Tensor:
        return self.source_loss(source_logits, self.relationship[batch.labels])


class LWF(TwoHeads):
    classifier_type = lwf.Classifier
    answers: Tensor

    def __init__(self, trade_off: float, temperature: float) -> None:
        super().__init__(trade_off)
        self.source_loss = KnowledgeDistillationLoss(temperature)

    def build(self, network: Network, num_classes: int) -> Any:
        built = super().build(network, num_classes)
        built.freeze_head_source()
        return built

    def prepare(self, classifier: Any, images: InOrder) -> dict[str, Tensor]:
        source = source_classifier(classifier)
        answers = lwf.collect_pretrain_labels(images, source, images.device, progress=False)
        return {"answers": answers.to(images.device)}

    def use(self, knowledge: dict[str, Tensor]) -> None:
        self.answers = knowledge["answers"]

    def source_term(self, source_logits: Tensor, batch: Batch) -> Tensor:
        return self.source_loss(source_logits, self.answers[batch.indices])


class BiTuning(Plain):
    views = 2

    def __init__(self, trade_off: float, temperature: float) -> None:
        super().__init__(trade_off)
        self.temperature = temperature

    def build(self, network: Network, num_classes: int) -> Any:
        built = bi_tuning.Classifier(network.backbone, num_classes, pool_layer=network.pool_layer)
        keys = copy.deepcopy(built)
        self.encoders = bi_tuning.BiTuning(
            built, keys, num_classes, K=KEYS_PER_CLASS, m=KEY_MOMENTUM, T=self.temperature
        )
        return built

    def forward(self, classify: Classify, batch: Batch, added: list[Tensor]) -> Tensor:
        logits, *contrasts, targets = self.encoders(*batch.views, batch.labels)
        of_features, of_logits = (F.kl_div(contrast, targets, reduction="batchmean") for contrast in contrasts)
        added.append(self.trade_off * (of_features + of_logits))
        return logits


class Penalty(Part):
    """Adds a function of the weights, or of the features ``[B, F]`` that the new head takes."""

    def forward(self, features: Tensor) -> Tensor:
        raise NotImplementedError


class L2(Penalty):
    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        self.squared_norm = L2Regularization(classifier)

    def forward(self, features: Tensor) -> Tensor:
        return self.trade_off * self.squared_norm()


class L2SP(Penalty):
    def __init__(self, trade_off: float, head_decay: float) -> None:
        super().__init__(trade_off)
        self.head_decay = head_decay

    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        self.distance = SPRegularization(classifier.backbone, classifier.backbone)
        self.head_norm = L2Regularization(new_head(classifier))

    def forward(self, features: Tensor) -> Tensor:
        return self.trade_off * self.distance() + self.head_decay * self.head_norm()


class BSS(Penalty):
    def __init__(self, trade_off: float, k: float) -> None:
        super().__init__(trade_off)
        self.shrinkage = BatchSpectralShrinkage(k=int(k), all_ranks=True)

    def forward(self, features: Tensor) -> Tensor:
        return self.trade_off * self.shrinkage(features)


class Delta(Part):
    def __init__(self, trade_off: float, head_decay: float) -> None:
        super().__init__(trade_off)
        self.head_decay = head_decay

    @staticmethod
    def check(network: Network) -> None:
        if not network.delta_layers:
            raise UsageError(
                f"delta has no default of modules to compare in {network.name}: name some with --delta-layers, "
                "e.g. the last one of each stage, or leave delta and delta_attention out"
            )

    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        self.layers = [f"backbone.{name}" for name in network.delta_layers]
        self.source = frozen(classifier, self.layers, source_dtype)
        self.target_outputs = IntermediateLayerGetter(classifier, self.layers)
        self.distance: Callable[..., Tensor] = BehavioralRegularization()
        self.head_norm = L2Regularization(new_head(classifier))

    def forward(self, images: Tensor) -> tuple[Any, Tensor]:
        """What the classifier gives for the images, and what is added to the cross-entropy."""
        source = self.source(images)
        target, output = self.target_outputs(images)
        # the distance is summed over the batch, and its sum over the ranks is their mean times their number
        distance = parallel.world_size() * self.distance(source, target)
        return output, self.trade_off * distance + self.head_decay * self.head_norm()


class DeltaAttention(Delta):
    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        super().watch(classifier, network, source_dtype)
        self.channel_dim = network.channel_dim

    def prepare(self, classifier: Any, images: InOrder) -> dict[str, Tensor]:
        # How much a channel matters is what the loss of the new task says when it is missing, which takes a head.
        probe = copy.deepcopy(classifier).requires_grad_(False)
        fit_head(probe, images)
        return dict(
            channel_attention(
                probe, images, self.layers, device=images.device, progress=False, channel_dim=self.channel_dim
            )
        )

    def use(self, knowledge: dict[str, Tensor]) -> None:
        self.distance = AttentionBehavioralRegularization([knowledge[layer] for layer in self.layers], self.channel_dim)


class StochNorm(Part):
    @staticmethod
    def check(network: Network) -> None:
        if not any(is_converted(layer) for layer in network.backbone.modules()):
            raise UsageError(
                f"{network.name} has no batch norm, whose place stochnorm takes: leave stochnorm out or choose another "
                "--network"
            )

    def change(self, network: Network) -> None:
        fuse(convert_model(network.backbone, self.trade_off))


def check(name: str, network: Network) -> None:
    """Raise UsageError where the method's name is wrong, or the network lacks something that one of its parts needs."""
    for part in parse(name):
        PARTS[part].check(network)


def own_settings(part: str, own: Mapping[str, float]) -> dict[str, float]:
    """What a part takes besides its trade-off."""
    return {name: own.get(f"{part}.{name}", setting.default) for name, setting in RECIPES[part].own.items()}


def is_converted(layer: nn.Module) -> bool:
    """Whether ``convert_model`` makes a stochastic norm of this layer."""
    if not isinstance(layer, _BatchNorm):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that it leaves alone
        return isinstance(convert_model(copy.deepcopy(layer), 0.5), _StochNorm)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within it the module's inputs are appended to the list."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def new_head(classifier: Any) -> nn.Linear:
    """The head of the new task, of a classifier with one head or two."""
    return classifier.head_target if hasattr(classifier, "head_target") else classifier.head


def source_classifier(classifier: Any) -> nn.Module:
    """The network as it was pretrained, in a classifier with two heads."""
    return nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)


def fit_head(model: Any, images: InOrder) -> None:
    """Train the head alone, on the features that the rest of the model gives for the unchanged images."""
    pooled = nn.Sequential(model.backbone, model.pool_layer, model.bottleneck)
    features = lwf.collect_pretrain_labels(images, pooled, images.device, progress=False).to(images.device)
    labels = images.labels.to(features.device)
    head = new_head(model).requires_grad_()
    optimizer = torch.optim.Adam(head.parameters(), HEAD_LR)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    head.requires_grad_(False)


PARTS: dict[str, type[Part]] = {
    "plain": Plain,
    "linear": Linear,
    "l2": L2,
    "l2_sp": L2SP,
    "delta": Delta,
    "delta_attention": DeltaAttention,
    "bss": BSS,
    "stochnorm": StochNorm,
    "co_tuning": CoTuning,
    "lwf": LWF,
    "bi_tuning": BiTuning,
}
