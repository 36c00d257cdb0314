"""Adapt a Vision Transformer to semantic segmentation with LBP-WHT, LoRA and full fine-tuning, and compare them.

    python examples/semantic_segmentation.py

runs an embedded example: a small SegFormer that finds the handwritten digits 0-4 in wide scenes is adapted to 5-9 by
each method. With --model and --dataset (or --train-files) it does the same with your own; `accelerate launch` runs it
on many processes. It trains, tests, writes each adapter, reloads it and checks that its predictions agree, and ends
with a table, a plot, a picture of predictions and results.json in the output folder. Options come from flags or from
--config FILE.yaml; flags win.
"""

from __future__ import annotations

from common.experiment import main
from common.segmentation import Segmentation

from lbp_peft.loading.terminal import plain_messages

if __name__ == "__main__":
    with plain_messages(training=True):
        main(Segmentation(), __doc__)
