"""The check of layouts by changing pixels confirms layouts that are right, and contradicts those that are not."""

import pytest
from arranged import SIDE, Net, adapted
from models import images
from torch import nn

from lbp_peft import verify_layout
from lbp_peft.layout.operations import RULES


def resized(tokens, factor, mode):
    image = tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return nn.functional.interpolate(image, scale_factor=factor, mode=mode).flatten(2).transpose(1, 2)


class OfResizedImages(Net):
    """A model that resizes its images before it cuts them into patches."""

    def __init__(self, factor, mode):
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, x):
        return super().forward(nn.functional.interpolate(x, scale_factor=self.factor, mode=self.mode))


class CutByReshaping(Net):
    """A model that cuts patches of 16 x 16 pixels by a view of the image, so each lies at its corner."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 16 * 16, 16)

    def forward(self, x):
        x = x.unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).permute(0, 2, 4, 1, 3, 5)
        tokens = self.embed(x.flatten(3).flatten(1, 2))
        for block in self.blocks:
            tokens = tokens + block["fc"](tokens).tanh()
        return tokens


def confirmed(model, x):
    check = verify_layout(adapted(model), {"x": x})
    return check.ok and check.confirmed == ("blocks.0.fc", "blocks.1.fc")


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
@pytest.mark.parametrize("factor", [1.5, 2, 3, 4])
def test_upsampled_grids_and_images_are_confirmed(factor, mode):
    assert confirmed(Net(lambda tokens: resized(tokens, factor, mode)), images())
    assert confirmed(OfResizedImages(factor, mode), images())


def test_patches_that_lie_at_their_corners_are_confirmed():
    assert confirmed(CutByReshaping(), images(1, 224))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_grid_that_is_one_patch_off_is_contradicted(axis, monkeypatch):
    monkeypatch.setitem(RULES, "roll", lambda tracer, x, *args: tracer.positions(x))
    model = adapted(Net(lambda tokens: tokens.unflatten(1, (SIDE, SIDE)).roll(1, axis).flatten(1, 2)))
    check = verify_layout(model, {"x": images()})
    assert len(check.problems) == 2 and "was changed, but the tokens that changed are recorded at" in check.problems[0]
