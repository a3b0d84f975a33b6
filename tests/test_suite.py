"""The benchmark suite as a whole: running it, comparing runs, whole steps, and what the profiler tells of kernels."""

import collections
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accuracy
import accuracy_over_time
import bench_frozen as frozen
import bench_images as images
import bench_step as step
import command
import compare
import harness
import kernels
import pytest
import report
import source_dtype
import suite
import summary
import torch

from talib_fast.__main__ import build_parser
from talib_fast.networks import Network

pytestmark = pytest.mark.no_cover  # what is tested here is not of the package


def run_of(*ours, baseline=1.0, operation="stoch_norm", label="64@56"):
    """A run in which ours takes these seconds, one a round, and the baseline as many as given in every round."""
    samples = {"talib_fast": {"forward": list(ours)}, "upstream": {"forward": [baseline] * len(ours)}}
    return {"operation": operation, "cases": [{"label": label, "shape": [1], "samples": samples}]}


def write(path, *runs):
    for run in runs:
        (path / run["operation"]).mkdir(parents=True)
        (path / run["operation"] / "results.json").write_text(json.dumps(run))
    return path


class TestCompare:
    def verdict(self, before, after):
        (change,) = compare.changes(before, after)
        return change.verdict

    def test_a_regression_is_beyond_both_spreads(self):
        steady = run_of(1.0, 1.0, 1.0, 1.0)
        assert self.verdict(steady, run_of(1.5, 1.5, 1.5, 1.5)) == "SLOWER"
        assert self.verdict(run_of(1.5, 1.5, 1.5, 1.5), steady) == "faster"
        assert self.verdict(steady, run_of(0.9, 1.0, 1.5, 1.6)) == ""
        assert self.verdict(run_of(0.9, 1.0, 1.5, 1.6), run_of(1.5, 1.5, 1.5, 1.5)) == ""

    def test_a_small_change_is_none(self):
        assert self.verdict(run_of(1.0, 1.0, 1.0), run_of(1.04, 1.04, 1.04)) == ""

    def test_a_slower_machine_is_no_regression(self):
        assert self.verdict(run_of(1.0, 1.0, 1.0), run_of(3.0, 3.0, 3.0, baseline=3.0)) == ""

    def test_forward_and_backward_are_one_where_both_were_measured(self):
        def run(forward, backward):
            passes = {"forward": [forward] * 3, "backward": [backward] * 3}
            samples = {"talib_fast": passes, "upstream": {"forward": [1.0] * 3, "backward": [1.0] * 3}}
            return {"cases": [{"label": "", "samples": samples}]}

        assert self.verdict(run(1.0, 1.0), run(0.5, 2.5)) == "SLOWER"

    def test_our_own_variants_are_no_baselines(self):
        run = run_of(1.0, 1.0)
        run["cases"][0]["samples"]["talib_fast in PyTorch"] = {"forward": [1.0, 1.0]}
        assert [change.name for change in compare.changes(run, run)] == ["64@56: talib_fast over upstream"]

    def test_exit_codes_and_what_is_said(self, tmp_path, capsys):
        before = write(tmp_path / "a", run_of(1.0, 1.0), run_of(1.0, 1.0, operation="other"))
        after = write(tmp_path / "b", run_of(2.0, 2.0))
        for arguments, code in (([before, before], 0), ([before, after], 1), ([after, before], 0)):
            with pytest.raises(SystemExit) as left:
                suite.main(["--compare", *map(str, arguments)])
            assert left.value.code == code
        said = capsys.readouterr().out
        assert "2 ratios, 0 slower and 0 faster" in said and "1 ratios, 1 slower" in said
        assert "stoch_norm: 64@56: talib_fast over upstream  1.00 (1.00–1.00)  0.50 (0.50–0.50)  SLOWER" in said

    def test_a_file_or_its_folder_will_do(self, tmp_path):
        folder = write(tmp_path, run_of(1.0)) / "stoch_norm"
        assert compare.load(folder) == compare.load(folder / "results.json") == compare.load(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"), [("{", "cannot be read as results"), ("[]", "no benchmark's"), (None, "no benchmark's")]
    )
    def test_what_cannot_be_compared_is_one_sentence(self, tmp_path, text, message):
        good = write(tmp_path / "good", run_of(1.0))
        bad = tmp_path / "bad"
        bad.mkdir()
        if text is not None:
            (bad / "results.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            suite.main(["--compare", str(good), str(bad)])

    def test_no_case_in_common(self, tmp_path):
        paths = write(tmp_path / "a", run_of(1.0)), write(tmp_path / "b", run_of(1.0, label="another"))
        with pytest.raises(SystemExit, match="have no case in common"):
            suite.main(["--compare", *map(str, paths)])

    def test_the_committed_results_are_readable(self):
        found = compare.load(command.RESULTS / "cpu")
        assert set(found) >= {"stoch_norm", "squared_distance", "spectral_tail"}
        for results in found.values():
            assert all(not change.verdict for change in compare.changes(results, results))


class TestSuite:
    def test_knows_every_benchmark(self):
        assert {"stoch_norm", "squared_distance", "spectral_tail", "step", "bi_tuning"} <= set(suite.NAMES)

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        assert suite.parse([]).out == command.RESULTS / "cpu"
        assert suite.parse(["--quick"]).out == command.QUICK_RESULTS / "cpu"

    def test_runs_what_it_is_asked_for(self, tmp_path, capfd):
        with pytest.raises(SystemExit) as left:
            suite.main(["--quick", "--only", "host_overhead", "--out", str(tmp_path)])
        assert left.value.code == 0
        said = capfd.readouterr().out
        assert "== host_overhead" in said and "measured" in said and " of 1" in said
        assert (tmp_path / "host_overhead" / "table.md").exists()

    def test_a_failure_is_seen_and_the_others_run(self, monkeypatch, tmp_path, capsys):
        codes = {"bench_stoch_norm.py": 3, "bench_step.py": 0}

        def run(command):
            folder = tmp_path / command[1].rpartition("bench_")[2].removesuffix(".py")
            folder.mkdir()
            goals = [{"goal": "", "passed": passed} for passed in (True, False, None)]
            (folder / "results.json").write_text(json.dumps({"goals": goals}))
            return SimpleNamespace(returncode=codes[command[1].rpartition("/")[2]])

        monkeypatch.setattr(suite, "subprocess", SimpleNamespace(run=run))
        with pytest.raises(SystemExit) as left:
            suite.main(["--only", "stoch_norm", "step", "--out", str(tmp_path)])
        assert left.value.code == 1
        rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()[-2:]]
        assert rows == [["stoch_norm", "FAILED", "0", "s"], ["step", "measured", "1", "of", "2"]]


class TestSummary:
    def test_has_a_row_of_each_committed_benchmark(self, tmp_path, capsys):
        for name in summary.BENCHMARKS:
            if (command.RESULTS / "cpu" / name).exists():
                shutil.copytree(command.RESULTS / "cpu" / name, tmp_path / name)
        summary.main(tmp_path)
        linked = set(re.findall(r"^\|.*\[(\w+)\]\(.*table\.md\) \|$", (tmp_path / "summary.md").read_text(), re.M))
        assert linked == {path.name for path in tmp_path.iterdir() if path.is_dir()}
        said = capsys.readouterr().out
        assert "StochNorm, all 53 blocks of ResNet-50, contiguous" in said and "mobilenet_v2, float32 " in said
        pytest.importorskip("matplotlib")
        for name in ("steps.png", "parts.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_the_committed_summary_is_that_of_the_committed_results(self):
        found, page = summary.read(command.RESULTS / "cpu"), (command.RESULTS / "cpu" / "summary.md").read_text()
        for lines in (summary.steps_table(summary.steps(found)), summary.table(summary.parts(found), "")):
            assert report.markdown(lines) in page
        assert report.markdown(summary.goals(found, "")) in page
        assert summary.PAGE.read_text() == summary.with_goals(summary.PAGE.read_text(), found)

    def test_nothing_measured_is_one_sentence(self, tmp_path):
        with pytest.raises(SystemExit, match="holds no results of stoch_norm"):
            summary.main(tmp_path)


class Tiny(torch.nn.Module):
    out_features = 8

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def tiny_network():
    torch.manual_seed(1)
    return Network("tiny", Tiny(), torch.nn.Linear(8, 1000), None, ("layers.0",))


class TestStep:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        work = replace(step.WORKLOADS["mobilenet_v2"], build=tiny_network, size=8, keys=3)
        monkeypatch.setitem(step.WORKLOADS, "mobilenet_v2", work)

    def setting(self, way, device):
        return step.Setting("mobilenet_v2", way, "channels_last", "float32", device.type, 6, 3)

    @pytest.mark.parametrize("way", step.WAYS)
    def test_upstreams_step_and_ours_train_alike(self, way, device, monkeypatch):
        monkeypatch.setitem(step.RECIPES, "stochnorm", replace(step.RECIPES["stochnorm"], trade_off=1.0))  # no chance
        setting = self.setting(way, device)
        arguments = step.feed_of(setting).arguments
        losses = {}
        for name, make in step.sides(setting).items():
            taken = make()
            losses[name] = [taken(*arguments).item() for _ in range(3)]
        assert losses[step.OURS] == pytest.approx(losses[step.UPSTREAM], rel=1e-4)
        assert len(set(losses[step.OURS])) == 3
        if way not in ("stochnorm",):  # at p = 1 it is batch normalisation
            assert losses[step.OURS] != pytest.approx(losses[step.PLAIN], rel=1e-6)

    def test_runs_end_to_end(self, tmp_path, capsys, device):
        arguments = ["--quick", "--networks", "mobilenet_v2", "--ways", "l2_sp", step.BOTH, "--dtype", "float32"]
        step.main([*arguments, "--device", device.type, "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        assert [case["label"] for case in written["cases"]] == ["mobilenet_v2, l2_sp", "mobilenet_v2, stochnorm + bss"]
        for case in written["cases"]:
            for measured in ("samples", "peak_bytes", "kept_bytes"):
                assert set(case[measured]) == {step.OURS, step.PLAIN, step.UPSTREAM}
            assert all(len(own["forward"]) == 3 for own in case["samples"].values())
        assert "| mobilenet_v2, l2_sp | channels_last | float32 |" in (tmp_path / "table.md").read_text()
        assert "StochNorm" in capsys.readouterr().out
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_a_step_with_stochnorm_keeps_less(self, device):
        setting = self.setting("stochnorm", device)
        arguments = step.feed_of(setting).arguments
        ours, plain, _ = (make().kept_bytes(arguments) for make in step.sides(setting).values())
        values = 6 * 8 * 6 * 6  # of the convolution's output, which both keep, and of the activation's
        assert plain - ours == pytest.approx(4 * values, abs=1024)
        assert ours == pytest.approx(4 * values, abs=4096)

    def test_goals(self):
        def case(network, way, seconds, kept=10, bare=0.5):
            samples = {name: {"forward": [time]} for name, time in ((step.OURS, seconds), (step.PLAIN, 1.0))}
            samples[step.BARE] = {"forward": [bare]}
            return {
                "network": network, "label": f"{network}, {way}", "way": way, "layout": "channels_last",
                "dtype": "float32", "samples": samples, "kept_bytes": {step.OURS: kept, step.PLAIN: 100},
            }  # fmt: skip

        def verdicts(device, *cases):
            found = step.goals({"settings": {"device": device}, "cases": cases})
            return [goal.passed for goal in found if goal.passed is not None]

        mobilenet = "mobilenet_v2", "stochnorm"
        assert step.by_bytes(case(*mobilenet, 1.0, bare=0.74)) == pytest.approx(0.74 + 0.26 * 8 / 13)  # 0.9
        assert verdicts("cpu", case(*mobilenet, 0.84), case("mobilenet_v2", "bss", 2.0)) == [True, True, True]
        assert verdicts("cpu", case(*mobilenet, 0.86, kept=76)) == [True, False, False]
        assert verdicts("cpu", case("resnet50", "stochnorm", 1.01)) == [False, False]
        assert verdicts("cpu", case("mobilenet_v2", "delta", 1.19), case("mobilenet_v2", step.WITH_DELTA, 1.1)) == [
            False,
            True,
        ]
        assert verdicts("cuda", case("resnet50", step.BOTH, 1.02), case("resnet50", "stochnorm", 2.0)) == [True]
        assert verdicts("cuda", case("resnet50", step.BOTH, 1.03)) == [False]

    def test_settings_by_device(self):
        def networks(*arguments):
            return {(setting.network, setting.layout) for setting in step.settings(step.parse(arguments))}

        resnet = {("resnet50", "channels_last")}
        small = {(name, "channels_last") for name in ("mobilenet_v2", "mobilenet_v2_32", "efficientnet_b0")}
        assert networks() == small | resnet
        assert networks("--networks", "resnet50", "--layouts", "contiguous") == {("resnet50", "contiguous")}
        assert step.parse([]).out == command.RESULTS / "cpu" / "step"
        for arguments in (["--batch", "2"], ["--ways", "bss"], ["--networks", "resnet50"], ["--rounds", "3"]):
            assert step.parse(arguments).out == command.QUICK_RESULTS / "cpu" / "step"
        assert networks("--quick") == {("mobilenet_v2", "channels_last")}
        assert networks("--quick", "--networks", "resnet50") == resnet
        assert {(s.batch, s.rounds) for s in step.settings(step.parse(["--networks", "resnet50"]))} == {(16, 5)}

    def test_only_stochnorm_is_measured_in_all_dtypes(self):
        ways = {}
        for setting in step.settings(step.parse([])):
            ways.setdefault((setting.network, setting.dtype), []).append(setting.way)
        assert ways["resnet50", "float32"] == list(step.WAYS)
        assert ways["resnet50", "bfloat16"] == ways["efficientnet_b0", "float32"] == list(step.WITH_STOCHNORM)


class TestImages:
    def test_runs_end_to_end(self, tmp_path, monkeypatch):
        work = replace(step.WORKLOADS["mobilenet_v2"], build=tiny_network)
        monkeypatch.setitem(step.WORKLOADS, "mobilenet_v2", work)
        images.main(["--quick", "--out", str(tmp_path)])
        (case,) = json.loads((tmp_path / "results.json").read_text())["cases"]
        assert {name: len(found["step"]) for name, found in case["samples"].items()} == {
            name: command.QUICK_ROUNDS for name in (images.FILES, images.MEMORY, images.READY)
        }
        assert all(peak > 50 for peak in case["peak_mib"].values())
        assert "| files, workers |" in (tmp_path / "table.md").read_text()


class TestFrozen:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(frozen, "NETWORKS", ("mobilenet_v2",))
        monkeypatch.setattr(frozen, "SIZE", 8)
        work = replace(step.WORKLOADS["mobilenet_v2"], build=tiny_network, size=8)
        monkeypatch.setitem(step.WORKLOADS, "mobilenet_v2", work)

    def test_all_candidates_find_the_same(self, device):
        images = torch.randn(4, 3, 8, 8, device=device)
        for kind, sides in frozen.work("mobilenet_v2", device.type):
            if kind == frozen.PASS:
                assert frozen.error(sides, images, frozen.OURS) < 1e-5
                assert 1e-5 < frozen.error(sides, images, "bfloat16") < 0.02
            elif kind == frozen.LABELS:
                torch.testing.assert_close(sides[frozen.OURS](images), sides[frozen.EVALUATION](images))
            else:
                found, right = sides[frozen.OURS](images).relationship, sides[frozen.EVALUATION](images)
                torch.testing.assert_close(torch.from_numpy(found), torch.as_tensor(right).float())

    def test_runs_end_to_end(self, tmp_path, device):
        frozen.main(["--quick", "--device", device.type, "--out", str(tmp_path)])
        written = json.loads((tmp_path / "results.json").read_text())
        assert [case["work"] for case in written["cases"]] == [frozen.PASS, frozen.LABELS, frozen.RELATIONSHIP]
        assert "| DELTA's maps, mobilenet_v2 |" in (tmp_path / "table.md").read_text()
        assert len(written["goals"]) == 2


class TestSourceDtype:
    def results(self):
        runs = [
            {"source_dtype": dtype, "method": method, "seed": seed, "accuracy": 60.0 + seed + more}
            for dtype, more in (("network", 0), ("bfloat16", 1))
            for method in source_dtype.METHODS
            for seed in range(3)
        ]
        return {
            "environment": report.environment(torch.device("cpu")),
            "settings": {"device": "cpu", "test_images": 10},
            "dtype": "bfloat16",
            "distances": [{"step": 0, "distance": 0.01, "gradient": 0.05}],
            "runs": runs,
        }

    def test_tables(self, tmp_path):
        errors, rows = (lines for lines, _ in source_dtype.tables(self.results()))
        assert errors[1:] == [["0", "1 %", "5 %"]]
        assert rows[1] == ["delta", "61.0 ± 1.0", "62.0 ± 1.0", "+1.0 ± 0.0"]
        source_dtype.publish(self.results(), tmp_path)
        before = (tmp_path / "table.md").read_text()
        source_dtype.main(["--from-json", str(tmp_path)])
        assert (tmp_path / "table.md").read_text() == before

    def test_runs_finetune_in_both_dtypes(self, tmp_path, monkeypatch):
        commands = []

        def run(command):
            commands.append(command)
            folder = Path(command[command.index("--out") + 1])
            dtype = command[command.index("--source-dtype") + 1]
            runs = [run for run in self.results()["runs"] if run["source_dtype"] == dtype]
            folder.mkdir(parents=True)
            settings = {"device": "cpu", "test_images": 10, "source_dtype": dtype}
            (folder / "results.json").write_text(json.dumps({"settings": settings, "runs": runs}))
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=run))
        monkeypatch.setattr(source_dtype, "distances", lambda dtype: self.results()["distances"])
        source_dtype.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--seeds", "3", "--", "--amp"])
        assert json.loads((tmp_path / "results.json").read_text())["runs"] == self.results()["runs"]
        assert len(commands) == 2 and all(command[-1] == "--amp" for command in commands)
        with pytest.raises(SystemExit):
            source_dtype.parse(["--seeds", "1"])
        monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=lambda command: SimpleNamespace(returncode=2)))
        with pytest.raises(SystemExit, match="no results with the pretrained network in network"):
            source_dtype.main(["--runs", str(tmp_path)])


