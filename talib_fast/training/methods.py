"""The ten fine-tuning methods: the classifier each one trains and the loss of one step.

A method is built on a pretrained network, learns in ``prepare`` what it has to know about it, and then turns every
batch into a loss and the logits of the new task.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from . import parallel
from .common import UserError
from .data import Batch, InOrder
from .networks import Network

HEAD_DECAY = 0.01  # L2 coefficient of the new head where the rest is tied to the pretrained network
HEAD_STEPS, HEAD_LR = 200, 0.01  # for the source network's own head of delta_attention
TEMPERATURE = 3.0
KEYS_PER_CLASS = 8  # a longer queue would hold the few labelled images again and again
KEY_MOMENTUM = 0.999


class Method(nn.Module):
    """Plain fine-tuning, from which the other methods differ in few places.

    Args:
        network: the method's own copy, which it trains.
        num_classes: number of classes of the new task.
        trade_off: weight of what the method adds to the cross-entropy.
        source_dtype: what delta's pretrained network computes in; None: as the network does.

    Raises:
        UserError: the network lacks something that the method needs.
    """

    views = 1  # how many augmentations of its images a batch must hold
    classifier: Any

    def __init__(
        self, network: Network, num_classes: int, trade_off: float, source_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.trade_off, self.source_dtype = trade_off, source_dtype
        self.knowledge: dict[str, Tensor] = {}
        self.classifier = self.build(network, num_classes)

    def build(self, network: Network, num_classes: int) -> Any:
        """The classifier to train; in evaluation mode it maps images to logits ``[B, num_classes]``."""
        return classifier.Classifier(network.backbone, num_classes, pool_layer=network.pool_layer)

    def prepare(self, images: InOrder) -> dict[str, Tensor]:
        """What the method must know before the first step, found with the network as it was pretrained."""
        return {}

    def use(self, knowledge: dict[str, Tensor]) -> None:
        """Take what ``prepare`` returned, now or in the run that a checkpoint continues."""
        self.knowledge = knowledge

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a training step (0-dim) and the logits ``[B, num_classes]``.

        The mean of the ranks' losses is the loss of their joined batch.
        """
        logits, features = self.classifier(batch.images)
        return F.cross_entropy(logits, batch.labels) + self.penalty(features), logits

    def penalty(self, features: Tensor) -> Tensor | float:
        """What is added to the cross-entropy, given the batch's features ``[B, F]``."""
        return 0.0


class L2(Method):
    def build(self, network: Network, num_classes: int) -> Any:
        built = super().build(network, num_classes)
        self.squared_norm = L2Regularization(built)
        return built

    def penalty(self, features: Tensor) -> Tensor:
        return self.trade_off * self.squared_norm()


class L2SP(Method):
    def build(self, network: Network, num_classes: int) -> Any:
        built = super().build(network, num_classes)
        self.distance = SPRegularization(built.backbone, built.backbone)
        self.head_norm = L2Regularization(built.head)
        return built

    def penalty(self, features: Tensor) -> Tensor:
        return self.trade_off * self.distance() + HEAD_DECAY * self.head_norm()


class Delta(Method):
    def build(self, network: Network, num_classes: int) -> Any:
        if not network.delta_layers:
            raise UserError(
                f"delta has no default of modules to compare in {network.name}: name some with --delta-layers, "
                "e.g. the last one of each stage, or leave delta and delta_attention out"
            )
        built = super().build(network, num_classes)
        self.layers = [f"backbone.{name}" for name in network.delta_layers]
        self.source = frozen(built, self.layers, self.source_dtype)
        self.target_outputs = IntermediateLayerGetter(built, self.layers)
        self.distance: Callable[..., Tensor] = BehavioralRegularization()
        self.head_norm = L2Regularization(built.head)
        return built

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        source = self.source(batch.images)
        target, (logits, _) = self.target_outputs(batch.images)
        # the distance is summed over the batch, and its sum over the ranks is their mean times their number
        distance = parallel.world_size() * self.distance(source, target)
        penalty = self.trade_off * distance + HEAD_DECAY * self.head_norm()
        return F.cross_entropy(logits, batch.labels) + penalty, logits


