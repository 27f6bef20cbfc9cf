"""Overviews: pictures side by side."""

import numpy as np
from PIL import Image


def contact_sheet(rows: list[list[np.ndarray]], side: int, columns: int) -> np.ndarray:
    """Rows of images side by side as one picture, on white.

    rows: lists of uint8 [H, W, 3] (a source and its translations); `columns` such lists stand beside each other in a
    row of the sheet; every image is shown `side` pixels wide. Returns uint8.
    """
    gap = max(2, side // 32)
    width = max(len(row) for row in rows)
    cell_width, cell_height = width * (side + gap) + 2 * gap, side + gap
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_width - gap, lines * cell_height + gap), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            picture = Image.fromarray(image)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (i % columns * cell_width + gap + j * (side + gap), i // columns * cell_height + gap))
    return np.array(sheet)
