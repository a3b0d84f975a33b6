"""The commands ``python -m talib_fast finetune``, ``predict``, ``evaluate``, ``export`` and ``info``."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import UsageError, UserError, told

COMMANDS = {
    "finetune": "fine-tune a pretrained network with one method or several, compare them, and keep the best model",
    "predict": "predict the classes of images with a model that finetune kept",
    "evaluate": "measure the accuracy of a model on a folder of labelled images",
    "export": "write a model as ONNX or as a torch.export program",
    "info": "show versions, devices, and the backend that serves each operation",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> Parser:
    from .inference import evaluate, export, predict
    from .training import options

    parser = Parser(
        prog="python -m talib_fast",
        description="Fine-tuning methods of the Transfer-Learning-Library with fused kernels.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    made = {name: commands.add_parser(name, help=words, description=words) for name, words in COMMANDS.items()}
    finetune = made["finetune"]
    finetune.description = (
        "Fine-tune a pretrained network on labelled images with each method and seed, compare them, and keep the\n"
        "best model. After an interrupt, the same command continues where it stopped. With several GPUs,\n"
        "torchrun --nproc-per-node N -m talib_fast finetune ... divides every batch among N processes, each with a\n"
        "GPU of its own or all on the CPU."
    )
    finetune.epilog = options.describe_methods()
    finetune.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_arguments(finetune)
    for module, name in ((predict, "predict"), (evaluate, "evaluate"), (export, "export")):
        module.add_arguments(made[name])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status.

    The status is 0 on success, 2 if the command is wrong, 1 if it failed, and 130 after an interrupt. Each error prints
    one sentence on stderr. Under torchrun, only rank 0 prints an error that all ranks have, and only rank 0 fails with
    it: a failure of another rank could make torchrun end rank 0 before it has printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave_at_once)
    from .training import parallel  # imports torch; an interrupt during the import must not print a traceback

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and classes may not fit the encoding
    first = parallel.rank() == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with parallel.joined():
            return run(arguments)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if first:
            print(f"talib_fast: {told(error)}", file=sys.stderr)
        elif isinstance(error, OSError | parallel.RankError):
            print(f"talib_fast: rank {parallel.rank()}: {told(error)}", file=sys.stderr)
        else:
            return 0
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        if not first:
            return 0
        finetunes = arguments[:1] == ["finetune"]
        more = "; the same command continues where it stopped" if finetunes else ""
        print(f"talib_fast: interrupted{more}", file=sys.stderr)
        return 130


def leave_at_once(number: int, frame: Any) -> NoReturn:
    """A signal handler for the time of torch's import: exit without an exception, since there is nothing to save."""
    os.write(2, b"talib_fast: interrupted\n")
    os._exit(130)


def run(arguments: list[str]) -> int:
    """Parse the words of a command line and run its command; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    if parsed.command == "finetune":
        from .training import command, options

        command.run(options.parse(parsed), arguments)
        return 0
    if parsed.command == "info":
        from .info import describe

        print(describe())
        return 0
    from .inference import evaluate, export, predict

    return {"predict": predict, "evaluate": evaluate, "export": export}[parsed.command].run(parsed)


if __name__ == "__main__":
    sys.exit(main())
