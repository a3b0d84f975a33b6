"""One line for a script of the Transfer-Learning-Library: its names give what talib_fast has under them."""

from torch import nn

from ..checks import check_module
from .library import convert_model, patch_library, unpatch_library
from .model import patch_model

__all__ = ["convert_model", "patch", "unpatch"]


def patch(
    model: nn.Module | None = None,
    *,
    stochnorm: bool = True,
    delta: bool = True,
    bss: bool = True,
    co_tuning: bool = True,
    lwf: bool = True,
    bi_tuning: bool = True,
    knowledge_distillation: bool = True,
    classifier: bool = True,
) -> dict[str, str]:
    """Replace the Transfer-Learning-Library's fine-tuning methods by talib_fast's, or its layers in a model.

    ``patch()`` changes ``tllib`` and ``talib`` (not TA-Lib, which has the same name), as many as there are: in
    ``tllib.regularization``, ``tllib.normalization``, ``tllib.modules.classifier`` and ``talib.finetune``, whatever
    talib_fast has under the same name in the same module, and what their other modules have imported of it; classes
    of theirs that derive from a replaced one derive from talib_fast's. Their ``convert_model`` also calls
    :func:`~talib_fast.finetune.stochnorm.fuse_activations`. What can be imported is imported for that.
    What can't, as before a script's own ``sys.path.append``, is changed when it is imported, by an import hook which
    stays until :func:`unpatch`; so an empty result of the first call means that nothing is there yet. Nothing else is
    touched. Call it before a script's ``from tllib... import ...``: names that were bound earlier keep upstream's
    classes, and constructing one of those, or of subclasses defined earlier, may then fail.

    ``patch(model)`` turns upstream's StochNorm layers in a model that was built without ``patch()`` into talib_fast's,
    lets them take along the activations behind them, as :func:`~talib_fast.finetune.stochnorm.fuse_activations` does,
    and changes nothing else. They stay the objects they are, so that parameters, statistics, ``training``,
    ``requires_grad``, hooks, sharing and a running optimizer stay too; ``num_batches_tracked`` is added. p is what
    upstream's ``convert_model`` was asked for, which it had lost. It also completes the StochNorm layers of a pickled
    model that was loaded after ``patch()``. Subclasses are left alone, with a warning.

    Calling it again is harmless: what has been replaced is left as it is. If anything fails, nothing is changed.

    Args:
        model: a model to change instead of the library.
        stochnorm, delta, bss, co_tuning, lwf, bi_tuning, knowledge_distillation, classifier: False leaves that module
            as it is.

    Returns:
        What this call has replaced by what, by the dotted names of the library's attributes or of the model's layers.

    Raises:
        ImportError: one of the methods' modules is there, but fails to be imported.
        TypeError: ``model`` is no module, or a choice is not True or False.
        ValueError: methods are chosen for a model; or LWF without Co-Tuning, which derives from it; or a layer's p is
            not in [0, 1].
    """
    choices = {
        "stochnorm": stochnorm,
        "delta": delta,
        "bss": bss,
        "co_tuning": co_tuning,
        "lwf": lwf,
        "bi_tuning": bi_tuning,
        "knowledge_distillation": knowledge_distillation,
        "classifier": classifier,
    }
    for name, choice in choices.items():
        if not isinstance(choice, bool):
            raise TypeError(f"expected {name} to be True or False, got {choice!r}")
    methods = {name for name, choice in choices.items() if choice}
    if model is None:
        return patch_library(methods)
    check_module(model, "model")
    if len(methods) < len(choices):
        left_out = ", ".join(sorted(choices.keys() - methods))
        raise ValueError(f"expected a model or a choice of methods, got a model and {left_out} left out")
    return patch_model(model)


def unpatch() -> list[str]:
    """Give the Transfer-Learning-Library back what every ``patch()`` so far has replaced, and replace nothing more.

    Models stay as they are, those built since and those given to ``patch(model)``: their layers and losses go on
    working. Attributes that someone else has set since are left alone. Harmless when nothing is patched.

    Returns:
        The dotted names that were restored, whether replaced by ``patch()`` or as they were imported since; none if
        the library never came.
    """
    return unpatch_library()
