import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from process_support import finish
from training_support import arguments, make_images, tiny_network

from talib_fast import __main__ as cli
from talib_fast import info, ops
from talib_fast.ops.library import Compiled
from talib_fast.training import data, networks, trainer
from talib_fast.training.methods import Method


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


@pytest.fixture(autouse=True)
def _keep_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_all_methods(run, tmp_path):
    code, out, _ = run("--seeds", "1", "--steps", "3")
    assert code == 0
    assert "3 classes, 4 labels per class" in out and "10 runs (10 methods, 1 seed) of 3 steps" in out
    assert "[10/10] bi_tuning, seed 0:" in out and "One seed: differences of a few points are noise." in out
    written = results(tmp_path)
    assert len(written["runs"]) == 10 and {run["seed"] for run in written["runs"]} == {0}
    assert (
        written["settings"]["trade_off lwf"] == cli.options.RECIPES["lwf"].trade_off
        and written["settings"]["steps"] == 3
    )
    assert written["command"].startswith("python -m talib_fast finetune --network tiny")
    assert written["torch"] == torch.__version__
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "table.md", "accuracy.png", "curves.png", "checkpoints"}
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
    for line in (tmp_path / "out" / "table.md").read_text().splitlines()[2:12]:
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
    assert code == 0 and "Finished already: 1." in out
    assert results(tmp_path)["runs"][0] == first[0] and len(results(tmp_path)["runs"]) == 2
    monkeypatch.setattr(Method, "forward", lambda *args: pytest.fail("trained again"))
    code, out, _ = run("--method", "plain,l2")
    assert code == 0 and "Everything is finished already" in out and "--restart" in out and "l2" in out


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
    assert err.endswith("talib_fast: interrupted; the same command continues where this one stopped\n")
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["l2-seed0.pt"]
    steps = []
    monkeypatch.setattr(Method, "forward", lambda self, batch: (steps.append(1), forward(self, batch))[1])
    code, out, _ = run("--method", "plain,l2", "--restart")
    assert code == 0 and "Finished already: 1." in out and len(steps) == 12 - 4


def test_other_settings_need_another_folder(run, tmp_path, images):
    run("--method", "plain")
    code, _, err = run("--method", "plain", "--steps", "5", "--trade-off", "l2=1")
    assert code == 1
    assert err == (
        f"talib_fast: {tmp_path / 'out'} holds results of other settings (steps was 12 and is now 5, "
        f"trade_off l2 was 0.005 and is now 1.0): choose another --out or remove {tmp_path / 'out'}\n"
    ).replace("0.005", str(results(tmp_path)["settings"]["trade_off l2"]))
    (images / "class0" / "0.png").rename(images / "class0" / "zero.png")
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
        r"^talib_fast: 1 of 3 runs failed: l2 with seed 0 diverged, its loss is (nan|inf) at step ", err, re.M
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
        (["--seeds", "0"], "argument --seeds: at least one seed is needed"),
        (["--seeds", "a,b"], "argument --seeds: a,b is neither a number of seeds nor a list like 0,3,7"),
        (["--seeds", ","], "argument --seeds: , is neither"),
        (["--method", "magic"], "there is no method magic: --method knows all, plain, l2, "),
        (["--method", ","], "--method is empty"),
        (["--trade-off", "plain=1"], "plain=1 should be METHOD=VALUE with a method other than plain"),
        (["--trade-off", "delta"], " is not a number of at least 0"),
        (["--trade-off", "stochnorm=2"], "stochnorm's p is a probability, 2 is greater than 1"),
        (["--augment", "rotate"], "argument --augment: invalid choice"),
        (["--device", "abacus"], "the device abacus cannot be used"),
        (["--device", "meta:x"], "the device meta:x cannot be used"),
        (["--network", "nothing"], "there is no network nothing"),
        (["--data", "nowhere"], "there is no folder nowhere"),
        (["--delta-layers", "block7"], "tiny has no module block7"),
        (["--labels-per-class", "8"], "class class0 has 8 images, but 8 for training and at least one"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option; see python -m talib_fast"),
    ],
)
def test_user_errors_are_one_sentence(run, words, message):
    code, _, err = run(*words)
    assert code == 1 and message in err
    assert err.startswith("talib_fast: ") and err.count("\n") == 1


