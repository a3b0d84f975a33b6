"""The plain fine-tuning classifier, and what all classifiers of this package share."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..checks import check_module, check_positive_integer, is_integer

__all__ = ["Classifier", "ImageClassifier"]

ParameterGroup = dict[str, Any]
Part = nn.Module | Callable[[Tensor], Tensor]


def check_part(part: Any, name: str) -> None:
    """Raise TypeError, with that name, unless ``part`` is a module or a function."""
    if isinstance(part, type) or not callable(part):
        check_module(part, name)


def check_linear(head: Part, name: str, in_features: int, out_features: int | None = None) -> None:
    """Raise TypeError if ``head`` is no part, ValueError if it states sizes that do not fit; it may state none."""
    check_part(head, name)
    for attribute, expected in (("in_features", in_features), ("out_features", out_features)):
        got = getattr(head, attribute, None)
        if expected is not None and is_integer(got) and got != expected:
            raise ValueError(f"expected {name} with {attribute} = {expected}, got {got}")


class _GlobalAveragePooling(nn.Sequential):
    """``[b, C, H, W]`` → ``[b, C]``; what has no such shape would be pooled over something else."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def _get_name(self) -> str:
        return "Sequential"

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or input.dim() != 4:
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(
                f"expected a backbone that gives maps [b, C, H, W], for the default pool_layer to average, got {got}: "
                "pass a pool_layer that turns them into [b, C], such as nn.Identity() for features [b, C]"
            )
        return super().forward(input)


class ClassifierBase(nn.Module):
    """Backbone, pooling and bottleneck, and the learning rates of their parameters."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        bottleneck: Part | None,
        bottleneck_dim: int | None,
        finetune: bool,
        pool_layer: Part | None,
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
            check_part(pool_layer, "pool_layer")
        if bottleneck is not None:
            check_part(bottleneck, "bottleneck")
            check_positive_integer(bottleneck_dim, "bottleneck_dim, the bottleneck's number of features,")
        self.backbone = backbone
        self.num_classes = num_classes
        self.pool_layer = _GlobalAveragePooling() if pool_layer is None else pool_layer
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

    def _groups(self, base_lr: float, parts: Iterable[tuple[Part, bool]]) -> list[ParameterGroup]:
        """One parameter group per part; the pretrained ones learn at a tenth of the rate when fine-tuning."""
        return [
            {
                "params": list(part.parameters()) if isinstance(part, nn.Module) else [],
                "lr": 0.1 * base_lr if pretrained and self.finetune else base_lr,
            }
            for part, pretrained in parts
        ]


class Classifier(ClassifierBase):
    """A backbone, pooling, an optional bottleneck and a head.

    All but the backbone may be functions; those have no parameters, and their parameter group is empty.

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
        return_feat: return the features in evaluation, too.

    Returns:
        In training ``(predictions [b, num_classes], features [b, features_dim])``, in evaluation the predictions.

    Raises:
        TypeError, ValueError: a part is missing or its sizes do not fit; or the backbone gives no maps, and there is no
            ``pool_layer`` for what it gives.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        bottleneck: Part | None = None,
        bottleneck_dim: int | None = -1,
        head: Part | None = None,
        finetune: bool = True,
        pool_layer: Part | None = None,
    ) -> None:
        super().__init__(backbone, num_classes, bottleneck, bottleneck_dim, finetune, pool_layer)
        self.head: nn.Module = nn.Linear(self.features_dim, num_classes) if head is None else head  # type: ignore[assignment]
        check_linear(self.head, "head", self.features_dim, num_classes)

    def forward(self, x: Tensor, return_feat: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        features = self.bottleneck(self.pooled(x))
        predictions = self.head(features)
        return (predictions, features) if self.training or return_feat else predictions

    def get_parameters(self, base_lr: float = 1.0) -> list[ParameterGroup]:
        """Parameter groups in the order backbone, bottleneck, head."""
        return self._groups(base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head, False)])


class ImageClassifier(Classifier):
    """:class:`Classifier` under the other name that it has upstream."""
