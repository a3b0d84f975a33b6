import contextlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import baselines
import bench_bi_tuning as bi_tuning
import bench_channel_attention as attention
import bench_co_tuning as co_tuning
import bench_host_overhead as overhead
import bench_spectral_tail as tail
import bench_squared_distance as distances
import bench_stoch_norm as bench
import build_parts
import check_library
import command
import harness
import numpy as np
import pytest
import report
import torch
from compiler_support import needs_compiler
from resnet import CHANNEL_LAYERS, ResNet50
from test_stoch_norm import inputs, oracle
from torch import nn

import talib_fast
from talib_fast.finetune.stochnorm import StochNorm2d
from talib_fast.ops.library import Compiled

pytestmark = pytest.mark.no_cover  # what is tested here is not of the package

ROOT = Path(__file__).parent.parent

FINETUNE_ONLY = ("filelock", "jinja2", "PIL", "matplotlib", "optuna", "scipy", "tqdm")


def test_kernels_are_measured_without_the_libraries_of_finetune():
    """As on a machine with a GPU that has torch, pytest and little else."""
    code = f"""
import sys
sys.path.insert(0, "benchmarks")
sys.modules.update(dict.fromkeys({FINETUNE_ONLY}))
import bench_bi_tuning, bench_channel_attention, bench_co_tuning, bench_host_overhead, bench_spectral_tail
import bench_squared_distance, bench_stoch_norm, check_library, compare, kernels, report
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def run(command, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "OUT"))}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**inherited, "PYTHONPATH": str(ROOT), **environment}
    )


def case(
    label="64@56", layout="contiguous", dtype="float32", shape=(48, 64, 56, 56), count=1, peak=1.0, block=bench.NORM,
    **times,
):  # fmt: skip
    """A measured case in which each candidate takes the given (forward, backward) seconds, in every round."""
    names = {
        "ours": bench.OURS, "batch_norm": bench.BATCH_NORM, "composition": bench.COMPOSITION,
        "in_pytorch": bench.IN_PYTORCH, "unfused": bench.UNFUSED, "clone": bench.CLONE, "copy": bench.COPY,
    }  # fmt: skip
    chosen = {"ours": (1, 2), "batch_norm": (3, 4), "composition": (10, 20), **times}
    chosen["in_pytorch" if block == bench.NORM else "unfused"] = (9, 18)
    chosen = {"clone": (1,), "copy": (1,), **chosen}
    samples = {
        names[name]: {part: [float(time)] * 3 for part, time in zip(("forward", "backward"), parts, strict=False)}
        for name, parts in chosen.items()
    }
    samples[bench.OURS]["batch_share"] = [0.5] * 3
    for measures in samples.values():
        measures["wall"] = [1.0] * 3
    return {
        "label": label, "parts": block.split(" + "),
        "shape": list(shape), "count": count, "layout": layout, "dtype": dtype, "passes_per_sample": 1,
        "samples": samples, "peak_bytes": {bench.OURS: int(peak * 10**8), bench.BATCH_NORM: 10**8},
    }  # fmt: skip


def block(label="64@56 + relu", **options):
    return case(label, block=bench.RELU, **options)


def rise_of_twice(device):
    """By how many bytes ``x * 2`` and its gradient raise memory, and the bytes of x."""
    (feed,) = harness.feeds(device, (8, 16, 64, 64), torch.float32, False, sets=1)
    twice = harness.Candidate("twice", lambda x: x * 2, ())
    harness.peak_rise(device, twice, feed)
    return harness.peak_rise(device, twice, feed), feed.nbytes


def results(*cases, device="cpu", on_chip=None):
    where = {
        "backend": "compiled", "device": "a processor", "cores": 2, "threads": 2, "commit": "0", "date": "today",
        "command": "python", "torch": "2", "python": "3",
    }  # fmt: skip
    settings = {"device": device, "on_chip_bytes": on_chip, "rounds": 3}
    return {"operation": "stoch_norm", "environment": where, "settings": settings, "cases": list(cases)}


class TestBaselines:
    @pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
    def test_the_composition_computes_what_the_oracle_does(self, p):
        args = inputs((3, 7, 4, 3))
        layer = baselines.UpstreamComposition(7, p=p, dtype=torch.float64)
        layer.load_state_dict(
            {key: args.get(key, torch.tensor(0)) for key in layer.state_dict()},
        )
        np.random.seed(1)
        args["mask"] = torch.from_numpy(np.random.binomial(n=1, p=p, size=7)).bool()
        np.random.seed(1)
        expected, mean, var = oracle(**args)
        torch.testing.assert_close(layer(args["input"]).detach(), expected)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (mean, var))

    def test_the_layer_in_pytorch_is_the_layer(self, device):
        x = torch.randn(4, 5, 3, 3, device=device)
        got = []
        for layer in (StochNorm2d(5), baselines.PyTorchStochNorm2d(5), baselines.RecordingStochNorm2d(5)):
            layer, leaf = layer.to(device), x.clone().requires_grad_()
            nn.init.constant_(layer.weight, 1.5)
            torch.manual_seed(3)
            output = layer(leaf)
            gradients = torch.autograd.grad((output**3).sum(), (leaf, layer.weight, layer.bias))
            got.append((output.detach(), *gradients, *layer.buffers()))
        torch.testing.assert_close(got[1], got[0])
        torch.testing.assert_close(got[2], got[0])

    def test_the_share_of_batch_channels_is_recorded(self):
        for p in (0.0, 1.0):
            layer = baselines.RecordingStochNorm2d(5, p=p)
            layer(torch.randn(2, 5, 3, 3))
            assert layer.batch_share() == p and not layer.states


class TestHarness:
    def test_rounds_rotate_and_no_sample_is_lost(self):
        calls = []

        def named(name):
            def forward(x):
                calls.append(name)
                return x * 2

            return harness.Candidate(name, forward, ())

        device = torch.device("cpu")
        fed = harness.feeds(device, (2, 3, 8, 8), torch.float32, channels_last=True, sets=3)
        (leaf,) = fed[0].leaves
        assert leaf.is_contiguous(memory_format=torch.channels_last) and leaf.requires_grad
        samples, repetitions = harness.interleaved(device, [named("a"), named("b"), named("c")], fed, rounds=4)
        assert {name: {part: len(figures) for part, figures in own.items()} for name, own in samples.items()} == {
            name: {"forward": 4, "backward": 4} for name in "abc"
        }
        assert "".join(calls[3::repetitions]) == "abc" + "bca" + "cab" + "abc"  # after one warm-up pass of each

    def test_a_gpu_is_timed_behind_a_head_start_and_by_the_host_s_clock(self, monkeypatch):
        log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                log.append("event")

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 5.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("spin"), raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        fed = harness.feeds(torch.device("cpu"), (2, 3, 8, 8), torch.float32, False, sets=2)
        fake = harness.Candidate("a", lambda x: log.append("work") or x * 2, (), lambda: {"drawn": 1.0})
        samples, repetitions = harness.interleaved(SimpleNamespace(type="cuda"), [fake], fed, rounds=2)
        assert samples["a"]["forward"] == samples["a"]["backward"] == [0.005 / repetitions] * 2
        assert len(samples["a"]["wall"]) == len(samples["a"]["drawn"]) == 2
        timed = ["spin", "event", *["work"] * repetitions, "event", "spin", "event", "event", *["work"] * repetitions]
        assert log[4 + 3 :] == timed * 2  # after finding out how fast the GPU spins and three warm-up passes

    def test_small_inputs_come_in_more_sets_than_a_cache_holds(self, monkeypatch):
        monkeypatch.setattr(harness, "last_cache_bytes", lambda device: 1000)
        sets = [len(harness.feeds(torch.device("cpu"), (n, 1, 5, 5), torch.float32, False)) for n in (1, 3, 100)]
        assert sets == [10, 4, 1]

    def test_gradients_take_the_dtype_of_the_output(self):
        (feed,) = harness.feeds(torch.device("cpu"), (2, 1, 3, 3), torch.bfloat16, False, sets=1)
        assert feed.grad_for(torch.empty(0, dtype=torch.bfloat16)) is feed.grad
        converted = feed.grad_for(torch.empty(0))
        assert converted.dtype == torch.float32 and feed.grad_for(torch.empty(0)) is converted

    def test_peak_memory_counts_outputs_and_gradients_alone(self, device):
        if device.type == "cuda":
            rise, map_bytes = rise_of_twice(device)
        else:  # what tests before this one freed may lie in this process, to be used again
            with harness.clean_process() as process:
                rise, map_bytes = process.submit(rise_of_twice, device).result()
        assert rise == pytest.approx(2 * map_bytes, rel=0.2)


class TestStatistics:
    def test_ratios_are_taken_round_by_round(self):
        made = {"samples": {"a": {"forward": [2.0, 8.0, 3.0]}, "b": {"forward": [1.0, 2.0, 1.0]}}}
        assert report.speedup(made, "a", "b", "forward") == report.Spread(3.0, 2.5, 3.5)
        assert str(report.Spread.of([2.0])) == "2.00 (2.00–2.00)"

    def test_both_adds_forward_and_backward(self):
        made = {"samples": {"a": {"forward": [1.0, 2.0], "backward": [10.0, 20.0]}}}
        assert report.seconds(made, "a", "both") == [11.0, 22.0]

    def test_the_network_counts_each_layer(self):
        joined = bench.network([case(ours=(1, 2)), case(ours=(10, 20), count=3)], "layers")
        assert report.seconds(joined, bench.OURS, "forward") == [31.0] * 3
        assert report.seconds(joined, bench.OURS, "both") == [93.0] * 3
        assert joined["label"] == "all 4 layers"

    def test_the_blocks_have_in_them_the_norms_that_nothing_follows(self):
        group = [case("256@56", count=4), case("64@56", count=6), block(ours=(10, 20), count=6)]
        assert report.seconds(bench.all_layers(group), bench.OURS, "both") == [30.0] * 3
        total = bench.all_blocks(group)
        assert total["label"] == "all 7 blocks"
        assert report.seconds(total, bench.OURS, "both") == [6 * 30.0 + 3] * 3
        assert report.seconds(total, bench.UNFUSED, "both") == [6 * 27.0 + 3] * 3
        assert bench.IN_PYTORCH not in total["samples"]

    def test_layers_are_those_of_resnet_50(self):
        with torch.device("meta"):
            model, x = ResNet50(), torch.empty(48, 3, 224, 224)
        found, numbers = Counter(), 0

        def count(name, output):
            nonlocal numbers
            numbers += output.numel()
            block = {"bn3": bench.ADD_RELU, "1": bench.NORM}.get(name.rpartition(".")[2], bench.RELU)
            found[(*output.shape[1:3], block)] += 1

        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda _, args, output, name=name: count(name, output))
        model(x)
        assert found == {
            (channels, size, block): number
            for channels, size, blocks in bench.LAYERS
            for block, number in blocks.items()
        }
        assert sum(found.values()) == 53 and round(4 * numbers / 1e9, 2) == 2.13

    @pytest.mark.parametrize("block", bench.BLOCKS)
    def test_all_candidates_of_a_block_compute_the_same(self, block, device, monkeypatch):
        monkeypatch.setattr(bench, "P", 1.0)  # no chance
        setting = bench.Setting(6, 5, 1, "channels_last", "float32", 3, device.type, block)
        (feed,) = setting.feeds(1)
        ours, *others = (one for one in bench.candidates(setting, feed) if one.parameters is not None)
        assert len(others) == 3 and len(feed.leaves) == 1 + (block == bench.ADD_RELU)
        expected = ours.forward(*feed.arguments)
        gradients = ours.backward(expected, feed)
        for other in others:
            output = other.forward(*feed.arguments)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(other.backward(output, feed), gradients)

    def test_floor_bytes_follow_the_masks_and_what_fits_on_chip(self):
        made = case(shape=(2, 4, 5, 5))
        n = 2 * 4 * 25 * 4
        assert bench.floor_bytes(made, "forward", None) == [2.5 * n] * 3
        assert bench.floor_bytes(made, "backward", None) == [4 * n] * 3
        assert bench.floor_bytes(made, "both", 200) == [(2 + 4) * n] * 3  # input fits, input and gradient don't
        assert bench.floor_bytes(made, "both", 400) == [(2 + 3) * n] * 3
        made["samples"][bench.OURS]["batch_share"] = [0.0, 1.0, 0.25]
        assert bench.floor_bytes(made, "forward", None) == [2 * n, 3 * n, 2.25 * n]
        assert bench.floor_bytes(made | {"parts": ["norm", "relu"]}, "forward", None) == [2 * n, 3 * n, 2.25 * n]
        residual = made | {"parts": ["norm", "add", "relu"]}
        assert bench.floor_bytes(residual, "forward", None)[0] == (3 + 1 / 32) * n
        assert bench.floor_bytes(residual, "backward", None)[:2] == [(4 + 1 / 32) * n, (6 + 1 / 32) * n]

    def test_bandwidth_is_counted_over_the_copy_s(self):
        made = case(ours=(2.5, 4), copy=(2,))  # 6.5 N bytes in 6.5 s, a copy's 2 N in 2 s
        assert bench.bandwidth_share([made], "both", bench.COPY, None).median == pytest.approx(1)
        other = case(ours=(5, 8), copy=(2,), count=2)
        assert bench.bandwidth_share([made, other], "both", bench.COPY, None).median == pytest.approx(0.6)


class TestGoals:
    def verdicts(self, *cases, **options):
        return [goal.passed for goal in bench.goals(results(*cases, **options))]

    def test_cpu(self):
        fast = {"copy": (0.5,)}  # a copy so fast that the limits leave room for every goal
        assert self.verdicts(case(composition=(6, 12), batch_norm=(2, 4), **fast), block(**fast)) == [True] * 4
        assert self.verdicts(case(**fast), case(batch_norm=(2, 3.9), **fast), block(**fast)) == [
            True,
            False,
            True,
            True,
        ]
        assert self.verdicts(case(composition=(6, 11.9), **fast), block(**fast)) == [False, True, True, True]
        assert self.verdicts(case(peak=1.02, **fast), block(**fast)) == [True, True, True, False]
        assert self.verdicts(case(peak=1.009, **fast), block(**fast)) == [True] * 4
        residual = case("64@56 + add + relu", block=bench.ADD_RELU, peak=1.02, **fast)  # a bit for each of its elements
        assert self.verdicts(case(**fast), residual) == [True] * 4
        assert self.verdicts(case(**fast), block(batch_norm=(2, 3.9), **fast)) == [True, True, False, True]
        channels_last = {"layout": "channels_last", "batch_norm": (2, 3.1), **fast}
        assert self.verdicts(case(**channels_last), block(**channels_last)) == [True, False, True, True]

    def test_gpu(self):
        large = dict(shape=(48, 64, 112, 112), ours=(2.5, 4), copy=(1.7,), composition=(20, 20))
        # 8.5 s against BatchNorm's 7.5: 85 % of the copy's bandwidth
        fast = case(**large, batch_norm=(4, 4))
        assert self.verdicts(fast, device="cuda", on_chip=100) == [True, True, None, True, True]
        assert self.verdicts(fast, device="cuda", on_chip=10**7) == [True, True, False, False, True]
        slow = case(**{**large, "copy": (1.6,)}, batch_norm=(3, 4))
        assert self.verdicts(slow, device="cuda", on_chip=100) == [False, True, None, False, True]

    def test_the_limit_is_what_the_floor_s_bytes_take_at_a_copy_s_speed(self):
        made = case(batch_norm=(4, 6), copy=(2,))  # five maps' bytes a round, of which the copy moves two in 2 s
        assert bench.limit([made], bench.BATCH_NORM, on_chip=10**7).median == 2
        other = case(batch_norm=(1, 1), copy=(2,), count=3)
        assert bench.limit([made, other], bench.BATCH_NORM, on_chip=10**7).median == (10 + 3 * 2) / (5 + 3 * 5)

    def test_a_place_whose_limit_leaves_no_room_is_not_judged(self):
        figures, limits = {"a": 1.5, "b": 2.5, "c": 0.5}, {"a": 1.9, "b": 3.0}
        assert report.Goal("", 2, figures, limits=limits).judged == {"b": 2.5, "c": 0.5}
        assert report.Goal("", 2, figures, at_most=True, limits=limits).judged == {"a": 1.5, "c": 0.5}
        assert report.Goal("", 2, {"b": 2.5}, limits=limits).row() == ["", "reached", "1 of 1", "2.5", "3", "b"]
        beyond = report.Goal("", 2, {"a": 1.5}, limits=limits)
        assert beyond.passed is None and beyond.row() == ["", "beyond the limit", "–", "1.5", "1.9", "a"]

    def test_a_verdict_names_the_worst_place(self):
        small = case(
            "2048@7", composition=(1, 2), copy=(3 / 21,)
        )  # 6.5 maps and their bits at two maps in a seventh of 1 s
        first, *_ = bench.goals(results(case(), small, block()))
        text = "forward + backward at least 6× upstream composition at every shape"
        assert first.row() == [text, "missed", "1 of 2", "1", "6.46", "2048@7 contiguous float32"]
        assert report.Goal("a goal", 1).row() == ["a goal", "not measured", "–", "–", "–", "–"]


class TestReport:
    def test_nothing_names_folders_of_the_machine(self):
        cut = report.without_folders
        assert cut("_C.so does not load: /home/me/my-env/_C.so: bad") == "_C.so does not load: _C.so: bad"
        assert cut("python benchmarks/bench_x.py --out /tmp/a.b/c") == "python benchmarks/bench_x.py --out c"
        assert cut("python ~/x/y.py ../../up --out=/tmp/c/") == "python y.py ../../up --out=c/"
        assert cut("1.5/2 and/or") == "1.5/2 and/or"

    def test_environment(self, device):
        where = report.environment(device, "stoch_norm")
        assert {"commit", "command", "cores", "torch", "date", "cpu"} <= where.keys()
        assert str(ROOT) not in json.dumps(where)
        assert "GPU" in where["device"] or "driver" in where or device.type == "cpu"

    @pytest.mark.skipif(shutil.which("git") is None, reason="no git")
    def test_the_commit_is_dirty_when_other_files_than_results_differ_from_it(self, tmp_path, monkeypatch):
        package, results = tmp_path / "talib_fast" / "__init__.py", tmp_path / "benchmarks" / "results" / "table.md"
        for path in (package, results):
            path.parent.mkdir(parents=True)
            path.touch()
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        for words in (("init",), ("add", "."), (*identity, "commit", "-m", "all")):
            subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
        monkeypatch.setattr(talib_fast, "__file__", str(package))
        commit = report._commit()
        assert re.fullmatch("[0-9a-f]{7,}", commit)
        results.write_text("written by the benchmark before")
        (tmp_path / "notes.txt").touch()
        assert report._commit() == commit
        package.write_text("x = 1")
        assert report._commit() == f"{commit}-dirty"

    def test_the_commit_can_be_given_where_git_knows_none(self, monkeypatch):
        monkeypatch.setattr(report, "_said", lambda *command, **options: None)
        monkeypatch.setenv("COMMIT", "abc")
        assert report.environment(torch.device("cpu"), "stoch_norm")["commit"] == "abc"

    def test_warns_unless_a_compiled_kernel_served(self):
        assert report.backend_warning("stoch_norm", {"backend": "compiled", "backend_reason": ""}) is None
        warning = report.backend_warning("stoch_norm", {"backend": "PyTorch", "backend_reason": "none was built"})
        assert warning == "WARNING: stoch_norm was served by PyTorch, not by a compiled kernel: none was built."

    def test_what_is_measured_is_kept_when_the_next_case_fails(self, tmp_path):
        def cases():
            yield case()
            raise KeyboardInterrupt

        options = SimpleNamespace(from_json=None, out=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            report.run(options, lambda options: {**results(), "cases": cases()}, bench.goals, bench.publish)
        kept = json.loads((tmp_path / "results.json").read_text())
        assert kept == json.loads(json.dumps(results(case()))) and "goals" not in kept
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

    def test_a_gpu_s_table_has_its_times(self):
        made = results(case(ours=(1e-6, 2e-6)), block(), device="cuda")
        header, row, *others = bench.table(made)
        assert dict(zip(header, row, strict=True))["backward, µs"] == "2.0"
        assert [line[0] for line in others] == ["all 1 layers", "64@56 + relu×1", "all 1 blocks"]
        assert all(len(line) == len(header) for line in others)


class TestCommand:
    def test_runs_end_to_end_and_keeps_raw_samples(self, tmp_path, capsys, device):
        dtypes = ["float32", "bfloat16"]
        chosen = ["--device", device.type, "--shapes", "2048@7", "--dtype", *dtypes]
        bench.main(["--quick", "--batch", "2", *chosen, "--out", str(tmp_path)])
        said = capsys.readouterr().out
        written = json.loads((tmp_path / "results.json").read_text())
        labels = ["2048@7", "2048@7 + add + relu"]
        places = [(layout, dtype) for dtype in dtypes for layout in command.LAYOUTS]
        if device.type == "cpu":
            places.remove(("contiguous", "bfloat16"))
        assert [(c["label"], c["layout"], c["dtype"]) for c in written["cases"]] == [
            (label, *place) for place in places for label in labels
        ]
        for measured in written["cases"]:
            own = {name: passes for name, passes in measured["samples"].items() if name in measured["peak_bytes"]}
            alone = measured["parts"] == [bench.NORM]
            assert set(own) == {
                bench.OURS, bench.BATCH_NORM, bench.COMPOSITION, bench.IN_PYTORCH if alone else bench.UNFUSED
            }  # fmt: skip
            assert all(len(passes["forward"]) == len(passes["backward"]) == 3 for passes in own.values())
            assert all(min(passes["forward"]) > 0 for passes in own.values())
            assert min(measured["peak_bytes"].values()) >= 0
            assert all(0 <= share <= 1 for share in measured["samples"][bench.OURS]["batch_share"])
        assert {"2048@7×4", "2048@7 + add + relu×3", "all 4 layers", "all 4 blocks"} <= set(
            said.replace("\n", "  ").split("  ")
        )
        assert "at least 2× nn.BatchNorm2d at every shape" in said
        table = (tmp_path / "table.md").read_text()
        cases, _, rest = table.partition("\n\n")
        assert sum(line.startswith("| ") for line in cases.splitlines()) == 1 + 4 * len(places)
        assert "| goal | outcome |" in rest
        assert str(tmp_path) not in json.dumps(written) + table

    def test_table_and_plot_come_again_from_the_json(self, tmp_path):
        report.write_json(
            results(case(), block(), case(layout="channels_last"), block(layout="channels_last")), tmp_path
        )
        bench.main(["--from-json", str(tmp_path)])
        assert (tmp_path / "table.md").read_text().startswith("| C@H×layers |")
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "folder"),
        [
            ([], command.RESULTS),
            (["--quick"], command.QUICK_RESULTS),
            (["--shapes", "64@56"], command.QUICK_RESULTS),
            (["--batch", "8"], command.QUICK_RESULTS),
            (["--layouts", "contiguous"], command.QUICK_RESULTS),
            (["--dtype", "bfloat16"], command.QUICK_RESULTS),
        ],
    )
    def test_only_a_full_run_takes_the_place_of_the_results(self, arguments, folder):
        assert bench.parse(arguments).out == folder / "cpu" / "stoch_norm"

    @pytest.mark.parametrize("arguments", [["--batch", "1"], ["--rounds", "-1"], ["--shapes", "1@1"]])
    def test_bad_arguments_are_errors(self, arguments):
        with pytest.raises(SystemExit):
            bench.parse(arguments)

    def test_no_gpu_is_an_error(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            bench.main(["--device", "cuda"])
        assert "there is no GPU that this torch can use" in capsys.readouterr().err

    def test_pytest_benchmark_keeps_runs_and_compares_them(self, tmp_path):
        pytest.importorskip("pytest_benchmark")
        command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "--batch", "2"]
        command += ["-k", "spectral_tail-48x2048 or 2048x7", f"--benchmark-storage={tmp_path}"]
        done = run([*command, "--benchmark-autosave"])
        assert done.returncode == 0, done.stdout + done.stderr
        (kept,) = tmp_path.rglob("*.json")
        groups = [one["group"] for one in json.loads(kept.read_text())["benchmarks"]]
        layouts, parts = ("contiguous", "channels_last"), ("forward", "backward")
        assert sorted(set(groups)) == sorted(
            [f"stoch_norm-2048x7-norm-{layout}-{part}" for layout in layouts for part in parts]
            + [f"spectral_tail-48x2048-{part}" for part in parts]
        )
        assert len(groups) == 2 * 2 * 3 + 2 * 2  # ours, BatchNorm and upstream; ours and upstream
        # how fast a loaded machine is doesn't matter here
        compared = run([*command, "--benchmark-compare", "--benchmark-compare-fail=median:100000%"])
        assert compared.returncode == 0 and "(0001_" in compared.stdout, compared.stdout + compared.stderr

    def test_pytest_benchmark_refuses_a_gpu_that_is_not_there(self):
        pytest.importorskip("pytest_benchmark")
        done = run([sys.executable, "-m", "pytest", "benchmarks", "--device", "cuda"], CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 4 and "there is no GPU that this torch can use" in done.stderr


class TestSquaredDistance:
    def test_the_parameters_are_those_of_a_resnet50(self):
        shapes = distances.resnet50_parameters()
        assert len(shapes) == 159 and sum(map(math.prod, shapes)) == 23_508_032

    @pytest.mark.parametrize(
        "label", [distances.DELTA, distances.NARROW, distances.ATTENTION, distances.L2_SP, distances.L2]
    )
    def test_all_candidates_compute_the_same(self, label, device, monkeypatch):
        monkeypatch.setattr(distances, "MAPS", ((4, 6), (8, 3)))
        monkeypatch.setattr(distances, "resnet50_parameters", lambda: [(4, 3, 2, 2), (4,)])
        setting = distances.Setting(
            label, "channels_last" if label == distances.DELTA else "contiguous", "float32", 2, device.type
        )
        feed = setting.feeds()[0]
        ours, *others = (one for one in distances.candidates(setting, feed) if one.parameters is not None)
        expected = ours.forward(*feed.arguments)
        for other in others:
            output = other.forward(*feed.arguments)
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(other.backward(output, feed), ours.backward(ours.forward(*feed.arguments), feed))

    def test_floors_and_goals(self):
        def measured(label, ours):
            samples = {
                name: {"forward": [forward], "backward": [2 * forward]}
                for name, forward in ((distances.OURS, ours), (distances.UPSTREAM, 8.0), (distances.IN_PYTORCH, 4.0))
            }
            copies = {name: {"forward": [1.0]} for name in (distances.CLONE, distances.COPY)}
            return {
                "label": label, "layout": "contiguous", "dtype": "float32", "tensors": 4, "target_bytes": 10**8,
                "samples": {**samples, **copies}, "peak_bytes": {distances.OURS: 1, distances.UPSTREAM: 2},
            }  # fmt: skip

        case = measured(distances.DELTA, 1.0)
        assert [distances.floor_bytes(case, part) for part in distances.PARTS] == [2 * 10**8, 3 * 10**8, 5 * 10**8]
        assert distances.floor_bytes(measured(distances.NARROW, 1.0), "both") == 4 * 10**8
        assert distances.floor_bytes(measured(distances.L2, 1.0), "both") == 3 * 10**8
        assert distances.bandwidth_share(case, "forward").median == 1.0
        assert distances.limit(case, "backward").median == 16 / 1.5
        labels = (distances.DELTA, distances.ATTENTION, distances.L2_SP, distances.L2)
        for ours, passed in ((0.5, True), (8.0, False)):
            found = distances.goals(results(*(measured(label, ours) for label in labels)))
            assert [goal.passed for goal in found] == [passed] * 2
            gpu = distances.goals(results(*(measured(label, ours) for label in labels), device="cuda"))
            assert [goal.passed for goal in gpu] == [passed] * 4

    def test_runs_end_to_end_and_keeps_raw_samples(self, tmp_path, capsys, device, monkeypatch):
        monkeypatch.setattr(distances, "MAPS", ((4, 6), (8, 3)))
        monkeypatch.setattr(distances, "peak_bytes", lambda setting: {distances.OURS: 1, distances.UPSTREAM: 2})
        monkeypatch.setattr(distances.harness, "clean_process", lambda: ThreadPoolExecutor(1))
        distances.main(["--quick", "--device", device.type, "--dtype", "float32", "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        assert [case["label"] for case in written["cases"]].count(distances.DELTA) == 2
        for case in written["cases"]:
            assert all(len(own["forward"]) == 3 and min(own["forward"]) > 0 for own in case["samples"].values())
        assert "| DELTA with attention | channels_last |" in (tmp_path / "table.md").read_text()
        assert "L2: forward + backward at least" in capsys.readouterr().out

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        assert distances.parse([]).out == command.RESULTS / "cpu" / "squared_distance"
        assert distances.parse(["--layouts", "contiguous"]).out == command.QUICK_RESULTS / "cpu" / "squared_distance"


class TestChannelAttention:
    network = attention.Network("ResNet-50, 224²", 4, 32)

    @pytest.mark.parametrize("layer", CHANNEL_LAYERS)
    def test_all_ways_give_an_attention_and_the_exact_ones_the_same(self, layer):
        torch.manual_seed(0)
        model = ResNet50(4, 4).double().eval()
        x, labels = torch.randn(3, 3, 32, 32).double(), torch.tensor([0, 2, 3])
        got = {name: way(x, labels) for name, way in attention.ways(model, layer).items()}
        assert all(weights.shape == (attention.channels_of(model, layer),) for weights in got.values())
        torch.testing.assert_close(got[attention.EXACT].double(), got[attention.BRUTE_FORCE], rtol=1e-5, atol=1e-7)

    def test_operations(self):
        first, *_, last = attention.counted(self.network, torch.device("cpu"))
        for case in (first, last):
            assert case["flops"]["limit"] <= case["flops"]["exact"] < case["flops"]["brute force"]
            assert case["flops"]["taylor"] < case["flops"]["brute force"]
        assert (first["channels"], last["channels"]) == (16, 128)
        assert 1 < attention.fewer(first, "limit") < 2 and attention.fewer(last, "limit") > 20

    def test_rank_correlation(self):
        a = torch.tensor([0.1, 0.4, 0.2, 0.3])
        assert attention.rank_correlation(a, a.exp()) == pytest.approx(1)
        assert attention.rank_correlation(a, -a) == pytest.approx(-1)

    def test_goals_are_those_of_all_layers_together(self):
        def measured(exact, brute_force, flops, error, **more):
            samples = {"brute force": {"forward": [brute_force] * 3}, "exact": {"forward": [exact] * 3}}
            samples["taylor"] = {"forward": [0.1] * 3}
            return {
                "network": attention.FULL.label, "label": "layer", "channels": 4, "rank_correlation": 0.5,
                "flops": {"brute force": flops, "exact": 1, "limit": 1, "taylor": 1},
                "errors": {"brute force": 1.0, "exact": error}, "samples": samples,
            }  # fmt: skip

        def verdicts(*cases):
            return [goal.passed for goal in attention.goals(results(*cases))]

        assert verdicts(measured(1, 4, 4, 1), measured(1, 12, 16, 2)) == [True, True]
        assert verdicts(measured(1, 4, 3, 1), measured(1, 11, 16, 3)) == [False, False]

    def test_runs_end_to_end(self, tmp_path, capsys, monkeypatch):
        for name in ("FULL", "SMALL"):
            monkeypatch.setattr(attention, name, self.network)
        monkeypatch.setattr(attention, "TRAINING_STEPS", 2)
        monkeypatch.setattr(attention, "RANKED_BATCHES", 2)
        attention.main(["--batch", "2", "--rounds", "2", "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        assert [case["label"] for case in written["cases"]] == 2 * list(CHANNEL_LAYERS)
        for case in written["cases"][4:]:
            assert all(len(own["forward"]) == 2 and min(own["forward"]) > 0 for own in case["samples"].values())
            assert -1 <= case["rank_correlation"] <= 1
        assert "backend" not in written["environment"]
        pytest.importorskip("matplotlib")
        (tmp_path / "plot.png").unlink()
        attention.main(["--from-json", str(tmp_path)])
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert "at least 8× faster than brute force" in capsys.readouterr().out

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        assert attention.parse([]).out == command.RESULTS / "cpu" / "channel_attention"
        assert attention.parse(["--quick"]).out == command.QUICK_RESULTS / "cpu" / "channel_attention"


class TestSpectralTail:
    @pytest.mark.parametrize(("shape", "k"), [((6, 9), 1), ((6, 9), 6), ((9, 4), 2)])
    def test_all_candidates_compute_the_same(self, shape, k, device):
        feed = tail.Setting(*shape, k, "float32", device.type).feed()
        ours, *others = tail.candidates(k)
        expected = ours.forward(*feed.arguments)
        (gradient,) = ours.backward(expected, feed)
        for other in others:
            if other.name == tail.EIGVALSH and shape[0] > shape[1]:
                continue  # its Gram matrix is that of the rows
            output = other.forward(*feed.arguments)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other.backward(output, feed)[0], gradient, rtol=1e-3, atol=1e-4)

    def test_the_condition_number_is_as_asked(self):
        values = torch.linalg.svdvals(tail.conditioned(8, 20, 100.0, torch.device("cpu")).double())
        assert (values[0] / values[-1]).item() == pytest.approx(100, rel=1e-4)
        torch.testing.assert_close(
            values[1:] / values[:-1], torch.full((7,), 100 ** (-1 / 7)).double(), rtol=1e-4, atol=0
        )

    def test_goals(self):
        def measured(b, f, ours):
            times = {tail.OURS: ours, tail.UPSTREAM: 1e-3, tail.IN_PYTORCH: 1e-3, tail.EIGVALSH: 1e-3}
            samples = {name: {"forward": [time], "backward": [time]} for name, time in times.items()}
            return {"label": "", "b": b, "f": f, "k": 1, "dtype": "float32", "layout": "contiguous", "samples": samples}

        def verdicts(ours, error, device="cpu"):
            cases = [measured(b, f, ours) for b, f in ((48, 2048), (128, 2048), (48, 512), (256, 2048), (16, 2048))]
            errors = [{"condition": condition, "value": {tail.OURS: error}} for condition in tail.CONDITIONS]
            return [goal.passed for goal in tail.goals({**results(*cases, device=device), "errors": errors})]

        assert verdicts(1e-3 / 5, 1e-3) == [True] * 5
        assert verdicts(1e-3 / 3.5, 1e-2) == [False, False, True, False, True]
        assert verdicts(1e-3 / 20, 1e-4, "cuda") == [True] * 5
        assert verdicts(1e-3, 1e-4, "cuda") == [False] * 3 + [True] * 2

    def test_runs_end_to_end(self, tmp_path, capsys, device, monkeypatch):
        shapes = ((4, 9, 1), (8, 9, 1), (4, 12, 1), (4, 9, 3))
        for name, chosen in (
            ("SHAPES", shapes),
            ("OVER_B", shapes[:2]),
            ("OVER_F", shapes[::2]),
            ("OVER_K", shapes[::3]),
        ):
            monkeypatch.setattr(tail, name, chosen)
        tail.main(["--quick", "--device", device.type, "--dtype", "float32", "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        for case in written["cases"]:
            assert all(len(own["forward"]) == 3 and min(own["forward"]) > 0 for own in case["samples"].values())
        assert [row["condition"] for row in written["errors"]] == list(tail.CONDITIONS)
        said = (tmp_path / "table.md").read_text()
        assert "| 8×9, k=1 | float32 |" in said and "| 1e+06 |" in said
        assert "relative error of the value at most 0.001" in capsys.readouterr().out
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").exists()

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        assert tail.parse([]).out == command.RESULTS / "cpu" / "spectral_tail"
        assert tail.parse(["--dtype", "float32"]).out == command.QUICK_RESULTS / "cpu" / "spectral_tail"


class TestBiTuning:
    @pytest.mark.parametrize("sizes", [(5, 4, 3), (3, 7, 2), (1, 3, 1)])
    def test_upstreams_loop_computes_the_same(self, sizes, device):
        setting = bi_tuning.Setting(*sizes, device.type)
        feed = setting.feed()
        ours, upstream = (setting.model(kind) for kind in (bi_tuning.BiTuning, baselines.UpstreamBiTuning))
        for _ in range(3):
            expected = ours(*feed.arguments)
            for got, value in zip(upstream(*feed.arguments), expected, strict=True):
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(upstream.get_buffer(name), buffer)
        one, other, _ = setting.candidates()
        gradients = [candidate.backward(candidate.forward(*feed.arguments), feed) for candidate in (one, other)]
        for got, value in zip(*gradients, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4)

    def test_upstream_calls_about_as_many_operators_as_the_original(self):
        setting = bi_tuning.Setting(200, 48, 40, "cpu")
        model, feed = setting.model(baselines.UpstreamBiTuning), setting.feed()
        with harness.OperatorCalls() as called:
            model(*feed.arguments)
        assert len(called.names) == pytest.approx(3955, rel=0.03)
        outside = bi_tuning.calls(setting)
        assert outside[bi_tuning.UPSTREAM]["operators"] < len(called.names)
        assert outside[bi_tuning.OURS]["operators"] < 60 and outside[bi_tuning.OURS]["values asked for"] == 0

    def test_goals(self):
        def verdicts(ours, operators, asked, device="cpu"):
            times = {bi_tuning.OURS: ours, bi_tuning.UPSTREAM: 1.0, bi_tuning.LIMIT: 0.01}
            samples = {name: {"forward": [time], "backward": [time]} for name, time in times.items()}
            case = {"label": "", "classes": 200, "batch": 48, "K": 40, "samples": samples}
            calls = {bi_tuning.OURS: {"operators": operators, "values asked for": asked}}
            found = bi_tuning.goals({**results(case, device=device), "calls": calls})
            return [goal.passed for goal in found]

        assert verdicts(1 / 12.1, 59, 0) == [True, True]
        assert verdicts(1 / 11.9, 60, 1) == [False, False]
        assert verdicts(1 / 19, 59, 0, "cuda") == [False, True, True]
        assert verdicts(1 / 21, 59, 0, "cuda") == [True, True, True]

    def test_runs_end_to_end(self, tmp_path, capsys, device, monkeypatch):
        sizes = ((4, 3, 2), (5, 3, 2), (4, 2, 2), (4, 3, 1))
        for name, chosen in (
            ("SIZES", sizes), ("OVER_C", sizes[:2]), ("OVER_B", sizes[::2]), ("OVER_K", sizes[::3])
        ):  # fmt: skip
            monkeypatch.setattr(bi_tuning, name, chosen)
        bi_tuning.main(["--quick", "--device", device.type, "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        for case in written["cases"]:
            assert all(len(own["forward"]) == 3 and min(own["forward"]) > 0 for own in case["samples"].values())
        said = (tmp_path / "table.md").read_text()
        assert "| C=4, b=3, K=2 |" in said and f"{written['calls'][bi_tuning.OURS]['operators']} against" in said
        assert "no value asked for on the host" in capsys.readouterr().out
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        assert bi_tuning.parse([]).out == command.RESULTS / "cpu" / "bi_tuning"
        assert bi_tuning.parse(["--rounds", "2"]).out == command.QUICK_RESULTS / "cpu" / "bi_tuning"


class TestHostOverhead:
    def test_goals(self):
        def verdicts(what, ours, in_python=None, device="cpu"):
            measures = ("forward", "backward", "wall")
            times = {overhead.OURS: ours, overhead.BATCH_NORM: 1.0, overhead.COMPOSITION: 4.0}
            times |= {overhead.IN_PYTHON: in_python} if in_python else {}
            samples = {name: {measure: [time] for measure in measures} for name, time in times.items()}
            case = {"label": "", "what": what, "samples": samples}
            return [goal.passed for goal in overhead.goals(results(case, device=device))]

        assert verdicts(overhead.ALONE, 0.95) == verdicts(overhead.CHAIN, 0.9, device="cuda") == [True]
        assert verdicts(overhead.ALONE, 0.96, 1.15) == [False, True]
        assert verdicts(overhead.CHAIN, 0.95, 1.31) == [True, False]
        assert verdicts(overhead.WITH_ACTIVATION, 0.86, 9.0) == [False]

    def test_all_candidates_compute_what_their_names_say(self, device):
        x = torch.randn(6, 3, 4, 4, device=device)
        for what in (overhead.ALONE, *overhead.together()):
            outputs = {}
            for candidate in overhead.candidates(what, 3, device):
                torch.manual_seed(0)
                outputs[candidate.name] = candidate.forward(x)
            if overhead.IN_PYTHON in outputs:
                assert outputs[overhead.OURS].grad_fn.name() == "StochNormBackward"
                assert outputs[overhead.IN_PYTHON].grad_fn.name() == "_InPlaceBackward"
                torch.testing.assert_close(outputs[overhead.IN_PYTHON], outputs[overhead.OURS], rtol=0, atol=0)
            assert bool((outputs[overhead.BATCH_NORM] >= 0).all()) == (what == overhead.WITH_ACTIVATION)

    def test_runs_end_to_end(self, tmp_path, capsys, device):
        overhead.main(["--quick", "--device", device.type, "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        alone = [f"one layer, {shape}" for shape in ("2×4×2×2", "4×16×4×4", "8×64×4×4")]
        others = [f"{what}, 4×16×4×4" for what in overhead.together()]
        assert [case["label"] for case in written["cases"]] == alone + others
        for case in written["cases"]:
            assert all(len(own["forward"]) == 3 and min(own["forward"]) > 0 for own in case["samples"].values())
        assert "| one layer, 2×4×2×2 |" in (tmp_path / "table.md").read_text()
        assert "at most 0.95× BatchNorm" in capsys.readouterr().out
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        full, short = overhead.parse([]), overhead.parse(["--rounds", "2"])
        assert (full.out, full.rounds) == (command.RESULTS / "cpu" / "host_overhead", overhead.ROUNDS)
        assert (short.out, short.rounds) == (command.QUICK_RESULTS / "cpu" / "host_overhead", 2)
        assert overhead.parse(["--rounds", "2", "--out", str(command.RESULTS / "elsewhere")]).rounds == 2


class TestCoTuning:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        for name, size in (("SAMPLES", 60), ("SOURCE_CLASSES", 7), ("TARGET_CLASSES", 5), ("BATCH", 4)):
            monkeypatch.setattr(co_tuning, name, size)
        monkeypatch.setattr(co_tuning, "LOSS_SHAPES", ((4, 7), (3, 9)))

    def test_all_candidates_compute_the_same(self, device):
        for label, candidates, (feed,) in (*co_tuning.losses(device), *co_tuning.preparations(device)):
            outputs = []
            for candidate in candidates:
                output = candidate.forward(*feed.arguments)
                if candidate.parameters is not None:
                    outputs.append((output, *candidate.backward(output, feed)))
                else:
                    output = getattr(output, "relationship", output)
                    outputs.append((torch.as_tensor(output),))
            assert len(outputs) >= 2, label
            for other in outputs[1:]:
                torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-6)
        assert co_tuning.error(device) < 1e-6

    def test_goals(self):
        def measured(label, ours, **others):
            samples = {co_tuning.OURS: {"forward": [ours], "backward": [ours]}}
            return {"label": label, "samples": samples | {k: {"forward": [1], "backward": [1]} for k in others}}

        def verdicts(error, *times):
            loss = measured("a loss", times[0], **{co_tuning.UPSTREAM: 1, co_tuning.CROSS_ENTROPY: 1})
            remembered = measured(co_tuning.PRETRAIN_LABELS, times[1], **{co_tuning.UPSTREAM: 1})
            found = co_tuning.goals({**results(loss, remembered), "error": error})
            return [goal.passed for goal in found]

        assert verdicts(1e-7, 1.1, 2) == [True, True, True]
        assert verdicts(1e-5, 1.2, 1) == [False, False, False]

    def test_runs_end_to_end(self, tmp_path, capsys, device):
        co_tuning.main(["--quick", "--device", device.type, "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        for case in written["cases"]:
            assert all(len(own["forward"]) == 3 and min(own["forward"]) > 0 for own in case["samples"].values())
        assert "| Co-Tuning's loss, 4×7 |" in (tmp_path / "table.md").read_text()
        assert "no loss and no relationship slower" in capsys.readouterr().out
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        assert co_tuning.parse([]).out == command.RESULTS / "cpu" / "co_tuning"
        assert co_tuning.parse(["--quick"]).out == command.QUICK_RESULTS / "cpu" / "co_tuning"


class TestCheckLibrary:
    def fault(self, loaded=True, status="loaded", current=True, backend="compiled"):
        served = {"stoch_norm": ("compiled", "it is there"), "spectral_tail": (backend, "there is none")}
        return check_library.fault(Compiled(loaded, status), current, served)

    def test_what_serves_every_operation_has_none(self):
        assert self.fault() == ""

    def test_what_is_missing_is_said(self):
        assert self.fault(loaded=False, status="_C.so does not load: bad") == "_C.so does not load: bad"
        assert self.fault(current=False) == "it was built from other sources"
        assert self.fault(backend="PyTorch") == "spectral_tail is served by PyTorch: there is none"

    @needs_compiler
    def test_a_linked_library_knows_its_sources(self, tmp_path):
        (tmp_path / "csrc").mkdir()
        source = tmp_path / "csrc" / "a.cpp"
        source.write_text("int x;")
        symbol = build_parts.sources_symbol(tmp_path / "csrc")
        command = ["c++", "-shared", "-s", f"-Wl,--defsym={symbol}=0", source, "-o", tmp_path / "_C.abi3.so"]
        assert not check_library.is_of(tmp_path / "csrc", tmp_path)
        subprocess.run(command, check=True)
        assert check_library.is_of(tmp_path / "csrc", tmp_path)
        source.write_text("int y;")
        assert not check_library.is_of(tmp_path / "csrc", tmp_path)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu_is_one_sentence(self):
        with pytest.raises(SystemExit, match="there is no GPU that this torch can use"):
            check_library.main()


# stands in for python3 on a machine with a GPU: notes what it is asked for, and says and does what the test wants
PYTHON_STUB = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 9.0; exit ;;
  *gather.py*) exec "$REAL_PYTHON" "$@" ;;
  "-c import torch" | "-c import xdist") exit ;;
  "-c import pytest_timeout") exit "$WITHOUT_TIMEOUTS" ;;
esac
echo "${COMPUTE_SANITIZER:+under $COMPUTE_SANITIZER }${TALIB_FAST_BACKEND-auto}: ${*@Q}" >>"$ASKED"
case "$*" in
  *check_library.py) [[ -e $BUILT ]] || { echo "stoch_norm is served by PyTorch: no kernels"; exit 1; } ;;
  *setup.py*) [[ $BUILDS == 1 ]] && touch "$BUILT" ;;
  *bench_*.py* | *kernels.py*)
    mkdir -p "${@: -1}"
    echo '{"cases": [1]}' >"${@: -1}/results.json"
    echo "a table"
    ;;
  *) echo "a test" ;;
esac
[[ "$*" != *"$FAILS"* ]] || exit 3
[[ "$*" != *"$HANGS"* ]] || sleep 30
"""
# the real one, in a twentieth of the time, and a second more
TIMEOUT_STUB = """#!/usr/bin/env bash
echo "$3" >>"$LIMITS"
exec /usr/bin/timeout "$1" "$2" "$(($3 / 20 + 1))" "${@:4}"
"""
SANITIZER_STUB = """#!/usr/bin/env bash
export COMPUTE_SANITIZER="$2"
[[ $3 != --kernel-regex ]] || COMPUTE_SANITIZER+=" $4"
while [[ $1 == --* ]]; do shift 2; done
exec "$@"
"""