class DeltaAttention(Delta):
    def prepare(self, images: InOrder) -> dict[str, Tensor]:
        # How much a channel matters is what the loss of the new task says when it is missing, which takes a head.
        probe = copy.deepcopy(self.classifier).requires_grad_(False)
        fit_head(probe, images)
        return dict(channel_attention(probe, images, self.layers, device=images.device, progress=False))

    def use(self, knowledge: dict[str, Tensor]) -> None:
        super().use(knowledge)
        self.distance = AttentionBehavioralRegularization([knowledge[layer] for layer in self.layers])


class BSS(Method):
    def build(self, network: Network, num_classes: int) -> Any:
        self.shrinkage = BatchSpectralShrinkage(k=1, all_ranks=True)
        return super().build(network, num_classes)

    def penalty(self, features: Tensor) -> Tensor:
        return self.trade_off * self.shrinkage(features)


class StochNorm(Method):
    def build(self, network: Network, num_classes: int) -> Any:
        convert_model(network.backbone, self.trade_off)
        if not any(isinstance(module, _StochNorm) for module in network.backbone.modules()):
            raise UserError(
                f"{network.name} has no batch norm, whose place stochnorm takes: leave stochnorm out or choose another "
                "--network"
            )
        fuse(network.backbone)
        return super().build(network, num_classes)


class TwoHeads(Method):
    """A method that keeps the pretrained head beside the new one."""

    classifier_type: Callable[..., nn.Module]

    def build(self, network: Network, num_classes: int) -> Any:
        if network.head is None:
            raise UserError(
                f"{network.name} has no pretrained head, which co_tuning and lwf need: leave the two out or choose "
                "another --network"
            )
        return self.classifier_type(network.backbone, num_classes, network.head, pool_layer=network.pool_layer)

    def source_classifier(self) -> nn.Module:
        return nn.Sequential(self.classifier.backbone, self.classifier.pool_layer, self.classifier.head_source)


class CoTuning(TwoHeads):
    classifier_type = co_tuning.Classifier
    source_loss = co_tuning.CoTuningLoss()

    def prepare(self, images: InOrder) -> dict[str, Tensor]:
        relationship = co_tuning.Relationship(images, self.source_classifier(), images.device, progress=False)
        return {"relationship": torch.from_numpy(relationship.relationship).to(images.device)}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        source_logits, logits = self.classifier(batch.images)
        source_loss = self.source_loss(source_logits, self.knowledge["relationship"][batch.labels])
        return F.cross_entropy(logits, batch.labels) + self.trade_off * source_loss, logits


class LWF(TwoHeads):
    classifier_type = lwf.Classifier
    source_loss = KnowledgeDistillationLoss(TEMPERATURE)

    def build(self, network: Network, num_classes: int) -> Any:
        built = super().build(network, num_classes)
        built.freeze_head_source()
        return built

    def prepare(self, images: InOrder) -> dict[str, Tensor]:
        answers = lwf.collect_pretrain_labels(images, self.source_classifier(), images.device, progress=False)
        return {"answers": answers.to(images.device)}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        source_logits, logits = self.classifier(batch.images)
        source_loss = self.source_loss(source_logits, self.knowledge["answers"][batch.indices])
        return F.cross_entropy(logits, batch.labels) + self.trade_off * source_loss, logits


class BiTuning(Method):
    views = 2

    def build(self, network: Network, num_classes: int) -> Any:
        built = bi_tuning.Classifier(network.backbone, num_classes, pool_layer=network.pool_layer)
        self.encoders = bi_tuning.BiTuning(built, copy.deepcopy(built), num_classes, K=KEYS_PER_CLASS, m=KEY_MOMENTUM)
        return built

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, *contrasts, targets = self.encoders(*batch.views, batch.labels)
        contrast = sum(F.kl_div(log_probabilities, targets, reduction="batchmean") for log_probabilities in contrasts)
        return F.cross_entropy(logits, batch.labels) + self.trade_off * contrast, logits


def fit_head(model: Any, images: InOrder) -> None:
    """Train the head alone, on the features that the rest of the model gives for the unchanged images."""
    pooled = nn.Sequential(model.backbone, model.pool_layer, model.bottleneck)
    features = lwf.collect_pretrain_labels(images, pooled, images.device, progress=False).to(images.device)
    labels = images.labels.to(features.device)
    head = model.head.requires_grad_()
    optimizer = torch.optim.Adam(head.parameters(), HEAD_LR)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    head.requires_grad_(False)


METHODS: dict[str, type[Method]] = {
    "plain": Method,
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
