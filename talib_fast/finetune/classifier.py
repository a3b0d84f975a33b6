"""The plain fine-tuning classifier, and what all classifiers of this package share."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..checks import check_module, check_positive_integer, is_integer

__all__ = ["Classifier"]

ParameterGroup = dict[str, Any]


def check_linear(head: nn.Module, name: str, in_features: int, out_features: int | None = None) -> None:
    """Raise TypeError if ``head`` is no module, ValueError if it states sizes that do not fit; it may state none."""
    check_module(head, name)
    for attribute, expected in (("in_features", in_features), ("out_features", out_features)):
        got = getattr(head, attribute, None)
        if expected is not None and is_integer(got) and got != expected:
            raise ValueError(f"expected {name} with {attribute} = {expected}, got {got}")


class ClassifierBase(nn.Module):
    """Backbone, pooling and bottleneck, and the learning rates of their parameters."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        bottleneck: nn.Module | None,
        bottleneck_dim: int | None,
        finetune: bool,
        pool_layer: nn.Module | None,
    ) -> None:
        super().__init__()
        check_module(backbone, "backbone")
        check_positive_integer(num_classes, "num_classes")
        if not is_integer(getattr(backbone, "out_features", None)):
            raise ValueError(
                "expected backbone with an integer out_features, its number of channels; "
                f"{type(backbone).__name__} has "
                f"{getattr(backbone, 'out_features', 'none')!r}"
            )
        if pool_layer is not None:
            check_module(pool_layer, "pool_layer")
        if bottleneck is not None:
            check_module(bottleneck, "bottleneck")
            check_positive_integer(bottleneck_dim, "bottleneck_dim, the bottleneck's number of features,")
        self.backbone = backbone
        self.num_classes = num_classes
        self.pool_layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if pool_layer is None else pool_layer
        self.bottleneck = nn.Identity() if bottleneck is None else bottleneck
        self._features_dim = int(backbone.out_features if bottleneck is None else bottleneck_dim)  # type: ignore[arg-type]
        self.finetune = finetune

    @property
    def features_dim(self) -> int:
        """Number of features after the bottleneck."""
        return self._features_dim

    def pooled(self, x: Tensor) -> Tensor:
        """The backbone's pooled features ``[b, out_features]``, before the bottleneck."""
        return self.pool_layer(self.backbone(x))

    def _groups(self, base_lr: float, modules: Iterable[tuple[nn.Module, bool]]) -> list[ParameterGroup]:
        """One parameter group per module; the pretrained ones learn at a tenth of the rate when fine-tuning."""
        return [
            {"params": list(module.parameters()), "lr": 0.1 * base_lr if pretrained and self.finetune else base_lr}
            for module, pretrained in modules
        ]


class Classifier(ClassifierBase):
    """A backbone, pooling, an optional bottleneck and a head.

    Args:
        backbone: has an attribute ``out_features``; maps inputs to what ``pool_layer`` pools.
        num_classes: number of target classes.
        bottleneck: applied after pooling; identity by default.
        bottleneck_dim: the bottleneck's number of features, needed with ``bottleneck``.
        head: ``[b, features_dim]`` → ``[b, num_classes]``; a linear layer by default.
        finetune: the backbone learns at a tenth of the base rate.
        pool_layer: global average pooling of ``[b, C, H, W]`` by default.

    Inputs:
        x: whatever the backbone takes.

    Returns:
        In training ``(predictions [b, num_classes], features [b, features_dim])``, in evaluation the predictions.

    Raises:
        TypeError, ValueError: a part is missing or its sizes do not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        bottleneck: nn.Module | None = None,
        bottleneck_dim: int | None = -1,
        head: nn.Module | None = None,
        finetune: bool = True,
        pool_layer: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, bottleneck, bottleneck_dim, finetune, pool_layer)
        self.head = nn.Linear(self.features_dim, num_classes) if head is None else head
        check_linear(self.head, "head", self.features_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.bottleneck(self.pooled(x))
        predictions = self.head(features)
        return (predictions, features) if self.training else predictions

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups in the order backbone, bottleneck, head."""
        return self._groups(base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head, False)])
