"""The commands ``python -m talib_fast finetune`` and ``python -m talib_fast info``."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .training import options, parallel
from .training.common import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m talib_fast", description="Fine-tuning methods of the Transfer-Learning-Library, fused."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="finetune|info")
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a pretrained network with several methods and compare them",
        description="Fine-tune a pretrained network on few labelled images, with each method and seed, and compare\n"
        "them. The same command continues after an interrupt. torchrun --nproc-per-node N -m talib_fast finetune ...\n"
        "shares every batch out among N processes, on a GPU each or on the CPU.",
        epilog=options.describe_methods(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_arguments(finetune)
    commands.add_parser("info", help="versions, devices, and which backend serves each operation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns 0, 1 after a user's error told on stderr, or 130 after an interrupt.

    Of torchrun's processes rank 0 tells the errors that all have, and fails for all: if the others did so too,
    torchrun might end it before it has spoken.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = parallel.rank() == 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with parallel.joined():
            run(arguments)
    except (UserError, OSError) as error:  # an OSError that nobody explained: a full disk, a read-only folder
        if first:
            print(f"talib_fast: {error}", file=sys.stderr)
        elif isinstance(error, OSError | parallel.RankError):
            print(f"talib_fast: rank {parallel.rank()}: {error}", file=sys.stderr)
        else:
            return 0
        return 1
    except KeyboardInterrupt:
        if not first:
            return 0
        print("talib_fast: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


def run(arguments: list[str]) -> None:
    parsed = build_parser().parse_args(arguments)
    if parsed.command == "info":
        from .info import describe

        print(describe())
    else:
        from .training import experiment

        experiment.run(options.parse(parsed), arguments)


if __name__ == "__main__":
    sys.exit(main())