def test_out_must_be_a_folder(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, err = run("--method", "plain")
    assert code == 1 and re.search(r"the folder .*out cannot be made \(.+\): choose another --out", err)


def test_full_disk_and_full_memory_are_told(run, monkeypatch):
    monkeypatch.setattr(Method, "forward", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    code, _, err = run("--method", "plain")
    assert code == 1 and "plain, seed 0 does not fit into the memory of cpu: lower --batch-size" in err
    monkeypatch.setattr("talib_fast.training.experiment.write_atomically", Mock(side_effect=OSError(28, "No space")))
    code, _, err = run("--method", "plain")
    assert (code, err) == (1, "talib_fast: [Errno 28] No space\n")


@pytest.mark.parametrize(("text", "seeds"), [("3", (0, 1, 2)), ("7,", (7,)), ("0,3,7", (0, 3, 7)), ("4, 4,2", (4, 2))])
def test_seeds(text, seeds):
    assert cli.options.seeds(text) == seeds


def test_options_reach_the_runs(run, tmp_path):
    code, out, _ = run(
        *("--method", "delta,stochnorm", "--trade-off", "delta=0.5", "--trade-off", "stochnorm=1", "--amp"),
        *("--threads", "2", "--augment", "shift_flip", "--delta-layers", "block1.0", "--test-images", "3"),
    )
    assert code == 0 and "(2 threads)" in out and "mixed precision" in out and "at most 3 others" in out
    settings = results(tmp_path)["settings"]
    assert settings["trade_off delta"] == 0.5 and settings["trade_off stochnorm"] == 1.0
    assert settings["delta_layers"] == ["block1.0"] and settings["augment"] == "shift_flip"


def test_sample_is_the_default(run, monkeypatch):
    monkeypatch.setattr("talib_fast.training.experiment.load_sample", lambda: pytest.fail("the sample was loaded"))
    with pytest.raises(pytest.fail.Exception, match="the sample was loaded"):
        run("--data", "sample")


def test_data_is_loaded_once_per_seed(run, monkeypatch):
    splits = []
    split = data.split
    monkeypatch.setattr(data, "split", lambda *args: (splits.append(1), split(*args))[1])
    run("--method", "plain,l2,bss", "--seeds", "2", "--steps", "2")
    assert len(splits) == 2


def test_help_names_every_method(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["finetune", "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for method in cli.options.RECIPES:
        assert f"\n  {method} " in out


def test_a_command_is_needed(capsys):
    assert cli.main([]) == 1
    assert "the following arguments are required: finetune|info" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch       {torch.__version__}" in out
    assert f"\nkernels     {ops.compiled().status}\n" in out and f"\nautograd    {ops.compiled_nodes().status}\n" in out
    for operation in ("stoch_norm", "squared_distance", "spectral_tail"):
        assert re.search(rf"^{operation} +cpu +(compiled|PyTorch) +\w", out, re.M)
        assert re.search(rf"^{operation} +cuda +(compiled|PyTorch) +\w", out, re.M)


def test_info_lists_gpus(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "A GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info.gpus() == ["cuda        no GPU is usable (torch is built with CUDA 13.0)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    line = "cuda:0      A GPU, 80 GiB, compute capability 9.0, CUDA 13.0"
    built_for = {"architectures": "7.5 9.0"}
    monkeypatch.setattr(ops.library, "_COMPILED", Compiled(True, "loaded", built_for))
    assert info.gpus() == [line]
    built_for["architectures"] = "7.5 8.0"
    assert info.gpus() == [
        line,
        "            the CUDA kernels are built for 7.5 8.0, you have 9.0: "
        "install talib_fast again with TORCH_CUDA_ARCH_LIST=9.0",
    ]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.gpus() == ["cuda        this torch is built without it"]


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ("7.5 8.0", (8, 0), True),
        ("7.5 8.0", (8, 9), True),  # machine code serves later GPUs of its major version
        ("8.6", (8, 0), False),
        ("7.5 8.0", (9, 0), False),
        ("7.5 8.0+PTX", (12, 0), True),
        ("7.5+PTX 9.0", (8, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("10.0", (12, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),  # such code serves its own GPUs only
        ("Hopper", (7, 5), True),  # not known
        ("", (9, 0), True),  # nothing is built
    ],
)
def test_info_tells_of_kernels_for_other_gpus(architectures, capability, fits):
    sentence = info.built_for_others(architectures, capability)
    gpu = "{}.{}".format(*capability)
    assert fits == (sentence == "")
    assert fits or sentence.startswith(f"the CUDA kernels are built for {architectures}, you have {gpu}: ")


def test_info_tells_of_the_build():
    build = {"compiler": "GCC 12.2.0", "torch": "2.13.0", "cpu": "stoch_norm", "cuda": "stoch_norm spectral_tail"}
    for_cpu = "  for cpu   stoch_norm, by GCC 12.2.0 with the headers of torch 2.13.0"
    for_cuda = "  for cuda  stoch_norm spectral_tail, by nvcc 13.0 for 8.0 9.0+PTX"
    assert info.built({**build, "nvcc": "13.0", "architectures": "8.0 9.0+PTX"}) == [for_cpu, for_cuda]
    assert info.built({**build, "cpu": "", "cuda": "", "without_cuda": "no CUDA toolkit is found"}) == [
        "  for cpu   no kernel, by GCC 12.2.0 with the headers of torch 2.13.0",
        "  for cuda  not built: no CUDA toolkit is found",
    ]
    assert info.built({}) == []


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
        for measured in ("seconds_per_step", "preparation_seconds", "peak_mib"):
            del whole[measured], resumed[measured]
        assert whole == resumed
