"""Compiles the library of autograd nodes against the headers of other versions of torch.

    python tools/autograd_versions.py 2.10.0 2.11.0 2.12.1 2.14.1

There is no stable ABI for nodes: every version of torch may ask for other code, and setup.py tries the one that is
installed. This fails on an error or a warning with any that is named. It needs a C++ compiler, and pip to download the
wheel of each for this Python, of which it keeps the headers as long as it takes.
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
    """What compiles ``sources`` with torch's headers in ``include``, as setup.py would, and writes nothing."""
    headers = [include, include / "torch" / "csrc" / "api" / "include", sysconfig.get_paths()["include"]]
    return [
        *(*COMPILER, "-fsyntax-only", *build_parts.AUTOGRAD_FLAGS, "-Wall", "-Wextra", "-Werror"),
        *("-DTORCH_EXTENSION_NAME=_autograd", "-D{}={}".format(*build_parts.autograd_macro(version))),
        *(f"-isystem{folder}" for folder in headers),
        *map(str, sources),
    ]


def check(version: str, include: Path, sources: Sequence[Path]) -> str:
    """What is wrong with ``sources`` under the headers of torch ``version`` in ``include``, if anything is."""
    done = subprocess.run(command(version, include, sources), capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return build_parts.first_error(done.stderr.splitlines(), ROOT) or done.stderr


def download(version: str, folder: Path) -> None:
    """Fetch the wheel of torch ``version`` for this Python, and leave its headers in ``folder``.

    Raises:
        subprocess.CalledProcessError: pip finds none.
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
        "--headers", type=Path, metavar="DIR", help="take DIR/VERSION/torch/include, and download nothing"
    )
    arguments = parser.parse_args(argv)
    if shutil.which(COMPILER[0]) is None:
        print(f"nothing is compiled: there is no C++ compiler {COMPILER[0]}", file=sys.stderr)
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
                fault = "pip finds no wheel of it"
        print(f"{version:<8}{fault or 'compiles'}", flush=True)
        status |= bool(fault)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