KERNEL = "void talib_fast::stoch_norm::(anonymous namespace)::forward_kernel<float, 4>(Map, float (*)(int))"
TRACE = {
    "traceEvents": [
        {"cat": "cpu_op", "name": "aten::add", "dur": 9},
        *(
            {
                "cat": "kernel", "name": KERNEL, "dur": dur,
                "args": {
                    "grid": [64, 2, 1], "block": [512, 1, 1], "registers per thread": 40, "shared memory": 2048,
                    "est. achieved occupancy %": 75,
                },
            }
            for dur in (10, 14)
        ),
        {"cat": "gpu_memset", "name": "Memset (Device)", "dur": 1, "args": {"bytes": 4}},
    ]
}  # fmt: skip


class TestKernels:
    def test_reads_a_trace(self):
        norm, fill = kernels.read(TRACE, repetitions=2)
        assert norm == kernels.Kernel("forward_kernel<float, 4>", 1, 12.0, (64, 2, 1), (512, 1, 1), 40, 2048, 75)
        assert (fill.name, fill.launches, fill.microseconds) == ("Memset (Device)", 0.5, 1.0)

    def test_the_table_counts_the_floors_bytes(self):
        own = [kernel.__dict__ for kernel in kernels.read(TRACE, 2)]
        cases = [
            {"label": "copy_", "floor_bytes": 2e6, "microseconds": 1.0, "kernels": []},
            {"label": "stoch_norm, forward", "floor_bytes": 12e6, "microseconds": 12.0, "kernels": own},
        ]
        _, copied, one, kernel, _ = kernels.table(cases)
        assert copied[1:4] == ["1.0", "2000", "100"] and one[1:4] == ["12.0", "1000", "50"]
        assert kernel == ["– forward_kernel<float, 4>", "12.0", "", "", "1", "64×2×1", "512×1×1", "40", "2.0", "75"]

    def test_profiles_both_passes_of_every_operation(self, monkeypatch, device):
        monkeypatch.setattr(kernels, "MAPS", ((8, 4),))
        monkeypatch.setattr(kernels, "MATRICES", ((4, 16),))
        monkeypatch.setattr(kernels, "COPIED_BYTES", 1024)
        labels = []
        for group in kernels.passes(device.type, ["float32"], batch=2):
            for one in group:
                one.work()
                one.work()
                assert one.floor_bytes > 0
                labels.append(one.label)
        assert labels[0] == "copy_" and len(labels) == 1 + 2 * (3 * 2 + 4 + 1)
        assert {label.partition(" ")[0] for label in labels[1:]} == {"stoch_norm", "squared_distance", "spectral_tail"}

    def test_inputs_and_the_memory_of_outputs_take_turns(self):
        feeds = harness.feeds(torch.device("cpu"), (2, 3, 4, 4), torch.float32, False, sets=3)
        seen = []

        def forward(x):
            output = x * 2
            seen.append((x.data_ptr(), output.data_ptr()))
            return output

        one, _ = kernels.both_passes("twice", harness.Candidate("twice", forward, ()), feeds, 1, 1)
        for _ in range(6):
            one.work()
        pointers = [feed.leaves[0].data_ptr() for feed in feeds]
        assert [x for x, _ in seen] == 3 * pointers  # the first three are those that the backward pass goes back to
        assert len({output for _, output in seen[-3:]} | {output for _, output in seen[:3]}) == 6

    def test_every_pass_is_written_when_it_is_measured(self, monkeypatch, tmp_path):
        passes = [[kernels.Pass("copy_", 2e6, int)], [kernels.Pass("one", 1e6, int), kernels.Pass("two", 1e6, int)]]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(kernels, "passes", lambda *given: iter(passes))
        monkeypatch.setattr(kernels.report, "environment", lambda device: collections.defaultdict(str))
        written = []

        def profiled(work):
            if len(written) < 3:
                written.append([path.read_text().count('"label"') for path in tmp_path.iterdir()])
            return kernels.read(TRACE, 2)

        monkeypatch.setattr(kernels, "profiled", profiled)
        kernels.main(["--out", str(tmp_path)])
        assert written == [[], [1], [2]]
        assert len(json.loads((tmp_path / "results.json").read_text())["cases"]) == 3
        assert "| two | " in (tmp_path / "table.md").read_text()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu_is_one_sentence(self, capsys):
        with pytest.raises(SystemExit):
            kernels.main([])
        assert "there is no GPU that this torch can use" in capsys.readouterr().err


