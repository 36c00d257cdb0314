"""Draws bases.png: the first Walsh bases of a block, and how a 14 x 14 grid is cut.

python docs/images/draw_bases.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lbp_peft.bases.basis_set import BasisSet
from lbp_peft.bases.separable import grid_bases
from lbp_peft.bases.walsh import basis_order

KEPT = 10


def main() -> None:
    figure, axes = plt.subplots(2, KEPT, figsize=(11, 3), layout="constrained")
    names = basis_order("lp_l1", range(8), range(8))
    rows = {
        "one 8 x 8 block": ((8, 8), grid_bases((8, 8), BasisSet(KEPT)).dense_analysis()),
        "14 x 14 patches,\nfirst of 4 blocks": ((14, 14), grid_bases((14, 14), BasisSet(KEPT)).dense_analysis()),
    }
    for number, (line, (label, (grid, bases))) in enumerate(zip(axes, rows.items(), strict=True)):
        for axis, basis, name in zip(line, bases, names, strict=False):
            limit = np.abs(basis).max()
            axis.imshow(basis.reshape(grid), cmap="RdBu", vmin=-limit, vmax=limit)
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(f"({name[0]}, {name[1]})", fontsize=10)
        line[0].set_ylabel(label, fontsize=9)
    figure.savefig(Path(__file__).with_name("bases.png"), dpi=130)


if __name__ == "__main__":
    main()
