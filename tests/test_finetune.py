"""``finetune`` from end to end: what it accepts, keeps, refuses and says."""

import csv
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from network_support import library
from PIL import Image
from process_support import finish
from safetensors.torch import load_file
from torch import nn
from training_support import Tiny, arguments, make_images, tiny_network

import talib_fast
from talib_fast import __main__ as cli
from talib_fast import networks
from talib_fast.errors import UserError
from talib_fast.networks import Network
from talib_fast.networks.pretrained import WEIGHTS_PACKAGE
from talib_fast.training import keeping, options, trainer
from talib_fast.training.experiment import Experiment
from talib_fast.training.methods import Method
from talib_fast.training.recipes import RECIPES
from talib_fast.training.results import locked

pytestmark = pytest.mark.usefixtures("kept_signal_handlers")


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny_network)
    return make_images(tmp_path / "images")


@pytest.fixture
def run(images, tmp_path, capsys):
    """Run ``finetune`` on the small images; returns exit code, output and errors."""

    def run(*more):
        code = cli.main(arguments(images, tmp_path / "out", *more))
        return code, *capsys.readouterr()

    return run


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_all_methods(run, tmp_path):
    code, out, _ = run("--seeds", "1", "--steps", "3")
    assert code == 0
    assert "3 classes, 4 labels per class: 12 images for training, 12 for testing." in out
    assert "11 runs (11 methods, 1 seed) of 3 steps" in out
    assert "[11/11] bi_tuning, seed 0:" in out and "One seed: differences of a few points are noise." in out
    written = results(tmp_path)
    assert len(written["runs"]) == 11 and {run["seed"] for run in written["runs"]} == {0}
    assert written["settings"]["trade_off lwf"] == RECIPES["lwf"].trade_off and written["settings"]["steps"] == 3
    assert written["command"].startswith("python -m talib_fast finetune --network tiny")
    assert written["torch"] == torch.__version__
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("report.html", "results.json", "table.md", "accuracy.png", "curves.png"),
        *("checkpoints", "models", "predictions", ".lock"),
    }
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    for line in (tmp_path / "out" / "table.md").read_text().splitlines()[2:13]:
        assert line.split("|")[1].strip() in out


def test_several_seeds_show_their_spread(run, tmp_path):
    code, out, _ = run("--method", "plain,l2", "--seeds", "2", "--steps", "3")
    assert code == 0 and "One seed" not in out and out.count(" ± ") >= 2
    pairs = [(run["seed"], run["method"]) for run in results(tmp_path)["runs"]]
    assert pairs == [(0, "plain"), (0, "l2"), (1, "plain"), (1, "l2")]


def test_finished_runs_are_kept(run, tmp_path, monkeypatch):
    run("--method", "plain")
    first = results(tmp_path)["runs"]
    code, out, _ = run("--method", "plain,l2", "--seeds", "0,")
    assert code == 0 and "Finished already: 1 run." in out
    assert results(tmp_path)["runs"][0] == first[0] and len(results(tmp_path)["runs"]) == 2
    monkeypatch.setattr(Method, "forward", lambda *args: pytest.fail("trained again"))
    code, out, _ = run("--method", "plain,l2")
    assert code == 0 and "Nothing to train: " in out and "--restart" in out and "l2" in out


def test_restart_trains_finished_runs_again(run, tmp_path, monkeypatch):
    run("--method", "plain,l2")
    (tmp_path / "out" / "results.json").write_text(
        json.dumps({**results(tmp_path), "runs": [{**r, "accuracy": 1.5} for r in results(tmp_path)["runs"]]})
    )
    code, out, _ = run("--method", "plain", "--restart")
    assert code == 0 and "[1/1] plain, seed 0" in out
    by_method = {run["method"]: run["accuracy"] for run in results(tmp_path)["runs"]}
    assert by_method["plain"] != 1.5 and by_method["l2"] == 1.5


def test_restart_resumes_what_was_interrupted(run, tmp_path, monkeypatch):
    run("--method", "plain")
    forward = Method.forward
    with monkeypatch.context() as patch:
        calls = iter(range(100))

        def interrupted(self, batch):
            if next(calls) == 3:
                signal.raise_signal(signal.SIGINT)
            return forward(self, batch)

        patch.setattr(Method, "forward", interrupted)
        code, _, err = run("--method", "plain,l2", "--restart")
    assert code == 130
    assert err.endswith("talib_fast: interrupted; the same command continues where it stopped\n")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["l2-seed0.pt"]
    steps = []
    monkeypatch.setattr(Method, "forward", lambda self, batch: (steps.append(1), forward(self, batch))[1])
    code, out, _ = run("--method", "plain,l2", "--restart")
    assert code == 0 and "Finished already: 1 run." in out and len(steps) == 12 - 4


