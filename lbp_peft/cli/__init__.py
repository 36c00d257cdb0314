"""The command `lbp-peft`: recommend settings, report layouts, print versions."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "recommend": "measure candidate settings on your model, data and machine, and recommend one",
    "report": "show what the backward pass of each layer would do, and how good the gradients are",
    "version": "print the versions of lbp-peft and of what it runs on",
}
_NEEDED = ("datasets", "PIL")
_DESCRIPTION = "Low-rank backpropagation (LBP-WHT) for vision models: what it gains for yours, and with which settings."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The arguments without the program's name; None: those of the command line.

    Raises:
        SystemExit: with a message and code 1 or 2, or with 0 after --help.
    """
    parser = argparse.ArgumentParser(
        "lbp-peft", description=_DESCRIPTION, epilog="`lbp-peft COMMAND --help` shows a command's options."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name == "version":
            commands.add_parser(name, help=text, description=text)
        else:  # each command parses its own flags
            commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words if words[:1] == ["version"] else words[:1])
    _quieten()
    from ..loading.terminal import plain_messages

    with plain_messages():
        if options.command == "version":
            _print_version()
            return
        try:
            command = importlib.import_module(f".{options.command}", __name__)
        except ModuleNotFoundError as error:
            if error.name not in _NEEDED:
                raise
            raise SystemExit(
                f'lbp-peft {options.command} needs the package {error.name}: pip install "lbp-peft[cli]"'
            ) from None
        command.main(words[1:])


def _quieten() -> None:
    """Silence messages of transformers and the hub. Errors end in a line of this program."""
    import huggingface_hub
    import transformers

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    if "HF_HUB_VERBOSITY" not in os.environ:
        huggingface_hub.logging.set_verbosity_error()


def _print_version() -> None:
    from ..environment import environment

    versions = environment()
    for name in (
        "lbp-peft",
        "torch",
        "transformers",
        "peft",
        "timm",
        "python",
        "processor",
        "instructions",
        "cores",
        "gpu",
    ):
        if versions[name] is not None:
            print(f"{name} {versions[name]}")