BENCHMARKS = ("squared_distance", "spectral_tail", "step", "bi_tuning", "co_tuning", "host_overhead")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = {
    "first": ["library", "smoke", "tests", "kernels", "bench_stoch_norm"],
    "second": ["library", *SANITIZERS, *(f"bench_{name}" for name in BENCHMARKS)],
}


class TestGpuScript:
    @pytest.fixture
    def run(self, tmp_path):
        """Runs a half on a machine that is made up."""
        (tmp_path / "bin").mkdir()
        stubs = {"python-stub": PYTHON_STUB, "timeout": TIMEOUT_STUB, "compute-sanitizer": SANITIZER_STUB}
        for name, text in stubs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
        (tmp_path / "built").touch()

        def run_half(half, **settings):
            return run(
                ["bash", "benchmarks/gpu.sh", half],
                **{
                    "PYTHON": "python-stub", "OUT": str(tmp_path / "out"), "COMMIT": "abc",
                    "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "nowhere"),
                    "REAL_PYTHON": sys.executable, "BUILT": str(tmp_path / "built"), "BUILDS": "1",
                    "ASKED": str(tmp_path / "asked"), "LIMITS": str(tmp_path / "limits"), "WITHOUT_TIMEOUTS": "0",
                    "FAILS": "nothing", "HANGS": "nothing", **settings,
                },
            )  # fmt: skip

        return run_half

    def asked(self, tmp_path):
        """Its lines, with quotes where words need them."""
        return [shlex.join(shlex.split(line)) for line in (tmp_path / "asked").read_text().splitlines()]

    def states(self, tmp_path, half):
        """What the summary says of each step, without the seconds that it took."""
        first, *lines = (tmp_path / "out" / f"gpu-{half}.txt").read_text().splitlines()
        assert first == "GPU architecture 9.0, commit abc"
        assert [line.split()[0] for line in lines] == STEPS[half]
        return {line.split()[0]: re.sub(r"^\S+ +\S+( s)? +", "", line) for line in lines}

    @pytest.mark.parametrize("half", ["", "third"])
    def test_it_is_the_first_half_or_the_second(self, half):
        done = run(["bash", "benchmarks/gpu.sh", *([half] if half else [])])
        assert (done.returncode, done.stderr) == (1, f"gpu.sh: expected first or second, got {half or 'nothing'}\n")

    def test_no_gpu_is_one_sentence(self, tmp_path):
        done = run(
            ["bash", "benchmarks/gpu.sh", "first"],
            PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path / "out"),
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "gpu.sh: no GPU that this torch can use: nothing was built or measured\n"
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("half", STEPS)
    def test_all_steps_pass(self, half, run, tmp_path):
        done = run(half)
        assert done.returncode == 0, done.stdout + done.stderr
        files = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert files == [f"gpu-{half}.json", f"gpu-{half}.tar.gz", f"gpu-{half}.txt"]
        assert self.states(tmp_path, half) == dict.fromkeys(STEPS[half], "pass")
        summary = (tmp_path / "out" / f"gpu-{half}.txt").read_text()
        gathered = json.loads((tmp_path / "out" / f"gpu-{half}.json").read_text())
        assert [gathered["run"], *gathered["steps"]] == summary.splitlines()
        measured = {"first": ("kernels", "stoch_norm"), "second": BENCHMARKS}[half]
        assert gathered["benchmarks"] == {name: {"cases": [1]} for name in measured}
        assert done.stdout.endswith(summary)
        with tarfile.open(tmp_path / "out" / f"gpu-{half}.tar.gz") as packed:
            names = set(packed.getnames())
        assert {f"logs/{name}.log" for name in STEPS[half]} < names
        assert {f"results/cuda/{name}/results.json" for name in measured} < names

    @pytest.mark.parametrize(("half", "together"), [("first", 240), ("second", 400)])
    def test_steps_fit_into_their_half(self, half, together, run, tmp_path):
        assert run(half).returncode == 0
        library, *limits = map(int, (tmp_path / "limits").read_text().split())
        assert len(limits) == len(STEPS[half]) - 1
        assert library <= together - 60  # a build leaves the smoke test and most of the tests their time
        assert sum(limits) <= together + 20  # nothing takes all of its own
        assert half == "second" or limits[0] == 20

    def test_benchmarks_take_the_options_that_they_get(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        parsed = {}
        for half in STEPS:
            assert run(half).returncode == 0
        for line in self.asked(tmp_path):
            _, script, *options = shlex.split(line)
            if "bench_" in script:
                module = importlib.import_module(Path(script).stem)
                parsed[module.OPERATION] = module.parse(options)
        assert sorted(parsed) == sorted(("stoch_norm", *BENCHMARKS))
        assert all(options.device == "cuda" and options.rounds for options in parsed.values())
        assert parsed["step"].ways == ["stochnorm", "stochnorm + bss"]

    def test_a_library_of_other_sources_is_built_anew(self, run, tmp_path):
        (tmp_path / "built").unlink()
        done = run("first")
        assert done.returncode == 0, done.stdout + done.stderr
        assert [line.split()[1] for line in self.asked(tmp_path)[:3]] == [
            "benchmarks/check_library.py", "setup.py", "benchmarks/check_library.py",
        ]  # fmt: skip

    @pytest.mark.parametrize("half", STEPS)
    def test_an_operation_without_a_kernel_ends_it(self, half, run, tmp_path):
        (tmp_path / "built").unlink()
        done = run(half, BUILDS="0")
        assert done.returncode == 1 and "    stoch_norm is served by PyTorch: no kernels\n" in done.stdout
        states = self.states(tmp_path, half)
        assert states.pop("library") == "FAIL" and set(states.values()) == {"FAIL, did not end"}
        assert [line for line in self.asked(tmp_path) if "pytest" in line or "bench_" in line] == []

    @pytest.mark.parametrize(
        ("half", "fails", "step"),
        [
            ("first", " tests/test_every_kernel", "smoke"),
            ("first", "--dist worksteal", "tests"),
            ("first", "kernels.py", "kernels"),
            ("second", "bench_step", "bench_step"),
        ],
    )
    def test_later_steps_run_after_a_failure(self, half, fails, step, run, tmp_path):
        done = run(half, FAILS=fails)
        assert done.returncode == 1
        states = self.states(tmp_path, half)
        assert states.pop(step) == "FAIL" and set(states.values()) == {"pass"}
        assert f"    a {'test' if step in ('smoke', 'tests') else 'table'}\n" in done.stdout  # the end of its log

    def test_a_hang_is_stopped_and_later_steps_run(self, run, tmp_path):
        done = run("first", HANGS=" tests/test_every_kernel")
        assert done.returncode == 1
        states = self.states(tmp_path, "first")
        assert states.pop("smoke") == "FAIL, stopped after 20 s" and set(states.values()) == {"pass"}

    def test_no_step_begins_without_time(self, run, tmp_path):
        done = run("second", SECONDS="397")  # bash begins to count there
        assert done.returncode == 1
        assert self.states(tmp_path, "second")["library"] == "FAIL, no time was left"
        assert not (tmp_path / "asked").exists()

    def test_a_missing_tool_is_a_failure(self, run, tmp_path):
        (tmp_path / "bin" / "compute-sanitizer").unlink()
        done = run("second")
        states = self.states(tmp_path, "second")
        assert done.returncode == 1 and {states.pop(name) for name in SANITIZERS} == {
            "FAIL, compute-sanitizer is missing"
        }
        assert set(states.values()) == {"pass"}

    def test_what_there_is_is_in_place_while_a_step_runs(self, run, tmp_path):
        """Also if the whole run is killed: nothing is left to be done at the end."""
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(run, "first", HANGS="bench_stoch_norm")
            found = {"benchmarks": {}}
            while not ending.done() and "stoch_norm" not in found["benchmarks"]:
                time.sleep(0.1)
                with contextlib.suppress(FileNotFoundError):
                    found = json.loads((tmp_path / "out" / "gpu-first.json").read_text())
            assert found["benchmarks"]["stoch_norm"] == {"cases": [1]}
            assert found["steps"][-1].endswith("FAIL, did not end")
            assert ending.result().returncode == 1
