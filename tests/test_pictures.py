"""Pictures of samples."""

import torch
from matplotlib.axes import Axes

from fewstep.samplers.pictures import contact_sheet


def test_a_sheet_shows_how_far_each_row_is_from_the_last(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, image, **_: drawn.append(image))
    last = torch.linspace(0, 1, 4 * 16).reshape(4, 1, 4, 4)
    rows = [("far", last + 0.2), ("near", last + 0.02), ("reference", last)]
    path = contact_sheet(tmp_path / "sheet.png", rows, lambda x: x[:, 0], differences=True)
    assert path is not None
    far, near, none = ([i.sum() for i in drawn[4 * k + 2 : 4 * k + 4]] for k in range(3))
    assert min(far) > 2 * max(near)
    assert min(near) > 2 * max(none)
    wanted = last[:2, 0, ..., None].expand(-1, -1, -1, 3).numpy()
    for image, given in zip(drawn[8:10], wanted, strict=True):
        assert (image == given).all()
