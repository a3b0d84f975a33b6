"""Compile the library of autograd nodes against the headers of other versions of torch.

    python tools/autograd_versions.py 2.10.0 2.11.0 2.12.1 2.14.1

Autograd nodes have no stable ABI, so a version of torch may need other code. setup.py compiles only for the installed
version. This tool fails on an error or a warning with any of the named versions. It needs a C++ compiler and pip, which
downloads each version's wheel for this Python; only the headers are kept, and only while the tool runs.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import build_parts

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shlex.split(os.environ.get("CXX") or "c++")


def command(version: str, include: Path, sources: Sequence[Path]) -> list[str]:
    """A command that compiles ``sources`` with torch's headers in ``include`` as setup.py does, but writes nothing."""
    headers = [include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"]]
    return [
        *(*COMPILER, "-fsyntax-only", *build_parts.AUTOGRAD_FLAGS, "-Wall", "-Wextra", "-Werror"),
        *("-DTORCH_EXTENSION_NAME=_autograd", "-D{}={}".format(*build_parts.autograd_macro(version))),
        *(f"-isystem{folder}" for folder in headers),
        *map(str, sources),
    ]


def check(version: str, include: Path, sources: Sequence[Path]) -> str:
    """The first error of compiling ``sources`` with the headers of torch ``version`` in ``include``; empty if none."""
    done = subprocess.run(command(version, include, sources), capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return build_parts.first_error(done.stderr.splitlines(), ROOT) or done.stderr


def download(version: str, folder: Path) -> None:
    """Download the wheel of torch ``version`` for this Python, and extract its headers to ``folder``.

    Raises:
        subprocess.CalledProcessError: pip finds no wheel.
    """
    words = ["--quiet", "--no-deps", "--only-binary=:all:", f"torch=={version}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "-d", folder, *words], check=True)
    (wheel,) = folder.glob("torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    wheel.unlink()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument(
        "--headers", type=Path, metavar="DIR", help="use the headers in DIR/VERSION/torch/include; download nothing"
    )
    arguments = parser.parse_args(argv)
    if shutil.which(COMPILER[0]) is None:
        print(f"nothing can be compiled: there is no C++ compiler {COMPILER[0]}", file=sys.stderr)
        return 1
    sources = sorted((ROOT / "csrc" / "autograd").glob("*.cpp"))
    status = 0
    for version in arguments.versions:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.headers or Path(scratch)) / version
            try:
                if arguments.headers is None:
                    download(version, folder)
                fault = check(version, folder / "torch" / "include", sources)
            except subprocess.CalledProcessError:
                fault = "pip finds no wheel of this version"
        print(f"{version:<8}{fault or 'compiles'}", flush=True)
        status |= bool(fault)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
