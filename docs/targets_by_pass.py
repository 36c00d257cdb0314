"""Count the models whose default targets a forward pass decides, for docs/models.md.

    python docs/targets_by_pass.py

For each small instance of the tests it writes whether a pass of a copy without values decides, or the structure alone,
and the layers that the pass adds to those that the structure shows or leaves out. Models of timm need timm.
"""

from __future__ import annotations

import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "tests" / "support")]

import architectures  # noqa: E402
import timm_architectures  # noqa: E402
import vlm_architectures  # noqa: E402

from lbp_peft.encoder import encoder_linears  # noqa: E402
from lbp_peft.tuner.targets import seen_without_values  # noqa: E402

TABLES = {
    "vision models of transformers": architectures.ARCHITECTURES,
    "vision-language and encoder-decoder models": vlm_architectures.ARCHITECTURES,
    "models of timm": timm_architectures.ARCHITECTURES if find_spec("timm") else [],
}


def main() -> None:
    """Write one line for each model, and the numbers."""
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for table, several in TABLES.items():
        counts: Counter[str] = Counter()
        for architecture in several:
            if getattr(architecture, "why_not_here", str)():
                continue
            model = architecture.build()
            blocks = encoder_linears(model)
            seen = seen_without_values(model, blocks)
            targets = blocks if seen is None else seen.targets(model, blocks)
            counts["the structure" if seen is None else "a pass"] += 1
            differing = [f"+{name}" for name in targets if name not in blocks]
            differing += [f"-{name}" for name in blocks if name not in targets]
            counts["with other layers"] += bool(differing)
            print(f"{architecture.name}: {'structure' if seen is None else 'pass'}", *differing)
        print(f"{table}: {dict(counts)}")


if __name__ == "__main__":
    main()
