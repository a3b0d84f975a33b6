"""Pages and docstrings: links lead somewhere, code and commands are what there is, figures are those of result files,
public names have docstrings, and the example of docs/contributing.md does what it shows."""

import builtins
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import symtable
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import architectures
import pytest
import report
import simt_support
from process_support import PATIENCE
from test_examples import run_python

import talib_fast
from talib_fast.__main__ import build_parser
from talib_fast.ops.library import OPERATIONS

ROOT = Path(__file__).parent.parent
README, DOCS, RESULTS = ROOT / "README.md", ROOT / "docs", ROOT / "benchmarks" / "results"
# pages with a directive are the site's alone: they include others
PAGES = [README, *(page for page in sorted(DOCS.rglob("*.md")) if "```{" not in page.read_text()), RESULTS / "NOTES.md"]
FENCED = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
HEADING = re.compile(r"^#+ +(.+?)\s*$", re.M)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


for_every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# ---- Links


def links(text: str) -> list[str]:
    """Where a page's links and images lead to."""
    text = INLINE.sub("", FENCED.sub("", text))
    found = re.findall(r"\]\(\s*<?([^\s)>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)
    found += re.findall(r"\b(?:src|href|srcset)=\"([^\"]+)\"", text)
    return found + re.findall(r"<(\w+://[^>]+)>", text)


def anchors(text: str) -> set[str]:
    """The fragments by which GitHub leads to a page's headings."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        numbered = (f"{slug}-{n}" for n in itertools.count(1))
        found.add(next(name for name in itertools.chain([slug], numbered) if name not in found))
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


@for_every_page
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), link
            continue
        # not resolve(): where a wheel is tested the package is a symbolic link to the installed one
        target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if parts.fragment:
            assert parts.fragment in anchors(target.read_text()), link


def test_links_and_anchors_are_found():
    page = '# A `b`, c\n[x\ny](z.md#a-b-c) `[no](no)` ![i](i.png "t")\n```\n[no](no)\n# no\n```\n# A b c\n<https://a.b>'
    assert links(page) == ["z.md#a-b-c", "i.png", "https://a.b"]
    assert anchors(page) == {"a-b-c", "a-b-c-1"}


# ---- Code


def blocks(language: str) -> list:
    """The blocks in that language on all pages."""
    return [
        pytest.param(code, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, (found, code) in enumerate(FENCED.findall(page.read_text()))
        if found == language
    ]


def free_names(code: str) -> set[str]:
    """The names that a script takes from elsewhere."""
    module = symtable.symtable(code, "block", "exec")
    tables, used = [module], set()
    for table in tables:
        tables += table.get_children()
        used |= {its.get_name() for its in table.get_symbols() if its.is_referenced() and its.is_global()}
    own = {its.get_name() for its in module.get_symbols() if its.is_assigned() or its.is_imported()}
    return used - own - set(dir(builtins))


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, tmp_path):
    compile(code, "block", "exec")
    for module, names in re.findall(r"^from (talib_fast\S*) import (.+)$", code, re.M):
        assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))
    if not free_names(code):  # else it is a part of a script of the reader's
        run_python(code, tmp_path)


def test_free_names_are_found():
    assert free_names("import a\nb = a.c\ndef d(e):\n    global g\n    return e + f + len(b)\n[h for h in g]") == {
        "f",
        "g",
    }


def test_every_block_is_looked_at():
    for page in PAGES:
        assert {language for language, _ in FENCED.findall(page.read_text())} <= {"", "bash", "python", "diff", "text"}


@functools.cache
def options_of(script: Path) -> frozenset[str]:
    if script.parent.name == "examples":  # which import what may not be here
        return frozenset(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", script.read_text()))
    module = importlib.import_module(script.stem)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        getattr(module, "parse", module.main)(["--help"])
    return frozenset(re.findall(r"--[\w-]+", said.getvalue()))


def check_paths(words: list[str]) -> None:
    for word in words:
        assert list(ROOT.glob(word.partition("::")[0])), f"{word} is missing"


def check_python(words: list[str]) -> None:
    """``python`` with these arguments."""
    if words[:2] == ["-m", "talib_fast"]:
        build_parser().parse_args([word for word in words[2:] if word != "..."])
    elif words[:2] == ["-m", "pytest"]:
        check_paths([word for word in words[2:] if word.startswith(("tests", "benchmarks"))])
    elif words[0] != "-m":
        check_paths(words[:1])
        own_words = words[1 : words.index("--")] if "--" in words else words[1:]
        given = {word.partition("=")[0] for word in own_words if word.startswith("--")}
        own = words[0] != "setup.py"
        assert not own or not given or given <= options_of(ROOT / words[0]), f"{words[0]} has no {given}"
        check_paths([word for word in words[1:] if "*" in word])
    else:
        raise AssertionError(f"python {shlex.join(words)}: no test knows this")


def check_cmake(words: list[str]) -> None:
    lists = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "tests" / "simt" / "CMakeLists.txt").read_text()
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-S":
            check_paths([f"{following}/CMakeLists.txt"])
        elif word == "--target":
            assert re.search(rf"add_\w+\(\s*{following}\b", lists), f"there is no target {following}"
        elif word.startswith("-D"):
            assert word[2:].partition("=")[0] in lists + "Python_EXECUTABLE", f"{word} is no option"


def check_command(line: str) -> None:
    """Raise unless each command of a shell's line is there, with the options that it is given."""
    for command in re.split(r"\s(?:&&|\||;)\s", line):
        words = shlex.split(command, comments=True)
        while words and re.match(r"[A-Z]\w*=", words[0]):
            name = words[0].partition("=")[0]
            assert re.search(rf"\b{name}\b", sources()), f"nothing reads {name}"
            del words[0]
        if not words:
            continue
        program, arguments = Path(words[0]).name, words[1:]
        if program in ("python", "python3"):
            check_python(arguments)
        elif program == "torchrun":
            assert arguments[0] == "--nproc-per-node", f"{command}: no test knows this"
            check_python(arguments[2:])
        elif program == "talib-fast":
            check_python(["-m", "talib_fast", *arguments])
        elif program == "make":
            makefile = (ROOT / "Makefile").read_text()
            targets = re.findall(r"^([\w/.]+)(?: [\w/.]+)*:", makefile, re.M)
            given = [word.partition("=") for word in arguments if not word.startswith("-")]
            for word, is_variable, _ in given:
                assert f"$({word})" in makefile if is_variable else word in targets, command
        elif program == "pip":
            for extra in re.findall(r"^\.\[(\w+)\]$", "\n".join(arguments), re.M):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), command
        elif program == "bash":
            check_paths(arguments[:1])
        elif program == "cmake":
            check_cmake(arguments)
        else:
            assert words[0] in ("pre-commit", "cd", "git"), f"{command}: no test knows this"