class TestAccuracy:
    def job(self, labels, methods, candidates=None):
        """The results of finetune: plain reaches 50 to 52 %, the others gain 1, 2 and 3 points by seed."""
        runs = [
            {"method": method, "seed": seed, "accuracy": 50.0 + seed + (method != "plain") * (seed + 1), "model": None}
            | {"seconds_per_step": 30.0, "chosen": {"lr": 0.03}, "test_images": 10, "train_images": 8}
            for seed in (2, 0, 1)
            for method in (["lwf+bss"] if candidates else methods)
        ]
        trials = [
            {"method": method, "number": number, "settings": {"lr": 0.02 + number / 100}, "steps": 3, "rung": 0}
            | {"state": "finished", "of_folds": 1, "accuracy": 25.0 + 50 * (number + ("lwf" in method)) / 2}
            | {"folds": [{"right": "1100"}], "cross_entropy": 1.0 - (method == "lwf+bss") / 2, "seconds": 1800.0}
            for method in methods
            for number in (0, 1)
        ]
        settings = {"network": "mobilenet_v2", "steps": 3, "batch_size": 2, "image_size": 32, "device": "cpu"}
        settings |= {"tune": 2, "labels_per_class": labels, "candidates": candidates, "lr": 0.02}
        return {"settings": settings, "data": {"classes": ["a", "b"]}, "runs": runs, "trials": trials}

    @pytest.fixture
    def commands(self, monkeypatch):
        """The command lines of finetune, which leave results at once."""
        commands = []

        def run(command):
            words = dict(zip(command[4::2], command[5::2], strict=False))
            commands.append(words)
            folder, methods = Path(words["--out"]), words["--method"].split(",")
            candidates = [*accuracy.RECIPES, *methods[1:]] if methods[0] == "auto" else None
            folder.mkdir(parents=True, exist_ok=True)
            made = self.job(words["--labels-per-class"], candidates or methods, candidates)
            made["settings"]["image_size"] = int(words["--image-size"])
            (folder / "results.json").write_text(json.dumps(made))
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=run))
        return commands

    def test_the_combinations_that_validation_likes_best_join_the_methods(self, commands, tmp_path):
        accuracy.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--", "--threads", "1"])
        names = [words["--method"].split(",") for words in commands]
        assert names[0] == ["auto", *accuracy.COMBINATIONS]
        assert names[1:4] == 3 * [[*accuracy.RECIPES, "lwf+bss", "lwf+stochnorm"]]
        assert [words["--labels-per-class"] for words in commands] == ["5", "2", "5", "all", "all"]
        assert [words["--seeds"] for words in commands] == ["5", "5", "5", "3", "3"]
        assert [words["--tune"] for words in commands] == ["2", "8", "8", "8", "1"]
        assert [words["--image-size"] for words in commands] == ["96", "96", "96", "96", "224"]
        assert names[4] == ["lwf+bss"] and commands[4]["--lr"] == "0.03"
        assert all(words["--threads"] == "1" for words in commands)

    def test_figures(self, commands, tmp_path, capsys):
        accuracy.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
        results = json.loads((tmp_path / "results.json").read_text())
        reached, gained, settings, competition, literature = accuracy.sections(results)
        assert reached.rows[0] == ("plain", *3 * ["51.0 ± 1.0"])
        assert gained.rows[0] == ("linear", *3 * ["+2.0 ± 2.5 (8.9)"]) and not gained.bold
        assert settings.rows[0] == ("plain", "2", "--lr 0.03", "50.0", "25.0")
        assert len(settings.rows) == 3 * 13 and "39.0 hours in all" in settings.caption
        words = (
            "python -m talib_fast finetune --data groceries --labels-per-class 2 --method lwf+bss --image-size 96 "
            "--steps 3 --evaluations 1 --seeds 3 --lr 0.03"
        )
        assert settings.findings == [f"One cell again, lwf+bss in the first column: `{words}`"]
        assert build_parser().parse_args(words.split()[3:]).lr == 0.03
        assert "--seeds 3 --tune 1 --lr 0.03" in accuracy.again(results, "all", "plain")
        assert competition.findings[-1].startswith(
            "The winner, lwf+bss, trained on all labelled images, reaches 53.0 %"
        )
        assert literature.rows == [
            ("mobilenet_v2, lwf+bss", "96", "55", "1.5", "53.0 ± 2.0"),
            ("mobilenet_v2, lwf+bss", "224", "299", "1.5", "53.0 ± 2.0"),
            (accuracy.LITERATURE[0], "-", "-", "-", "86.0"),
        ]
        assert "--method lwf+bss --image-size 224 --steps 3" in literature.findings[0]
        first = capsys.readouterr().out
        accuracy.main(["--from-json", str(tmp_path)])
        assert capsys.readouterr().out == first
        assert json.loads((tmp_path / "results.json").read_text()) == results
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_multiply_adds_are_the_papers(self):
        assert accuracy.multiply_adds("mobilenet_v2", 224) == pytest.approx(300e6, rel=0.01)

    def test_runs_are_of_one_commit(self, commands, tmp_path, monkeypatch):
        words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
        accuracy.main(words)
        monkeypatch.setattr(report, "_commit", lambda: "another")
        del commands[:]
        with pytest.raises(SystemExit, match="holds runs of commit"):
            accuracy.main(words)
        accuracy.main([*words, "--gather"])
        assert not commands
        assert json.loads((tmp_path / "results.json").read_text())["environment"]["commit"] != "another"

    def test_a_failed_run_ends_it(self, monkeypatch, tmp_path):
        monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=lambda command: SimpleNamespace(returncode=2)))
        with pytest.raises(SystemExit, match="no results in "):
            accuracy.main(["--runs", str(tmp_path)])

    def test_only_a_full_run_takes_the_place_of_the_results(self):
        def place(*arguments):
            return accuracy.place(accuracy.parse(arguments), "cpu")

        assert place() == place("--trials", "9") == command.RESULTS / "cpu" / "accuracy"
        for fewer in (("--labels", "2"), ("--seeds", "9"), ("--trials", "7")):
            assert command.RESULTS not in place(*fewer).parents

    def test_too_few_seeds(self, capsys):
        with pytest.raises(SystemExit):
            accuracy.parse(["--seeds", "1"])
        assert "expected 2 seeds or more, got 1" in capsys.readouterr().err


