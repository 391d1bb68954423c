"""Pictures of samples, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.space.files import write_whole


def tiles(x: Tensor, low: float, high: float) -> Tensor | None:
    """Samples (B, *shape) as images (B, H, W, 3) in 0..1; None if their shape is no image."""
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        return None
    scaled = (x - low) / max(high - low, 1e-12)
    return scaled.clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def contact_sheet(
    path: Path,
    rows: Sequence[tuple[str, Tensor]],
    picture: Any = None,
    *,
    differences: bool = False,
) -> Path | None:
    """One row of images per (label, samples); None if the samples are no images.

    Args:
        path: PNG to write.
        rows: labels and samples (B, *shape), the same noise in each column; the last row sets the
            grey scale.
        picture: samples -> (B, H, W) or (B, H, W, 3) in 0..1; None for a default.
        differences: the right half of every row shows how far the images of its left half are
            from those of the last row; all rows have one scale.
    """
    from matplotlib.figure import Figure

    low, high = float(rows[-1][1].min()), float(rows[-1][1].max())
    images = []
    for _, x in rows:
        drawn = tiles(x, low, high) if picture is None else torch.as_tensor(picture(x)).float()
        if drawn is None:
            return None
        images.append(drawn if drawn.ndim == 4 else drawn[..., None].expand(-1, -1, -1, 3))
    count = len(images[0])
    if differences and count > 1:
        count -= count % 2
        images = _beside(images, count // 2)
    figure = Figure(figsize=(2.6 + 0.62 * count, 0.66 * len(rows) + 0.1))
    axes = figure.subplots(
        len(rows), count, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04}
    )
    for r, (label, _) in enumerate(rows):
        for c in range(count):
            axes[r, c].imshow(images[r][c].numpy(), interpolation="nearest")
            axes[r, c].set_axis_off()
        axes[r, 0].text(
            -0.15, 0.5, label, transform=axes[r, 0].transAxes, ha="right", va="center", fontsize=8
        )
    top = 0.99
    if differences and count > 1:
        top = 1 - 0.22 / (0.66 * len(rows) + 0.1)
        half = axes[0, count // 2]
        half.set_title("difference to the last row", fontsize=8, loc="left", pad=3)
    figure.subplots_adjust(left=2.5 / (2.6 + 0.62 * count), right=0.995, top=top, bottom=0.01)
    return save_figure(figure, path, dpi=110)


def _beside(images: Sequence[Tensor], half: int) -> list[Tensor]:
    """The first images of each row, and beside them how far they are from the last row's."""
    from matplotlib import colormaps

    shown = [row[:half] for row in images]
    apart = [(row - shown[-1]).abs().mean(dim=-1) for row in shown]
    most = float(torch.stack(apart[:-1] or apart).quantile(0.995)) or 1.0
    colours = [colormaps["inferno"]((gap / most).clamp(0, 1).sqrt().numpy()) for gap in apart]
    maps = [torch.from_numpy(c[..., :3]).to(shown[0]) for c in colours]
    return [torch.cat(pair) for pair in zip(shown, maps, strict=True)]


def save_figure(figure: Any, path: Path, dpi: int) -> Path:
    """Write a figure as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return write_whole(path, buffer.getvalue())