@functools.cache
def sources() -> str:
    """All text of the tree that is no page."""
    folders = ("talib_fast", "csrc", "tools", "tests", "benchmarks", "examples", "docs/example")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    kinds = (".py", ".h", ".cuh", ".cpp", ".cu", ".txt", ".sh")
    files = [path for path in files if path.suffix in kinds and path.name != Path(__file__).name]
    return "\n".join(path.read_text() for path in [ROOT / "setup.py", ROOT / "Makefile", *files])


@pytest.mark.parametrize("code", [*blocks(""), *blocks("bash")])
def test_commands_are_there(code):
    for line in code.replace("\\\n", " ").splitlines():
        check_command(line)


@for_every_page
def test_commands_in_sentences_are_there(page):
    for code in INLINE.findall(FENCED.sub("", page.read_text())):
        if re.match(r"(python|make|torchrun|bash|cmake) ", code):
            check_command(" ".join(code.split()))


@pytest.mark.parametrize(
    "line",
    [
        "make nothing", "python -m talib_fast train", "python -m talib_fast finetune --nothing", "FAST=1 make test",
        "python benchmarks/nothing.py", "python benchmarks/bench_stoch_norm.py --nothing", "rm -rf build",
        "python -m pytest tests/nothing.py", "cmake --build build --target nothing", "cmake -S . -B build -DNOTHING=1",
        "python examples/timm_stochnorm.py --nothing", "torchrun --nproc-per-node 2 examples/nothing.py",
        "pip install '.[nothing]'", "bash nothing.sh", "make test && make nothing", "python -m nothing",
    ],
)  # fmt: skip
def test_what_is_not_there_is_found(line):
    with pytest.raises((AssertionError, talib_fast.errors.UserError)):
        check_command(line)


# ---- Figures

