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
    """Raise TypeError if ``head`` is neither module nor function, and ValueError if its sizes do not fit.

    A head without ``in_features`` and ``out_features`` is accepted.
    """
    check_part(head, name)
    for attribute, expected in (("in_features", in_features), ("out_features", out_features)):
        got = getattr(head, attribute, None)
        if expected is not None and is_integer(got) and got != expected:
            raise ValueError(f"expected {name} with {attribute} = {expected}, got {got}")


class _GlobalAveragePooling(nn.Sequential):
    """``[b, C, H, W]`` → ``[b, C]``. It raises for other shapes, which it would pool over wrong dimensions."""

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
            has = f"out_features = {backbone.out_features!r}" if hasattr(backbone, "out_features") else "none"
            raise ValueError(
                "expected backbone with an integer out_features, its number of channels, "
                f"got {type(backbone).__name__} with {has}"
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
        """One parameter group per part. Pretrained parts get a tenth of the rate when fine-tuning."""
        return [
            {
                "params": list(part.parameters()) if isinstance(part, nn.Module) else [],
                "lr": 0.1 * base_lr if pretrained and self.finetune else base_lr,
            }
            for part, pretrained in parts
        ]


class Classifier(ClassifierBase):
    """A backbone, pooling, an optional bottleneck and a head.

    All parts but the backbone may be functions. They have no parameters, and their parameter group is empty.

    Args:
        backbone: a module with an attribute ``out_features``. Its output goes to ``pool_layer``.
        num_classes: number of target classes.
        bottleneck: applied after pooling. By default the identity.
        bottleneck_dim: the bottleneck's number of features. Required with ``bottleneck``.
        head: ``[b, features_dim]`` → ``[b, num_classes]``. By default a linear layer.
        finetune: let the backbone learn at a tenth of the base rate.
        pool_layer: turns the backbone's output into ``[b, out_features]``. By default the average over ``[b, C, H,
            W]``.

    Inputs:
        x: what the backbone takes.
        return_feat: return the features in evaluation, too.

    Returns:
        In training ``(predictions [b, num_classes], features [b, features_dim])``, in evaluation the predictions.

    Raises:
        TypeError: a part is neither a module nor a function.
        ValueError: the parts' sizes do not fit, or the backbone returns no maps and there is no ``pool_layer``.

    Example:

        >>> import torch
        >>> from torch import nn
        >>> from talib_fast.finetune.classifier import Classifier
        >>> backbone = nn.Conv2d(3, 8, 3)
        >>> backbone.out_features = 8
        >>> model = Classifier(backbone, num_classes=2)
        >>> predictions, features = model(torch.randn(4, 3, 6, 6))
        >>> predictions.shape, features.shape
        (torch.Size([4, 2]), torch.Size([4, 8]))
        >>> [group["lr"] for group in model.get_parameters(base_lr=1.0)]  # backbone, bottleneck, head
        [0.1, 1.0, 1.0]
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
        """Parameter groups for an optimizer, in the order backbone, bottleneck, head.

        Args:
            base_lr: the learning rate. With ``finetune``, the backbone gets a tenth of it.
        """
        return self._groups(base_lr, [(self.backbone, True), (self.bottleneck, False), (self.head, False)])


class ImageClassifier(Classifier):
    """:class:`~talib_fast.finetune.classifier.Classifier` under upstream's other name for it."""