def test_other_settings_need_another_folder(run, tmp_path, images):
    run("--method", "plain")
    code, _, err = run("--method", "plain", "--steps", "5", "--trade-off", "l2=1")
    assert code == 1
    assert err == (
        f"talib_fast: {tmp_path / 'out'} holds results of other settings (steps was 12 and is now 5, "
        f"trade_off l2 was 0.005 and is now 1.0): choose another --out or remove {tmp_path / 'out'}\n"
    ).replace("0.005", str(results(tmp_path)["settings"]["trade_off l2"]))
    for path in images.rglob("*.png"):  # the same names, other content
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    assert "(images was " in run("--method", "plain")[2]


def test_broken_results_are_named(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{")
    code, _, err = run("--method", "plain")
    assert code == 1 and re.search(r"results\.json cannot be read as results: remove it or choose another --out", err)


def test_diverging_run_does_not_stop_the_others(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    code, out, err = run("--method", "plain,l2,stochnorm", "--trade-off", "l2=1e30", "--lr", "1")
    assert code == 1 and "[3/3] stochnorm, seed 0" in out
    assert re.search(
        r"^talib_fast: 1 of 3 runs failed: l2 with seed 0 diverged with a loss of (nan|inf) at step ", err, re.M
    )
    assert [run["method"] for run in results(tmp_path)["runs"]] == ["plain", "stochnorm"]
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    code, _, err = run("--method", "l2", "--trade-off", "l2=1e30", "--lr", "1")
    assert code == 1 and "1 of 1 run failed" in err


def test_nothing_but_diverging_runs_makes_no_table(run, tmp_path):
    code, out, _ = run("--method", "l2", "--trade-off", "l2=1e30", "--lr", "1")
    assert code == 1 and "accuracy, %" not in out
    assert not (tmp_path / "out" / "table.md").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "argument --steps: 0 is not a whole number of at least 1"),
        (["--steps", "ten"], "argument --steps: ten is not a whole number"),
        (["--batch-size", "1"], "argument --batch-size: 1 is not a whole number of at least 2"),
        (["--lr", "0"], "argument --lr: 0 is not greater than 0"),
        (["--lr", "nan"], "argument --lr: nan is not a number of at least 0"),
        (["--lr", "fast"], "argument --lr: fast is not a number of at least 0"),
        (["--seeds", "0"], "argument --seeds: 0 is less than one seed"),
        (["--seeds", "a,b"], "argument --seeds: a,b is neither a number of seeds nor a list like 0,3,7"),
        (["--seeds", ","], "argument --seeds: , is neither"),
        (["--method", "magic"], "there is no method magic: choose from all, plain, linear, l2, "),
        (["--method", ","], "--method is empty"),
        (["--trade-off", "plain=1"], "plain=1 should be METHOD=VALUE with a method other than plain"),
        (["--trade-off", "delta"], " is not a number of at least 0"),
        (["--trade-off", "stochnorm=2"], "2 is greater than 1, but stochnorm's trade-off p is a probability"),
        (["--set", "bss.k=0"], "argument --set: 0 is not a whole number of at least 1"),
        (["--set", "bss.k=1.5"], "argument --set: 1.5 is not a whole number of at least 1"),
        (["--set", "bss.K=1"], "argument --set: bss.K=1 should be METHOD.NAME=VALUE with one of l2_sp.head_decay, "),
        (["--set", "plain=1"], "argument --set: plain=1 should be METHOD.NAME=VALUE with one of "),
        (["--set", "bss.k"], "argument --set:  is not a whole number"),
        (["--set", "lwf.temperature=0"], "argument --set: 0 is not greater than 0"),
        (["--set", "bi_tuning.temperature=cold"], "argument --set: cold is not a number of at least 0"),
        (["--set", "delta.head_decay=-1"], "argument --set: -1 is not a number of at least 0"),
        (["--set", "bss.k=7"], "--set bss.k=7 is more than the number of singular values of a batch of 6: lower it"),
        (["--tune", "0"], "argument --tune: 0 is not a whole number of at least 1"),
        (["--tune", "few"], "argument --tune: few is not a whole number of at least 1"),
        (["--evaluations", "0"], "argument --evaluations: 0 is not a whole number of at least 1"),
        (["--folds", "1", "--tune", "2"], "argument --folds: 1 is not a whole number of at least 2"),
        (["--folds", "3"], "--folds has no effect without trials: add --tune N or --method auto, or leave it out"),
        (["--tune", "2", "--folds", "3", "--val-share", "0.5"], "are two ways to judge a trial: leave one of them out"),
        (["--tune", "2", "--val-share", "0"], "trials need images that judge them: leave out --val-share 0"),
        (["--method", "auto", "--val-share", "0"], "trials need images that judge them: leave out --val-share 0"),
        (["--tune", "2", "--labels-per-class", "1"], "raise --labels-per-class 1, or leave out --tune and auto"),
        (["--method", "auto", "--labels-per-class", "1"], "raise --labels-per-class 1, or leave out --tune and auto"),
        (["--method", " , "], "--method is empty: choose from all, auto, plain, linear, "),
        (["--method", "auto,magic"], "there is no method magic"),
        (["--augment", "rotate"], "argument --augment: invalid choice"),
        (["--device", "abacus"], "the device abacus cannot be used"),
        (["--device", "meta:x"], "the device meta:x cannot be used"),
        (["--network", "nothing"], "there is no network nothing"),
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--delta-layers", "block7"], "tiny has no module block7"),
        (["--data", "nowhere", "--test", "nowhere"], "there is no folder nowhere: --data needs a folder"),
        (["--test", "nowhere"], "there is no folder nowhere: --test needs a folder of images"),
        (["--val-share", "1"], "argument --val-share: 1 is not less than 1"),
        (["--steps", "3", "--epochs", "2"], "argument --epochs: not allowed with argument --steps"),
        (
            ["--method", "plain+bss"],
            "plain and bss cannot be combined, because every method includes plain fine-tuning",
        ),
        (["--method", "lwf+co_tuning"], "co_tuning and lwf cannot be combined, because each has a classifier"),
        (["--method", "bss+bss"], "bss+bss names bss twice: leave one out"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option; see python -m talib_fast"),
    ],
)
def test_user_errors_are_one_sentence(run, words, message):
    code, _, err = run(*words)
    assert code == 2 and message in err
    assert err.startswith("talib_fast: ") and err.count("\n") == 1


def test_out_must_be_a_folder(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, err = run("--method", "plain")
    assert code == 1 and re.search(r"the folder .*out cannot be created \(.+\): choose another --out", err)


def test_full_memory_is_told(run, monkeypatch):
    monkeypatch.setattr(Method, "forward", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    code, _, err = run("--method", "plain")
    assert code == 1 and "plain, seed 0 does not fit into the memory of cpu: lower --batch-size" in err


def test_out_lies_elsewhere_than_the_images(run, images):
    code, _, err = run("--out", str(images / "class0" / ".." / "out"))
    assert code == 2 and "so its plots would be read as images: choose another --out" in err
    assert not (images / "out").exists()


def test_too_few_images_are_told(run):
    code, _, err = run("--labels-per-class", "8")
    assert code == 1 and "class class0 has 8 images, but needs 8 for training and at least one for testing: " in err


@pytest.mark.parametrize(("text", "seeds"), [("3", (0, 1, 2)), ("7,", (7,)), ("0,3,7", (0, 3, 7)), ("4, 4,2", (4, 2))])
def test_seeds(text, seeds):
    assert options.seeds(text) == seeds


def test_methods():
    """auto and all are every method alone, and what else is named beside them; each once, whatever its order."""
    every = tuple(RECIPES)
    assert options.parse_methods("all") == (every, False) and options.parse_methods("auto") == (every, True)
    assert options.parse_methods("bss+delta, auto,plain,delta+bss,") == ((*every, "bss+delta"), True)
    assert options.parse_methods("all,stochnorm+bss") == ((*every, "stochnorm+bss"), False)
    assert options.parse_methods("bss,plain,stochnorm + bss,bss+stochnorm")[0] == ("bss", "plain", "stochnorm+bss")


def test_options_of_trials():
    chosen = options_of("--set", "bss.k=3", "--set", "lwf.temperature=2.5", "--set", "bss.k=2", "--trade-off", "l2=0")
    assert (chosen.own["bss.k"], chosen.own["lwf.temperature"], chosen.own["l2_sp.head_decay"]) == (2, 2.5, 0.01)
    assert isinstance(chosen.own["bss.k"], int) and chosen.trade_offs["l2"] == 0 and chosen.trade_offs["lwf"] == 4
    assert (chosen.tune, chosen.folds, chosen.evaluations, chosen.auto) == (None, None, 6, False)
    settings = chosen.settings()
    assert settings["bss.k"] == 2 and settings["candidates"] is None and settings["trade_off l2"] == 0
    assert not {"own", "trade_offs", "auto", "methods", "seeds"} & set(settings)
    assert options_of("--tune", "7", "--folds", "4").folds == 4 and options_of("--tune", "7").tune == 7
    auto = options_of("--method", "auto")
    assert auto.auto and auto.tune == 3 and auto.settings()["candidates"] == list(RECIPES)
    assert options_of("--method", "auto", "--tune", "1").tune == 1
    for words in ("--tune 2 --val-share 0.5", "--tune 2 --labels-per-class 2", "--labels-per-class 1 --val-share 0"):
        options_of(*words.split())  # are not refused
    assert options_of("--set", "bss.k=6", "--batch-size", "6").own["bss.k"] == 6


def test_more_folds_than_images_are_told(run):
    code, _, err = run("--method", "plain", "--tune", "1", "--folds", "13")
    assert code == 1 and "--folds 13 is more than the 12 labelled images in classes of two or more, but each" in err


def test_own_settings_and_evaluations_reach_the_runs(run, tmp_path):
    code, _, err = run("--method", "bss", "--set", "bss.k=3", "--evaluations", "3", "--steps", "6")
    assert code == 0, err
    found = results(tmp_path)
    assert found["settings"]["bss.k"] == 3 and found["settings"]["lwf.temperature"] == 3.0
    assert [step for step, _ in found["runs"][0]["accuracies"]] == [2, 4, 6]
    run("--method", "bss", "--evaluations", "3", "--steps", "6", "--out", str(tmp_path / "one"))
    one = json.loads((tmp_path / "one" / "results.json").read_text())["runs"][0]
    assert one["losses"][0] < found["runs"][0]["losses"][0]  # three singular values weigh more than one
    assert one["cross_entropies"][0] == found["runs"][0]["cross_entropies"][0]


def test_options_reach_the_runs(run, tmp_path):
    code, out, _ = run(
        *("--method", "delta,stochnorm", "--trade-off", "delta=0.5", "--trade-off", "stochnorm=1", "--amp"),
        *("--threads", "2", "--augment", "shift_flip", "--delta-layers", "block1.0", "--test-images", "3"),
    )
    assert code == 0 and "(2 threads)" in out and "mixed precision" in out and "3 for testing" in out
    settings = results(tmp_path)["settings"]
    assert settings["trade_off delta"] == 0.5 and settings["trade_off stochnorm"] == 1.0
    assert settings["delta_layers"] == ["block1.0"] and settings["augment"] == "shift_flip"


def test_sample_is_the_default(run, monkeypatch):
    monkeypatch.setattr("talib_fast.training.sources.load_sample", lambda: pytest.fail("the sample was loaded"))
    with pytest.raises(pytest.fail.Exception, match="the sample was loaded"):
        run("--data", "sample")


def test_data_is_loaded_once_per_seed(run, monkeypatch):
    loads = []
    load = Experiment.load
    monkeypatch.setattr(Experiment, "load", lambda *args: (loads.append(1), load(*args))[1])
    run("--method", "plain,l2,bss", "--seeds", "2", "--steps", "2")
    assert len(loads) == 2


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from training_support import hold_until_a_signal, register_tiny
from talib_fast.__main__ import main
register_tiny()
{more}
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_process_resumes_exactly(images, tmp_path, number):
    """A real Ctrl-C (or SIGTERM) in the middle of a run, then the same command again."""

    def start(out, more=""):
        script = SCRIPT.format(tests=str(Path(__file__).parent), more=more)
        command = arguments(images, tmp_path / out, "--method", "stochnorm", "--steps", "1200")
        return subprocess.Popen(
            [sys.executable, "-c", script, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start("out", "hold_until_a_signal('stochnorm', step=1000)")
    assert "step 200/1200" in process.stderr.readline()
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err and "interrupted; the same command continues" in err
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    done = len(torch.load(checkpoint, weights_only=True)["record"]["losses"])
    assert 200 <= done < 1200
    code, _, err = finish(start("out"))
    assert code == 0 and "step 200/" not in err and not checkpoint.exists()
    if number == signal.SIGINT:
        assert finish(start("whole"))[0] == 0
        whole = json.loads((tmp_path / "whole" / "results.json").read_text())["runs"][0]
        resumed = results(tmp_path)["runs"][0]
        for measured in ("seconds", "seconds_per_step", "preparation_seconds", "peak_mib"):
            del whole[measured], resumed[measured]
        assert whole == resumed


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


@pytest.fixture
def parts(images, tmp_path):
    """The images as train, val and test; class2 is not in val."""
    folder = tmp_path / "parts"
    for path in sorted(images.rglob("*.png")):
        label, number = path.parent.name, int(path.stem)
        part = "train" if number < 4 else "test" if number < 6 or label == "class2" else "valid"
        place(path, folder / part / label / path.name)
    return folder


def test_train_val_and_test_folders(run, parts, tmp_path):
    code, out, _ = run("--data", str(parts), "--method", "plain", "--labels-per-class", "all")
    assert code == 0 and "all labels per class: 12 images for training, 4 for validation, 8 for testing." in out
    (found,) = results(tmp_path)["runs"]
    assert (found["train_images"], found["val_images"], found["test_images"]) == (12, 4, 8)
    assert found["accuracies"][-1][1] == found["val_accuracy"]
    assert "Tested on 8 images." in (tmp_path / "out" / "table.md").read_text() and "Tested on 8 images." in out
    code, _, err = run("--data", str(parts), "--method", "plain", "--val-share", "0.5")
    assert code == 2 and "--val-share has no effect, because " in err


def test_a_test_folder_of_its_own(run, images, parts, tmp_path):
    code, out, _ = run("--test", str(parts / "valid"), "--method", "plain")
    assert code == 0 and "12 images for training, 4 for testing." in out
    assert "Files with the same content in two of training, validation and test: 4 (" in out
    (parts / "valid" / "class1").rename(parts / "valid" / "Class1")
    code, _, err = run("--test", str(parts / "valid"), "--method", "plain", "--out", str(tmp_path / "other"))
    assert code == 2 and "has a class Class1, which is not one of the 3 known classes" in err and "class1" in err


def test_all_labels_are_shared_out(images, tmp_path, capsys):
    words = arguments(images, tmp_path / "out", "--method", "plain", "--labels-per-class", "all", "--epochs", "2")
    place = words.index("--steps")
    del words[place : place + 2]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "all labels per class: 15 images for training, 3 for validation, 6 for testing." in out
    assert results(tmp_path)["settings"]["steps"] == 5  # two epochs of 15 images, 6 in a step


def test_what_is_no_good_image_is_listed(run, images, tmp_path):
    (images / "class0" / "notes.txt").write_text("")
    place(images / "class0" / "0.png", images / "class1" / "other.png")
    (images / "class2" / "cut.png").write_bytes((images / "class2" / "1.png").read_bytes()[:-60])
    (images / "class2" / "0.png").write_bytes(b"no image")
    code, _, err = run("--method", "plain")
    assert code == 1 and err.count("\n") == 1
    assert "2 images of 26 cannot be read, " in err and "class2/0.png (it has no known format), " in err
    assert "cut.png (" in err and err.endswith("or leave them out with --skip-damaged\n")
    code, out, _ = run("--method", "plain", "--skip-damaged")
    assert code == 0 and "12 images for training, 12 for testing." in out
    assert re.search(r"Files without an image suffix, or beside the class folders: 1 \(.*notes\.txt\)\.", out)
    assert "Images that cannot be read and are left out: 2 (" in out
    assert re.search(r"in different classes: 1 \(.*class0/0\.png = .*class1/other\.png\)\.", out)
    found = results(tmp_path)["data"]
    assert len(found["damaged"]) == 2 and len(found["contradicting"]) == len(found["ignored"]) == 1


def test_nested_folders_are_classes_by_their_paths(run, images, tmp_path):
    (images / "deep").mkdir()
    for name in ("class0", "class1"):
        (images / name).rename(images / "deep" / name)
    code, out, _ = run("--method", "plain")
    assert code == 0 and results(tmp_path)["data"]["classes"] == ["class2", "deep/class0", "deep/class1"]
    assert "Class names are whole paths, since class folders are nested: deep/class0, deep/class1." in out


def test_images_may_move_and_settings_of_speed_may_change(run, images, tmp_path):
    """What does not change the figures does not part them."""
    run("--method", "plain")
    shutil.move(images, tmp_path / "moved")
    code, out, _ = run("--method", "plain,l2", "--data", str(tmp_path / "moved"), "--threads", "2", "--workers", "1")
    assert code == 0 and "Finished already: 1 run." in out


def test_methods_that_cannot_run_are_refused_before_any_training(run, monkeypatch, tmp_path):
    class Bare(nn.Module):
        out_features = 4

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x)

    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda weights: Network("tiny", Bare(), None, None, ()))
    monkeypatch.setattr(Method, "forward", lambda *args: pytest.fail("trained"))
    code, _, err = run()
    assert code == 2 and err.count("\n") == 1
    for sentence in (
        "tiny has no batch norm",
        "tiny has no modules that delta compares by default",
        "tiny has no pretrained head",
    ):
        assert sentence in err
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_second_command_says_who_is_at_work(run, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        code, _, err = run("--method", "plain")
    assert code == 1 and re.search(
        r"out is in use by process \d+ on .+ since .+: wait until that process has ended, or choose", err
    )
    assert run("--method", "plain")[0] == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))
    for _ in range(2):
        with locked(tmp_path), pytest.raises(UserError, match=r"is in use by process \d+ on"), locked(tmp_path):
            pass


def models(tmp_path):
    return sorted(path.name for path in (tmp_path / "out" / "models").glob("*"))


def with_accuracies(monkeypatch, **accuracies):
    """Let the runs of methods come out with these accuracies on validation images, and with others on test images."""
    result = trainer.Record.result

    def told(self, data):
        found = result(self, data) | {"accuracy": 100 - accuracies[self.method]}
        return found | ({} if data.val is None else {"val_accuracy": accuracies[self.method]})

    monkeypatch.setattr(trainer.Record, "result", told)


def test_the_best_model_is_kept(run, tmp_path, monkeypatch):
    with_accuracies(monkeypatch, plain=50.0, l2=70.0, bss=60.0)
    short = ("--steps", "2", "--val-share", "0.5")
    code, out, _ = run("--method", "plain,l2,bss", *short)
    assert code == 0 and models(tmp_path) == ["l2-seed0"] and f"Kept: {tmp_path / 'out' / 'models' / 'l2-seed0'}" in out
    assert [run["model"] for run in results(tmp_path)["runs"]] == [None, "models/l2-seed0", None]
    config = json.loads((tmp_path / "out/models/l2-seed0/config.json").read_text())
    assert config["chosen_by"] == "validation accuracy" and config["figures"]["test_accuracy"] == 30.0
    run("--method", "l2", *short, "--restart")
    assert models(tmp_path) == ["l2-seed0"]
    with_accuracies(monkeypatch, plain=90.0, l2=1.0)
    run("--method", "plain,l2", *short, "--restart")
    assert models(tmp_path) == ["plain-seed0"]


def test_test_images_choose_nothing(run, tmp_path, monkeypatch):
    with_accuracies(monkeypatch, plain=50.0, l2=1.0)
    code, out, _ = run("--method", "plain,l2", "--steps", "2", "--seeds", "2")
    assert code == 0 and models(tmp_path) == ["l2-seed0", "plain-seed0"]
    assert "No best method was chosen: that needs --tune N, --method auto or images for validation." in out
    config = json.loads((tmp_path / "out/models/l2-seed0/config.json").read_text())
    assert config["chosen_by"] == "nothing: without validation images a model of each method is kept"
    with_accuracies(monkeypatch, plain=1.0)
    code, out, _ = run("--method", "plain", "--steps", "2", "--seeds", "2", "--out", str(tmp_path / "one"))
    assert code == 0 and "No best method" not in out
    assert [path.name for path in (tmp_path / "one" / "models").iterdir()] == ["plain-seed0"]


def test_all_models_or_none_are_kept(run, tmp_path, monkeypatch):
    with_accuracies(monkeypatch, plain=50.0, l2=40.0, bss=60.0, stochnorm=1.0)
    short = ("--steps", "2", "--val-share", "0.5")
    run("--method", "plain,l2", *short, "--keep", "all")
    assert models(tmp_path) == ["l2-seed0", "plain-seed0"]
    run("--method", "bss", *short)  # the best; what was kept on purpose stays
    assert models(tmp_path) == ["bss-seed0", "l2-seed0", "plain-seed0"]
    assert run("--method", "stochnorm", *short, "--keep", "none")[0] == 0
    assert models(tmp_path) == ["bss-seed0", "l2-seed0", "plain-seed0"]


def test_a_model_that_would_say_something_else_is_not_kept(run, tmp_path, monkeypatch):
    """Here the architecture that is made again has another activation than the one that was trained."""
    monkeypatch.setattr(networks.trained, "architecture", lambda name: nn.Sequential(Tiny(), nn.Tanh()))
    monkeypatch.setattr(keeping, "trained_state", lambda network, backbone, head: changed(backbone, head))

    def changed(backbone, head):
        state = {
            f"0.{name}": value.contiguous().clone(memory_format=torch.contiguous_format)
            for name, value in backbone.state_dict().items()
        }
        return state | {f"talib_fast_head.{name}": value.clone() for name, value in head.state_dict().items()}

    code, _, err = run("--method", "plain,l2", "--steps", "2")
    assert code == 1 and "2 of 2 runs failed: tiny cannot be kept, because its own architecture" in err
    assert len(results(tmp_path)["runs"]) == 2 and models(tmp_path) == []


def test_what_is_kept_of_a_run(run, images, parts, tmp_path):
    """The kept model says of every test image what the run said of it."""
    method = "co_tuning+bss+stochnorm"
    code, _, err = run("--data", str(parts), "--method", method, "--labels-per-class", "all", "--lr", "0.1")
    assert code == 0, err
    folder = tmp_path / "out" / "models" / f"{method}-seed0"
    config = json.loads((folder / "config.json").read_text())
    (found,) = results(tmp_path)["runs"]
    assert config["classes"] == ["class0", "class1", "class2"] and config["method"] == method and config["seed"] == 0
    assert config["chosen_by"] == "validation accuracy" and config["settings"] == results(tmp_path)["settings"]
    assert config["figures"] == {
        "test_accuracy": found["accuracy"],
        "test_images": 8,
        "val_accuracy": found["val_accuracy"],
        "val_images": 4,
        "train_images": 12,
    }
    assert config["preprocessing"]["size"] == 16 and config["versions"]["torch"] == torch.__version__
    head = {f"talib_fast_head.{name}" for name in ("weight", "bias")}  # the tiny network has no place for one
    assert set(load_file(folder / "model.safetensors")) == {*Tiny().state_dict(), *head}
    with (tmp_path / "out" / "predictions" / f"{method}-seed0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == sorted(str(path) for path in (parts / "test").rglob("*.png"))
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert found["accuracy"] == pytest.approx(100 * right / 8)
    predictions = talib_fast.load(folder).predict([row["file"] for row in rows])
    assert [prediction.label for prediction in predictions] == [row["predicted"] for row in rows]
    for prediction, row in zip(predictions, rows, strict=True):
        assert prediction.probability == pytest.approx(float(row["probability"]), abs=1e-3)


def test_the_other_commands_take_what_is_kept(run, parts, tmp_path, capsys):
    assert run("--data", str(parts), "--method", "plain", "--labels-per-class", "all", "--lr", "0.1")[0] == 0
    out = str(tmp_path / "out")
    assert cli.main(["evaluate", out, str(parts), "--out", str(tmp_path / "evaluation")]) == 0
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert found["images"] == 8 and found["accuracy_percent"] == pytest.approx(results(tmp_path)["runs"][0]["accuracy"])
    capsys.readouterr()
    image = str(next(parts.rglob("*.png")))
    assert cli.main(["predict", out, image, "--top", "2"]) == 0
    assert image in capsys.readouterr().out
    assert cli.main(["export", out, str(tmp_path / "model.pt2")]) == 0 and (tmp_path / "model.pt2").exists()
    for words in (["predict", "nowhere", image], ["predict", out, "nowhere"], ["export", out, "model.h5"]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("talib_fast: ") and err.count("\n") == 1


PHOTOGRAPHS = os.environ.get("TALIB_FAST_PHOTOGRAPHS")


@pytest.mark.skipif(not PHOTOGRAPHS, reason="TALIB_FAST_PHOTOGRAPHS names no folder of photographs, in train and test")
@pytest.mark.skipif(find_spec(WEIGHTS_PACKAGE) is None, reason=f"{WEIGHTS_PACKAGE} is not installed")
def test_photographs(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["finetune", "--data", PHOTOGRAPHS, "--out", str(out), "--method", "linear,stochnorm+bss", "--keep", "all"]
    assert cli.main([*words, "--image-size", "96", "--labels-per-class", "4", "--epochs", "3", "--lr", "0.01"]) == 0
    capsys.readouterr()
    for found in results(tmp_path)["runs"]:
        folder = out / found["model"]
        chance = 100 / len(talib_fast.load(folder).classes)
        assert found["accuracy"] > 3 * chance
        assert cli.main(["evaluate", str(folder), PHOTOGRAPHS, "--out", str(tmp_path / "evaluation")]) == 0
        evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
        assert evaluation["images"] == found["test_images"]
        assert evaluation["accuracy_percent"] == pytest.approx(
            found["accuracy"], abs=0.5
        )  # of other batches, by rounding


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "torchvision:mobilenet_v2", "mobilenet_v2"])
def test_plain_libraries_load_what_is_kept(images, tmp_path, capsys, name):
    """Strictly, into a network of their own with as many classes, and it says the same."""
    timm, torchvision = library("timm"), library("torchvision")
    kind = name.partition(":")[2] or name
    if name.startswith("timm"):
        whole, plain = timm.create_model(kind), timm.create_model(kind, num_classes=3)
    else:
        whole, plain = torchvision.models.mobilenet_v2(), torchvision.models.mobilenet_v2(num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    words = ("--network", name, "--weights", str(tmp_path / "weights.pth"), "--method", "stochnorm+bss")
    more = ("--image-size", "32", "--steps", "2", "--augment", "standard", "--optimizer", "adamw")
    assert cli.main(arguments(images, tmp_path / "out", *words, *more)) == 0, capsys.readouterr().err
    folder = tmp_path / "out" / "models" / "stochnorm+bss-seed0"
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    kept = talib_fast.load(folder)
    batch = torch.stack([kept.prepare(path) for path in sorted(images.rglob("*.png"))])
    with torch.no_grad():
        expected = plain.eval()(kept.preprocessing.normalize(batch))
    torch.testing.assert_close(kept.logits(batch), expected, rtol=1e-4, atol=1e-4)


def test_the_networks_own_size_and_photographs_augmentation_are_the_default(images, tmp_path, monkeypatch):
    chosen = options_of("--data", str(images)).resolved(240, validates=False, tests=False)
    assert (chosen.image_size, chosen.augment, chosen.labels_per_class, chosen.val_share) == (
        240,
        "standard",
        "all",
        0.1,
    )
    assert chosen.with_steps(1000).steps == 417 and chosen.with_steps(10).steps == 120
    digits = options_of().resolved(64, validates=False, tests=False)
    assert digits.wanted_size == 64 and options_of("--data", str(images)).wanted_size is None
    assert (digits.augment, digits.labels_per_class, digits.val_share, digits.test_images) == ("shift", 5, 0.0, 1000)


def options_of(*words):
    return options.parse(cli.build_parser().parse_args(["finetune", *words]))


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from training_support import register_tiny
from talib_fast.__main__ import main
register_tiny()
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))  # of any file, as if the disk were full
sys.exit(main(sys.argv[1:]))
"""


def finetune_with_files_up_to(limit, images, out):
    """Exit code, output and errors of a process of its own, without what measures coverage, which writes files too."""
    script = FULL.format(tests=str(Path(__file__).parent), limit=limit)
    command = [sys.executable, "-c", script, *arguments(images, out, "--method", "plain,l2")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    pipe = subprocess.PIPE
    return finish(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ))


@pytest.mark.parametrize("limit", [100, 4_000, 60_000])
def test_a_full_disk_loses_nothing(images, tmp_path, limit):
    code, _, err = finetune_with_files_up_to(limit, images, tmp_path / "out")
    assert code == 1
    message = r"^talib_fast: \S+ cannot be written \(File too large\), what was finished before is kept: "
    assert re.search(message, err, re.M) and "Traceback" not in err, err
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text())
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lock"]
    done = len(results(tmp_path)["runs"]) if (tmp_path / "out" / "results.json").exists() else 0
    code, out, err = finetune_with_files_up_to(10**9, images, tmp_path / "out")
    assert code == 0, err
    assert len(results(tmp_path)["runs"]) == 2 and (not done or done == 2 or "Finished already: 1 run." in out)


def test_names_that_are_no_utf8(run, tmp_path):
    folder = bytes(tmp_path / "images")
    (tmp_path / "images" / "class0").rename((folder + b"/caf\xe9").decode("utf-8", "surrogateescape"))
    code, _, err = run("--method", "plain")
    assert code == 0, err
    assert results(tmp_path)["data"]["classes"] == ["caf\\xe9", "class1", "class2"]
    assert talib_fast.load(tmp_path / "out").classes == ("caf\\xe9", "class1", "class2")
