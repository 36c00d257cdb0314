"""Messages on the terminal: errors in one line each, and warnings on lines of their own."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from tqdm.auto import tqdm


@contextlib.contextmanager
def plain_messages(training: bool = False) -> Iterator[None]:
    """Run a program so that the user's mistakes cause no tracebacks, and warnings show no source lines.

    Each warning is printed once, on a line of its own. Warnings about future changes of other packages are left out,
    since they concern developers and not users.

    Args:
        training: Whether the program has training options, which messages may then recommend.

    Raises:
        SystemExit: an error that is not the program's fault occurred; the message has one line.
    """
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _printer()
        try:
            yield
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            raise SystemExit(in_one_line(stop.code)) from None
        except KeyboardInterrupt:
            advice = " With --checkpoint_every, --resume would go on from the last checkpoint." if training else ""
            print(f"Interrupted.{advice}", file=sys.stderr)
            raise SystemExit(130) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            advice = "give a smaller --batch_size, --eval_batch_size or --image_size. " if training else ""
            raise SystemExit(f"Out of memory: {advice}{in_one_line(error)}") from None
        except OSError as error:
            raise SystemExit(in_one_line(error)) from None


def say(text: str) -> None:
    """Print a line; if several processes run the program, only the first prints it."""
    if _first_process():
        print(text)


def in_one_line(message: object) -> str:
    """The text of a message or an error without line breaks."""
    return " ".join(str(message).split())


def cause_of(error: BaseException) -> str:
    """The first paragraph of an error's message, in one line; the error's type if it has no message."""
    paragraphs = [text for text in str(error).split("\n\n") if text.strip()]
    return in_one_line(paragraphs[0]).rstrip(".") if paragraphs else type(error).__name__


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _printer() -> Callable[..., None]:
    """A replacement for `warnings.showwarning` that prints each message once, and above the progress bar."""
    shown = set()

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        text = in_one_line(message)
        if text not in shown and _first_process():
            shown.add(text)
            tqdm.write(f"Warning: {text}", file=sys.stderr)

    return show
