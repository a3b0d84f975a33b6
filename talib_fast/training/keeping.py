"""Keep the model of a finished run, and its prediction for every test image."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..inference import model
from ..inference.output import write_csv
from ..networks import Network, trained_state
from . import parallel
from .choosing import best_trial, right_or_wrong
from .recipes import canonical
from .results import Results, name_of, predictions_file
from .trainer import Run

CHECKED_IMAGES = 8  # a kept model must repeat the logits of so many images


def description(network: Network, classes: Sequence[str], versions: dict[str, str]) -> dict[str, Any]:
    """The entries of ``config.json`` that all models of one network and one set of classes share."""
    library, _, architecture = network.name.rpartition(":")
    return {
        "architecture": architecture,
        "library": library or "talib_fast",
        "network": network.name,
        "head": network.head_name,
        "num_classes": len(classes),
        "classes": list(classes),
        "preprocessing": asdict(network.preprocessing),
        "versions": versions,
    }


class Keeper:
    """Keeps the models of a command's runs: all of them, none, or the best so far.

    Trials choose the best method. Without trials, validation images choose the best run. Without either, one model of
    each method is kept. Test images never choose.

    Args:
        folder: the command's output folder.
        keep: ``best``, ``all`` or ``none``.
        network: the pretrained network.
        config: the entries of ``config.json`` that all models share.
        results: all runs and trials; :meth:`take` adds to them.
    """

    def __init__(self, folder: Path, keep: str, network: Network, config: dict[str, Any], results: Results) -> None:
        self.folder, self.keep, self.network, self.config, self.results = folder, keep, network, config, results

    def take(self, run: Run, result: dict[str, Any]) -> UserError | None:
        """Keep a finished run's predictions and model, and add its result.

        Returns:
            The error if the model cannot be kept, else None.
        """
        parallel.from_first(lambda: self._write_predictions(run, result))
        kept = [other for other in self.results.runs if other.get("model")]
        result |= {"model": None, "kept": self.keep}
        failure = None
        replaced = self._replaced(result, kept)
        if replaced is not None:
            result["model"] = f"models/{name_of(**result)}"
            failure = parallel.from_first(lambda: self._saved(run, result))
            if failure:
                result["model"], replaced = None, []
            for other in replaced:
                if other["kept"] == "best":  # a model that was kept by --keep all stays
                    other["model"] = None
        self.results.add(result)
        parallel.from_first(self._remove_replaced)
        return failure

    def _replaced(self, result: dict[str, Any], kept: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """The kept runs that this run replaces, all of them worse; None if this run is not to be kept."""
        if self.keep != "best":
            return [] if self.keep == "all" else None
        same = [other for other in kept if canonical(other["method"]) == canonical(result["method"])]
        trial = best_trial(self.results.trials)
        if trial is not None:
            return kept if canonical(trial["method"]) == canonical(result["method"]) and not same else None
        if "val_accuracy" in result:
            return kept if all(result["val_accuracy"] > other["val_accuracy"] for other in kept) else None
        return None if same else []

    def _remove_replaced(self) -> None:
        for run in self.results.runs:
            if not run.get("model"):
                shutil.rmtree(self.folder / "models" / name_of(**run), ignore_errors=True)

    def _saved(self, run: Run, result: dict[str, Any]) -> UserError | None:
        try:
            self._save(run, result)
        except UserError as error:  # the run's figures are valid without its model
            return error
        return None

    def _save(self, run: Run, result: dict[str, Any]) -> None:
        classifier = run.method.classifier
        state = trained_state(self.network, classifier.backbone, run.method.head)
        figures = {"test_accuracy": result["accuracy"], "test_images": result["test_images"]}
        if "val_accuracy" in result:
            figures |= {"val_accuracy": result["val_accuracy"], "val_images": result["val_images"]}
        figures["train_images"] = result["train_images"]
        config = {**self.config, "method": result["method"], "seed": result["seed"], "figures": figures}
        target = self.folder / result["model"]
        model.save(target, state, {**config, **self._choice(result)})
        self._check(run, target)

    def _choice(self, result: dict[str, Any]) -> dict[str, Any]:
        """The entries of ``config.json`` that say how a kept model was chosen."""
        if self.keep == "all":
            return {"chosen_by": "nothing: all models are kept"}
        trial = best_trial(self.results.trials)
        if trial is not None:
            images = len(right_or_wrong(trial))
            return {
                "chosen_by": f"the accuracy of its method's best trial, {trial['accuracy']:.1f} % of {images:,} images",
                "chosen": trial["settings"],
            }
        if "val_accuracy" in result:
            return {"chosen_by": "validation accuracy"}
        return {"chosen_by": "nothing: without validation images a model of each method is kept"}

    def _check(self, run: Run, target: Path) -> None:
        """Raise UserError, and remove the model, if its logits differ from the trained network's."""
        assert run.data.test is not None
        few = run.data.test.part(slice(CHECKED_IMAGES))
        kept = model.load(target, run.device)
        with torch.no_grad():
            right = torch.cat([run.method.classifier.eval()(images) for images, _ in few]).float()
            found = torch.cat([kept.module(images) for images, _ in few]).float()
        if not torch.allclose(right, found, rtol=1e-3, atol=1e-3 * float(right.abs().max())):
            shutil.rmtree(target)
            raise UserError(
                f"{self.network.name} cannot be kept, because its own architecture with the new weights gives other "
                "logits than the trained network: give --keep none, or choose another --network"
            )

    def _write_predictions(self, run: Run, result: dict[str, Any]) -> None:
        assert run.data.test is not None and run.record.answers is not None
        images, said = run.data.test.images, run.record.answers
        answers = zip(images.names, images.labels.tolist(), said.predicted, said.probabilities, strict=True)
        write_csv(
            predictions_file(self.folder, result),
            ("file", "class", "predicted", "probability"),
            (
                (name, images.classes[label], images.classes[predicted], f"{probability:.6g}")
                for name, label, predicted, probability in answers
            ),
        )
