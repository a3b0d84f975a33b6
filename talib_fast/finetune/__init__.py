"""The fine-tuning methods, one module for each, under the names of the Transfer-Learning-Library."""

# The star imports and their order are upstream's: Bi-Tuning's gives this namespace its `Classifier`.
from . import classifier, knowledge_distillation, lwf
from .stochnorm import *
from .bss import *
from .co_tuning import *
from .delta import *
from .bi_tuning import *  # type: ignore[assignment]
from .knowledge_distillation import *

__all__ = ["bi_tuning", "bss", "classifier", "co_tuning", "delta", "knowledge_distillation", "lwf", "stochnorm"]