Row = list[str]
NUMBER = r"\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(rf"({NUMBER}) ?[×%](?! ?\d)|([+-]?{NUMBER} ± {NUMBER}(?: \({NUMBER}\))?)")


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Heading and text of each section, without blocks of code."""
    title, *rest = re.split(HEADING, "\n" + FENCED.sub("", page.read_text()))
    yield from zip(("", *rest[::2]), (title, *rest[1::2]), strict=True)


def rows(text: str) -> list[Row]:
    """The rows of all Markdown tables, without headers."""
    found: list[Row] = []
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.M):
        found += [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return found


def figures(row: Row) -> list[str]:
    return [ratio or spread for cell in row for ratio, spread in FIGURE.findall(cell)]


def result_tables(page: Path, text: str) -> list[Path]:
    """The tables beside the result files that a section links to."""
    targets = [(page.parent / link).resolve() for link in links(text) if "://" not in link]
    folders = {target.parent for target in targets if target.is_relative_to(RESULTS) and target.parent != RESULTS}
    return [folder / "table.md" for folder in sorted(folders) if (folder / "table.md").exists()]


def stands_for(figure: str, cell: str) -> bool:
    """Whether a cell of a result's table is that figure, or begins with a number that rounds to it."""
    if "±" in figure:
        return figure == cell.strip("*")
    begins = re.match(NUMBER, cell)
    if begins is None:
        return False
    own, its = (Decimal(number.replace(",", "")) for number in (figure, begins[0]))
    digits, its_digits = (-number.as_tuple().exponent for number in (own, its))
    if digits >= its_digits:
        return own == its
    # both were rounded from what neither shows
    return abs(own - its) <= (Decimal(10) ** -digits + Decimal(10) ** -its_digits) / 2


def is_measured(row: Row, measured: list[Row]) -> bool:
    """Whether a row is one of the results', or all its figures are those of one, or of two that each have its label."""
    labelled = [its for its in measured if row[0] in its]
    if any(row[: len(its)] == its for its in measured):
        return True
    places = [*measured, *(one + other for one, other in itertools.combinations(labelled, 2))]
    return any(all(any(stands_for(figure, cell) for cell in its) for figure in figures(row)) for its in places)


FIGURE_PAGES = [page for page in PAGES if page.parent != RESULTS]


@pytest.mark.parametrize("page", FIGURE_PAGES, ids=name_of)
def test_figures_in_tables_are_those_of_the_result_file_that_the_section_names(page):
    for title, text in sections(page):
        found = [row for row in rows(text) if figures(row)]
        tables = result_tables(page, text)
        assert tables or not found, f"{title}: the section has figures, but links to no result file"
        measured = [row for table in tables for row in rows(table.read_text())]
        for row in found:
            assert is_measured(row, measured), f"{title}: {' | '.join(row)}: in no row of {list(map(name_of, tables))}"


