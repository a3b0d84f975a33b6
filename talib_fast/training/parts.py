"""The parts of fine-tuning methods: each adds one method's term or classifier to plain fine-tuning."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

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

HEAD_STEPS, HEAD_LR = 200, 0.01  # to train the head that delta_attention needs on the pretrained network
KEYS_PER_CLASS = 8  # a longer queue would hold the same few labelled images several times
KEY_MOMENTUM = 0.999

Classify = Callable[[Tensor], Any]  # images → the classifier's output in training mode


class Part(nn.Module):
    """What one method adds to plain fine-tuning.

    ``trade_off`` is the weight of its term beside the cross-entropy.
    """

    def __init__(self, trade_off: float = 0.0) -> None:
        super().__init__()
        self.trade_off = trade_off

    @staticmethod
    def check(network: Network) -> None:
        """Raise UsageError if the network lacks something that the method needs."""

    def change(self, network: Network) -> None:
        """Change the network before the classifier is built on it."""

    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        """Store the pretrained weights that the part needs, or the modules whose outputs it compares."""

    def prepare(self, classifier: Any, images: InOrder) -> dict[str, Tensor]:
        """Compute what the part needs before the first step."""
        return {}

    def use(self, knowledge: dict[str, Tensor]) -> None:
        """Take what ``prepare`` of all parts returned."""


class Plain(Part):
    """Builds the classifier of plain fine-tuning; methods with another classifier derive from this class."""

    views = 1

    def build(self, network: Network, num_classes: int) -> Any:
        return classifier.Classifier(network.backbone, num_classes, pool_layer=network.pool_layer)

    def hold(self, classifier: Any) -> None:
        """Put the modules that are not trained back into evaluation mode."""

    def forward(self, classify: Classify, batch: Batch, added: list[Tensor]) -> Tensor:
        """The batch's logits ``[B, num_classes]``; further terms of the loss are appended to ``added``."""
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
                f"{network.name} has no pretrained head, which co_tuning and lwf need: leave both out, or choose "
                "another --network"
            )

    def build(self, network: Network, num_classes: int) -> Any:
        return self.classifier_type(network.backbone, num_classes, network.head, pool_layer=network.pool_layer)

    def forward(self, classify: Classify, batch: Batch, added: list[Tensor]) -> Tensor:
        source_logits, logits = classify(batch.images)
        added.append(self.trade_off * self.source_term(source_logits, batch))
        return logits

    def source_term(self, source_logits: Tensor, batch: Batch) -> Tensor:
        """The loss of the pretrained head."""
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
    """Adds a function of the weights, or of the new head's input features ``[B, F]``."""

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
                f"{network.name} has no modules that delta compares by default: name some with --delta-layers, e.g. "
                "the last one of each stage, or leave delta and delta_attention out"
            )

    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        self.layers = [f"backbone.{name}" for name in network.delta_layers]
        self.source = frozen(classifier, self.layers, source_dtype)
        self.target_outputs = IntermediateLayerGetter(classifier, self.layers)
        self.distance: Callable[..., Tensor] = BehavioralRegularization()
        self.head_norm = L2Regularization(new_head(classifier))

    def forward(self, images: Tensor) -> tuple[Any, Tensor]:
        """The classifier's output for the images, and the term to add to the cross-entropy."""
        source = self.source(images)
        target, output = self.target_outputs(images)
        # The distance is a sum over the batch. The ranks' losses are averaged, so each multiplies by their number.
        distance = parallel.world_size() * self.distance(source, target)
        return output, self.trade_off * distance + self.head_decay * self.head_norm()


class DeltaAttention(Delta):
    def watch(self, classifier: Any, network: Network, source_dtype: torch.dtype | None) -> None:
        super().watch(classifier, network, source_dtype)
        self.channel_dim = network.channel_dim

    def prepare(self, classifier: Any, images: InOrder) -> dict[str, Tensor]:
        # A channel's weight is the rise of the new task's loss without that channel. The loss needs a trained head.
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
                f"{network.name} has no batch norm that stochnorm could replace: leave stochnorm out, or choose "
                "another --network"
            )

    def change(self, network: Network) -> None:
        fuse(convert_model(network.backbone, self.trade_off))


def is_converted(layer: nn.Module) -> bool:
    """Whether ``convert_model`` turns this layer into a stochastic norm."""
    if not isinstance(layer, _BatchNorm):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convert_model warns of layers that it does not convert
        return isinstance(convert_model(copy.deepcopy(layer), 0.5), _StochNorm)


def new_head(classifier: Any) -> nn.Linear:
    """The head of the new task, in a classifier with one head or two."""
    return classifier.head_target if hasattr(classifier, "head_target") else classifier.head


def source_classifier(classifier: Any) -> nn.Module:
    """The pretrained network with its own head, in a classifier with two heads."""
    return nn.Sequential(classifier.backbone, classifier.pool_layer, classifier.head_source)


def fit_head(model: Any, images: InOrder) -> None:
    """Train the head alone, on the model's features of the images without augmentation."""
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