class TestAccuracyOverTime:
    def results(self):
        """Steps of stochnorm take three quarters of the time of plain's, and it reaches four points more."""
        runs = [
            {
                "method": method, "seed": seed, "accuracy": 60.0 + seed + more, "val_accuracy": 70.0 + more,
                "accuracies": [[5, 50.0 + more], [10, 70.0 + more]], "seconds": [5 * step, 10 * step],
                "preparation_seconds": 0.0,
            }
            for seed in (1, 0)
            for method, step, more in (("plain", 2.0, 0), ("stochnorm", 1.5, 4))
        ]  # fmt: skip
        settings = {"network": "net", "steps": 10, "batch_size": 2, "image_size": 8, "device": "cpu"}
        images = {"train": 8, "val": 4, "test": 6}
        environment = report.environment(torch.device("cpu"))
        return {"environment": environment, "settings": settings, "images": images, "runs": runs}

    def test_figures(self, tmp_path):
        table = accuracy_over_time.table(self.results())
        assert table.rows == [("plain", "20.0", "60.5 ± 0.7"), ("stochnorm", "15.0", "64.5 ± 0.7")]
        assert table.findings[0] == "A run of stochnorm takes 0.75× of plain's time (0.75 to 0.75 by seed)."
        assert "is +4.0 points beside it on the 4 validation images" in table.findings[-1]
        (run,) = (run for run in self.results()["runs"] if (run["method"], run["seed"]) == ("stochnorm", 0))
        reached = [accuracy_over_time.reached(run, seconds) for seconds in (7.4, 7.5, 14.9, 15.0, 99)]
        assert reached == [0.0, 54.0, 54.0, 74.0, 74.0]

    def test_runs_finetune_once(self, tmp_path, monkeypatch):
        commands = []

        def run(command):
            commands.append(command)
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir()
            runs = [run | {f"{part}_images": 4 for part in ("train", "val", "test")} for run in self.results()["runs"]]
            (folder / "results.json").write_text(json.dumps({**self.results(), "runs": runs}))
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=run))
        accuracy_over_time.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--", "--threads", "1"])
        assert len(commands) == 1 and commands[0][-2:] == ["--threads", "1"]
        assert json.loads((tmp_path / "results.json").read_text())["runs"] == self.results()["runs"]
        assert "| stochnorm | 15.0 | 64.5 ± 0.7 |" in (tmp_path / "table.md").read_text()
        pytest.importorskip("matplotlib")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