def test_figures_are_told_from_others():
    assert figures(["48 × 512, k = 5", "2.1×", "**1,024 ×**", "53 %", "79.7 ± 1.6", "4.2 to 6.6×", "5"]) == [
        "2.1", "1,024", "53", "79.7 ± 1.6", "6.6",
    ]  # fmt: skip
    measured = [["a", "x", "2.15 (2.00–2.20)", "53"], ["a", "y", "4.50", "2,048.7"], ["b", "x", "2.15", "7.25"]]
    for row, found in (
        (["a", "2.2×", "53 %"], True), (["a", "2.1×"], True), (["a", "2×"], True), (["a", "2.3×"], False),
        (["a", "2.0×"], False), (["a", "54 %"], False), (["a", "2.151×"], False), (["a", "2.2×", "2049×"], True),
        (["c", "2.2×", "2049×"], False), (["b", "2.2×", "4.5×"], False),
    ):  # fmt: skip
        assert is_measured(row, measured) == found, row
    assert is_measured(["at least 90 %", "reached", "link"], [["at least 90 %", "reached"]])


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/*/results.json")), ids=name_of)
def test_tables_are_what_the_benchmarks_make_of_the_results(folder, tmp_path, monkeypatch):
    results = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(report, "write_plot", lambda file, draw: None)
    prefix = "bench_" if "operation" in results else ""
    importlib.import_module(f"{prefix}{folder.name}").publish(results, tmp_path)
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()


# ---- Docstrings


def public_modules() -> list[ModuleType]:
    names = [found.name for found in pkgutil.walk_packages(talib_fast.__path__, "talib_fast.")]
    names = [name for name in names if not name.endswith(("__main__", "._C", "._autograd"))]
    return [importlib.import_module(name) for name in ("talib_fast", *names)]


def test_every_public_name_has_a_docstring():
    exported = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in public_modules()
        for name in getattr(module, "__all__", ())
    }
    exported |= {module.__name__: module for module in public_modules()}
    ours = {
        name: value
        for name, value in exported.items()
        if (value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")).startswith("talib_fast")
    }
    assert len(ours) > 40
    assert not [name for name, value in ours.items() if not value.__doc__]


def test_every_module_with_public_names_is_on_the_site():
    """Of a module's names docs/conf.py forgets none; the modules are listed by hand."""
    listed = re.findall(r"^   (talib_fast\S*)$", (DOCS / "api" / "index.rst").read_text(), re.M)
    named = [module.__name__ for module in public_modules() if getattr(module, "__all__", ())]
    named.remove("talib_fast.finetune")  # whose names are modules
    assert sorted(listed) == sorted(named)


# ---- The example of docs/contributing.md

EXAMPLE = DOCS / "example"
TESTS = "tests/test_soft_threshold.py"


def apply(diff: str, folder: Path) -> None:
    """Apply a diff whose hunks are told by their text, not by numbers of lines."""
    for name, hunks in re.findall(r"^\+\+\+ b/(.+)\n((?:(?!--- ).*\n)+)", diff, re.M):
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.M):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            text = (folder / name).read_text()
            assert text.count(old) == 1, f"{name} does not have once:\n{old}"
            (folder / name).write_text(text.replace(old, new))


def run_in(folder: Path, *command: object, **environment: str) -> str:
    """What a command prints that finds the package in ``folder``, not this one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST_", "FORCE_"))}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=PATIENCE,
        env={**inherited, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of this tree with the example's operation for the only one of which kernels are built."""
    folder = tmp_path_factory.mktemp("tree")

    def others(_, names):
        return {name for name in names if Path(name).stem in OPERATIONS}

    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("talib_fast", "tools", "benchmarks", "tests/simt"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=others)
    for name in (
        *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
        *("tests/conftest.py", "tests/cuda_support.py", "tests/process_support.py"),
    ):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True, ignore=ignored)
    (diff,) = (code for language, code in FENCED.findall((DOCS / "contributing.md").read_text()) if language == "diff")
    apply(diff, folder)
    return folder


@pytest.fixture(scope="module")
def built(tree):
    """The same, built in place."""
    if shutil.which("c++") is None:
        pytest.skip("no c++")
    run_in(tree, "setup.py", "build_ext", "--inplace", CUDA_HOME="/nonexistent", MAX_JOBS="2")
    return tree


class TestExample:
    def test_it_has_the_files_that_every_operation_has(self):
        files = [
            path.relative_to(EXAMPLE)
            for path in EXAMPLE.rglob("*")
            if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu")
        ]
        assert len(files) == 7
        for path in files:
            for operation in OPERATIONS:
                assert (ROOT / path.parent / path.name.replace("soft_threshold", operation)).exists()

    def test_its_cpu_kernel_passes_its_tests(self, built):
        said = run_in(built, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, TALIB_FAST_BACKEND="compiled")
        assert " passed" in said and "no compiled kernel" not in said

    def test_its_benchmark_runs(self, built, tmp_path):
        command = ("benchmarks/bench_soft_threshold.py", "--quick", "--out", tmp_path)
        assert "| 16,384 |" not in run_in(built, *command, TALIB_FAST_BACKEND="compiled")
        assert json.loads((tmp_path / "results.json").read_text())["environment"]["backend"] == "compiled"
        assert "| 16,384 | float32 |" in (tmp_path / "table.md").read_text()

    def test_its_cuda_kernel_passes_its_tests_on_the_host(self, tree, tmp_path):
        if reason := simt_support.missing("plain"):
            pytest.skip(reason)
        for command in (
            ["cmake", "-S", tree / "tests" / "simt", "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", tmp_path, "--target", "talib_fast_simt"],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0 and "warning: " not in done.stdout, done.stdout
        said = run_in(
            tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, "-k", "cpu and (TestOperation or TestKernels)",
            "--library", tmp_path / "libtalib_fast_simt.so",
            TALIB_FAST_BACKEND="pytorch", SIMT_SEED="1", SIMT_BLOCKS="2",
        )  # fmt: skip
        assert " passed" in said

    def test_its_cuda_kernel_does_not_spill(self, tree, toolkit):
        if "9.0" not in toolkit.architectures:
            pytest.skip(f"the nvcc found, {toolkit.nvcc}, does not know 9.0")
        functions, faults = architectures.check(str(tree / "csrc" / "cuda" / "soft_threshold.cu"), toolkit, ["9.0"])
        assert len(functions) == 16 and not faults

    def test_its_types_are_right(self, tree):
        pytest.importorskip("mypy", reason="no mypy")
        if (ROOT / ".mypy_cache").exists():  # torch's types are known then
            shutil.copytree(ROOT / ".mypy_cache", tree / ".mypy_cache")
        files = ("talib_fast/ops/soft_threshold.py", "benchmarks/bench_soft_threshold.py")
        assert "no issues found in 2 source files" in run_in(tree, "-m", "mypy", *files)
