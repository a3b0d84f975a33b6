"""Build the compiled libraries with the installed compilers; without a compiler the package is pure Python.

`_C` has the kernels, for every torch and Python. `_autograd` has autograd nodes, only for the torch and the Python that
it is built with. tools/build_parts.py decides what is built, and gives the reason if a part is left out.
"""

import contextlib
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "talib_fast builds against the installed torch, but torch is not installed: "
        "pip install torch setuptools ninja, then install talib_fast again with --no-build-isolation"
    )

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import build_parts  # noqa: E402


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


AUTOGRAD_SOURCES = sources("csrc/autograd/*.cpp")
COMMON_SOURCES, CPU_SOURCES = sources("csrc/*.cpp"), sources("csrc/cpu/*.cpp")
COMMON_CUDA_SOURCES, CUDA_SOURCES = sources("csrc/*.cu"), sources("csrc/cuda/*.cu")
KERNELS = CppExtension(
    "talib_fast._C", [], define_macros=[("TORCH_TARGET_VERSION", build_parts.STABLE_ABI)], py_limited_api=True
)
NODES = CppExtension(
    "talib_fast._autograd",
    AUTOGRAD_SOURCES,
    define_macros=[build_parts.autograd_macro(torch.__version__)],
    extra_compile_args=list(build_parts.AUTOGRAD_FLAGS),
)
BUILDING = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install"}  # the commands that build something


def say(sentence: str) -> None:
    """Print a sentence on stderr, if this command builds something."""
    if BUILDING & set(sys.argv):
        print(f"talib_fast: {sentence}", file=sys.stderr)


def visible_gpus() -> Iterator[str]:
    with contextlib.suppress(RuntimeError):  # without a working driver there is no GPU
        for index in range(torch.cuda.device_count()):
            yield "{}.{}".format(*torch.cuda.get_device_capability(index))


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """A context in which all output of this process and its compilers also goes into a list."""
    lines: list[str] = []
    threads = []
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}

    def pass_on(reader: int, writer: int) -> None:
        with os.fdopen(reader, errors="replace") as source:
            for line in source:
                lines.append(line)
                os.write(writer, line.encode())

    for number, original in saved.items():
        reader, writer = os.pipe()
        threads.append(threading.Thread(target=pass_on, args=(reader, original)))
        os.dup2(writer, number)
        os.close(writer)
        threads[-1].start()
    try:
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in saved.items():
            os.dup2(original, number)
        for thread in threads:
            thread.join()
        for original in saved.values():
            os.close(original)


class Build(BuildExtension):
    """Builds the kernels, or only the CPU part if the CUDA part fails, or nothing if that fails too. Then the nodes."""

    def run(self) -> None:
        self.options, built = dict(vars(self)), []
        if self.build_kernels():
            built.append(KERNELS)
            failure = plan.without_autograd or self.attempt(NODES)
            if failure:
                say(build_parts.autograd_failed(failure))
                # a library of an earlier build may not fit the new kernels, but would get into the wheel
                Path(self.get_ext_fullpath(NODES.name)).unlink(missing_ok=True)
            else:
                built.append(NODES)
        self.extensions = built

    def build_kernels(self) -> bool:
        without_cuda = plan.without_cuda
        if not without_cuda:
            self.plan_kernels("")
            failure = self.attempt(KERNELS)
            if not failure:
                return True
            if os.environ.get("FORCE_CUDA") == "1":
                sys.exit(f"talib_fast: FORCE_CUDA=1 asks for CUDA kernels, but {build_parts.cuda_failed(failure)}")
            without_cuda = build_parts.cuda_failed(failure)
        self.plan_kernels(without_cuda)
        failure = self.attempt(KERNELS)
        say(build_parts.library_failed(failure) if failure else f"the CUDA kernels are not built: {without_cuda}")
        return not failure

    def plan_kernels(self, without_cuda: str) -> None:
        """Set the sources and flags of the kernels."""
        cxx = [*build_parts.CXX_FLAGS, "-g0"]  # Python's flags ask for debug information, most of the library's size
        nvcc = [*build_parts.NVCC_FLAGS]
        link = [f"-Wl,--defsym={build_parts.sources_symbol(ROOT / 'csrc')}=0"]
        link += ["-Wl,--push-state,--no-as-needed", "-ltorch", "-lc10", "-Wl,--pop-state", "-ldl"]
        cuda_sources: list[str] = []
        for_cuda = {"without_cuda": without_cuda}
        if not without_cuda:
            assert not isinstance(toolkit, str)
            cuda_sources = CUDA_SOURCES
            architectures = build_parts.architecture_list(os.environ, toolkit.architectures, visible_gpus())
            for_cuda = {"nvcc": toolkit.version, "architectures": architectures}
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
            cpp_extension.CUDA_HOME = toolkit.root
            threads = build_parts.nvcc_threads(os.environ, os.cpu_count() or 1, len(CUDA_SOURCES))
            nvcc.append(f"--threads={threads}")
            for source in (*COMMON_CUDA_SOURCES, *CUDA_SOURCES):
                # with a torch without CUDA, ninja does not know the headers that these files depend on
                Path(self.build_temp, source).with_suffix(".o").unlink(missing_ok=True)
            link += [f"-L{path}" for path in toolkit.library_dirs]
            link += ["-lcudart_static", "-lrt", "-lpthread", "-Wl,--exclude-libs,libcudart_static.a"]
        text = build_parts.build_text(torch.__version__, CPU_SOURCES, cuda_sources, for_cuda)
        cxx.append(f"-DTALIB_FAST_BUILD={build_parts.c_string(text)}")
        KERNELS.sources = [*COMMON_SOURCES, *CPU_SOURCES, *(COMMON_CUDA_SOURCES if cuda_sources else ()), *cuda_sources]
        KERNELS.extra_compile_args = {"cxx": cxx, "nvcc": nvcc}
        KERNELS.extra_link_args = link

    def attempt(self, extension: Extension) -> str:
        """Build the extension; returns the first error, empty if there is none."""
        self.extensions = [extension]
        with overheard() as lines:
            try:
                super().run()
                return ""
            except Exception as error:  # a compiler, or its absence, can raise any error
                failure = f"{type(error).__name__}: {error}".partition("\n")[0]
            finally:
                vars(self).update(self.options)  # a run changes some options, and does not restore them if it fails
        return build_parts.first_error(lines, ROOT) or failure


toolkit = build_parts.find_toolkit(os.environ, cpp_extension.CUDA_HOME)
try:
    plan = build_parts.decide(
        os.environ,
        compiler=shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]),
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        toolkit=toolkit,
        cuda_sources=CUDA_SOURCES,
        autograd_sources=AUTOGRAD_SOURCES,
    )
except build_parts.Impossible as impossible:
    sys.exit(f"talib_fast: {impossible}")
if plan.without_library:
    say(plan.without_library)

setup(
    ext_modules=[] if plan.without_library else [KERNELS] if plan.without_autograd else [KERNELS, NODES],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if plan.without_library or plan.without_autograd else {},
)
