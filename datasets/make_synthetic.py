"""Create a small synthetic detection data set, to train without downloads: shapes among clutter.

::

    labeled.json          labeled/000000.jpg ...      a few images with boxes
    unlabeled_truth.json  unlabeled/000000.jpg ...    many images; their boxes are for analysis only
    val.json              val/000000.jpg ...          test images
    made_with.json                                    arguments that the data set was created with

Classes and clutter share colors, textures and sizes; only their outlines differ. An image depends
only on ``(seed, split, index)``, size and style. Adding images therefore does not change earlier
ones, and the same arguments give the same bytes (with the same versions of numpy and OpenCV).

Points are xy in absolute pixels, where pixel ``i`` covers ``[i, i + 1]``. Boxes are COCO's xywh in
the same units. In array shapes, ``k`` is ``SUPERSAMPLING``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

FORMAT = 1  # increase when the same arguments give other files
ANNOTATIONS = {"labeled": "labeled", "unlabeled": "unlabeled_truth", "val": "val"}
SPLITS = tuple(ANNOTATIONS)
SUPERSAMPLING = 4  # images are drawn this much larger and averaged down, for smooth edges
PLACEMENT_TRIES = 20


@dataclass(frozen=True)
class SceneStyle:
    """Appearance of the scenes, which determines their difficulty. Pairs are inclusive ranges."""

    classes: tuple[str, ...] = ("disc", "square", "triangle")  # from SHAPES
    objects: tuple[int, int] = (1, 3)
    extent: tuple[float, float] = (0.3, 0.6)  # longer side of the box / image side
    aspect: tuple[float, float] = (0.75, 1.33)  # before the rotation
    min_visibility: float = 0.5  # least visible part of an object's area
    clutter_in_front: tuple[int, int] = (0, 1)
    clutter_behind: tuple[int, int] = (0, 3)
    clutter_extent: tuple[float, float] = (0.12, 0.3)
    hue_spread: float = 40.0  # degrees around the hue of a class; clutter has any hue
    contrast: float = 110.0  # minimum distance to the mean background color, in BGR of 0..255
    relief: tuple[float, float] = (0.0, 8.0)  # amplitude of the shading of pieces, of 0..255
    rim: float = 0.75  # brightness of edges, to separate pieces of the same color
    texture: tuple[float, float] = (2.0, 6.0)  # amplitude of the background texture, of 0..255
    gain: tuple[float, float] = (0.8, 1.1)
    blur: tuple[float, float] = (0.2, 0.5)  # sigma in pixels
    noise: tuple[float, float] = (1.0, 4.0)  # sigma, of 0..255


@dataclass(frozen=True)
class Piece:
    """A drawn shape: an object, or clutter if its category is 0."""

    outline: np.ndarray  # (N, 2) corners of a polygon, xy in pixels; can exceed the image
    mask: np.ndarray  # (S * k, S * k) bool, the part inside the image, covered or not
    category: int  # 1-based index into SceneStyle.classes

    @property
    def box(self) -> list[float]:
        """Tight xywh box, in pixels, of the part inside the image, including covered parts."""
        return [side / SUPERSAMPLING for side in cv2.boundingRect(self.mask.astype(np.uint8))]


def polar(radii: np.ndarray, turns: float = 1.0) -> np.ndarray:
    """``(N, 2)`` points at ``(N,)`` radii, equally spaced over a number of turns of a circle."""
    angles = np.arange(len(radii)) * (2 * np.pi * turns / len(radii))
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Outlines: (N, 2) corners, at any position and scale
SHAPES: dict[str, np.ndarray] = {
    "disc": polar(np.ones(64)),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": polar(np.ones(3)),
    "star": polar(np.tile([1.0, 0.45], 5)),
}


def clutter_outline(rng: Generator) -> np.ndarray:
    """``(N, 2)`` corners of a line, a segment of a ring, a cross or a blob."""
    width = rng.uniform(0.05, 0.25)
    kind = rng.integers(4)
    if kind == 0:
        return SHAPES["square"] * [1, width / 2]
    if kind == 1:
        edge = polar(np.ones(32), rng.uniform(0.2, 0.85))
        return np.concatenate([edge, edge[::-1] * (1 - width)])
    if kind == 2:
        x, y = np.array([[1, 1, width], [-width, width, width]])
        return np.concatenate([np.stack(arm, 1) for arm in ((x, y), (-y, x), (-x, -y), (y, -x))])
    # No fourth and fifth harmonic: such blobs would look like squares and stars.
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)[:, None] + rng.uniform(0, 2 * np.pi, 3)
    return polar(1 + np.cos(angles * [2, 3, 7]) @ rng.uniform([0.1, 0.12, 0.04], [0.22, 0.25, 0.1]))


def log_uniform(rng: Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniformly distributed."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def rasterize(outline: np.ndarray, size: int) -> np.ndarray:
    """``(size * k, size * k)`` bool mask of a polygon given in pixels."""
    mask = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    # OpenCV's origin is the center of the first pixel, not its corner.
    points = (outline * SUPERSAMPLING - 0.5) * 2**8
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1, cv2.LINE_8, shift=8)
    return mask.astype(bool)


def visibility(piece: Piece, covered: np.ndarray) -> float:
    """Share of a shape's area that is inside the image and not covered."""
    whole = piece.outline - piece.outline.min(axis=0)
    area = rasterize(whole, int(np.ceil(whole.max())) + 1).sum()
    return float((piece.mask & ~covered).sum() / area)


def place(rng: Generator, size: int, style: SceneStyle, category: int) -> Piece:
    """Draw an object (or clutter, category 0) with random stretch, rotation, size and position."""
    outline = SHAPES[style.classes[category - 1]] if category else clutter_outline(rng)
    stretch = log_uniform(rng, *style.aspect) ** 0.5
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outline = outline * [stretch, 1 / stretch] @ turn
    extent = size * log_uniform(rng, *(style.extent if category else style.clutter_extent))
    outline *= extent / np.ptp(outline, axis=0).max()
    outline += rng.uniform(0.05 * size, 0.95 * size, 2) - (outline.min(0) + outline.max(0)) / 2
    return Piece(outline, rasterize(outline, size), category)


def compose(rng: Generator, size: int, style: SceneStyle) -> list[Piece]:
    """Draw the pieces of a scene, front to back.

    Pieces in front are placed first, so that the visible part of an object is known when it is
    placed. An object for which no position with enough visibility is found is left out of the
    image, because an object without a box would be a wrong label.
    """
    counts = (style.clutter_in_front, style.objects, style.clutter_behind)
    in_front, objects, behind = (rng.integers(*count, endpoint=True) for count in counts)
    categories = [0] * in_front + (rng.integers(len(style.classes), size=objects) + 1).tolist()
    covered = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), bool)
    pieces: list[Piece] = []
    for category in categories:
        for _ in range(PLACEMENT_TRIES):
            piece = place(rng, size, style, category)
            if category == 0 or visibility(piece, covered) >= style.min_visibility:
                pieces.append(piece)
                covered |= piece.mask
                break
    return pieces + [place(rng, size, style, 0) for _ in range(behind)]


def draw_background(rng: Generator, size: int, style: SceneStyle) -> np.ndarray:
    """``(size, size, 3)`` float32 BGR image: a gradient with a coarse and a fine texture."""
    image = np.full((size, size, 3), rng.uniform(60, 195, 3), np.float32)
    for cells in (2, rng.integers(4, 9), rng.integers(12, 33)):
        amplitude = rng.uniform(*style.texture)
        grid = rng.normal(0, amplitude, (cells, cells, 1))  # brightness
        grid = grid + rng.normal(0, amplitude / 2, (cells, cells, 3))  # color
        image += cv2.resize(grid.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return image


def pick_color(rng: Generator, category: int, ground: np.ndarray, style: SceneStyle) -> np.ndarray:
    """Draw a ``(3,)`` BGR color that differs from ``ground``, the mean color of the background.

    Classes have a typical hue, clutter (category 0) does not.
    """
    hue = rng.uniform(0, 360, 64)
    if category:
        hue = 360 * (category - 1) / len(style.classes) + rng.normal(0, style.hue_spread, 64)
    colors = np.stack([hue % 360, rng.uniform(0.35, 1, 64), rng.uniform(60, 240, 64)], axis=1)
    colors = cv2.cvtColor(colors[None].astype(np.float32), cv2.COLOR_HSV2BGR)[0]
    # The first color that differs enough, or else the one that differs most.
    distance = np.linalg.norm(colors - ground, axis=1).clip(max=style.contrast)
    return colors[np.argmax(distance)]


def paint(
    canvas: np.ndarray, mask: np.ndarray, color: np.ndarray, rng: Generator, style: SceneStyle
) -> None:
    """Fill the mask in place with a color and a wave, which appears as shading or as stripes."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((2 * SUPERSAMPLING - 1,) * 2, np.uint8))
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    window = np.s_[top : top + height, left : left + width]  # only for speed
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / (len(canvas) * log_uniform(rng, 0.06, 1.0))
    y, x = np.ogrid[:height, :width]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * frequency + phase)[..., None]
    fill = color + rng.uniform(*style.relief) * wave.astype(np.float32)
    fill *= np.where(inside[window], 1, style.rim)[..., None]
    np.copyto(canvas[window], fill, where=mask[window][..., None])


def render(pieces: list[Piece], rng: Generator, size: int, style: SceneStyle) -> np.ndarray:
    """Render pieces, given front to back, as a ``(size, size, 3)`` uint8 BGR image."""
    ground = draw_background(rng, size, style)
    canvas = cv2.resize(ground, None, fx=SUPERSAMPLING, fy=SUPERSAMPLING)
    for piece in reversed(pieces):
        color = pick_color(rng, piece.category, ground.mean(axis=(0, 1)), style)
        paint(canvas, piece.mask, color, rng, style)
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image * rng.uniform(*style.gain), (0, 0), rng.uniform(*style.blur))
    image += rng.normal(0, rng.uniform(*style.noise), image.shape)
    return np.round(image.clip(0, 255)).astype(np.uint8)


def make_image(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, list[Piece]]:
    """Create an image, ``(size, size, 3)`` uint8 BGR, and its pieces, front to back."""
    style = SceneStyle()
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    pieces = compose(rng, size, style)
    return render(pieces, rng, size, style), pieces


def write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write a split's images and its COCO json (boxes xywh in absolute pixels) under ``root``."""
    images: list[dict] = []
    annotations: list[dict] = []
    (root / split).mkdir()
    for index in tqdm(range(count), desc=split, disable=None):  # None: only on terminals
        image = {"id": index + 1, "file_name": f"{index:06d}.jpg", "width": size, "height": size}
        images.append(image)
        pixels, pieces = make_image(seed, split, index, size)
        jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        # Not cv2.imwrite, which does not raise an error if the disk is full.
        (root / split / image["file_name"]).write_bytes(jpeg.tobytes())
        for piece in (piece for piece in pieces if piece.category):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": piece.category,
                    "iscrowd": 0,
                    "bbox": piece.box,
                    "area": piece.box[2] * piece.box[3],
                }
            )
    categories = [{"id": n, "name": name} for n, name in enumerate(SceneStyle().classes, 1)]
    info = {"description": f"synthetic shapes, {split}", "version": str(FORMAT)}
    coco = {"info": info, "categories": categories, "images": images, "annotations": annotations}
    (root / f"{ANNOTATIONS[split]}.json").write_text(json.dumps(coco))


def is_up_to_date(output: Path, made_with: dict, force: bool) -> bool:
    """Whether ``output`` already contains this data set.

    Raises:
        FileExistsError: if it contains files that must not be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    record = output / "made_with.json"
    if not record.is_file():  # not ours: not even --force may delete them
        raise FileExistsError(
            f"{output} exists and is not a synthetic data set; use another --output"
        )
    if not force and json.loads(record.read_text()) != made_with:
        raise FileExistsError(
            f"{output} was created with other arguments; use --force or another --output"
        )
    return not force


def make_dataset(
    output: Path, labeled: int, unlabeled: int, val: int, size: int, seed: int, force: bool = False
) -> None:
    """Write the data set to ``output``, unless it already exists with the same arguments.

    Args:
        output: folder of the data set; it is created when the data set is complete.
        labeled, unlabeled, val: numbers of images.
        size: side of the square images in pixels, at least 32.
        seed: seed of all images.
        force: replace an existing synthetic data set.

    Raises:
        FileExistsError: if ``output`` contains another synthetic data set (without ``force``), or
            anything else.
        ValueError: if a number is out of range.
    """
    counts = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
    if min(*counts.values(), seed) < 0 or size < 32:
        raise ValueError("numbers of images and seed must be at least 0, and --size at least 32")
    output = Path(output).resolve()
    made_with = {"format": FORMAT, **counts, "size": size, "seed": seed}
    record = json.dumps({**made_with, "style": asdict(SceneStyle())}, indent=2) + "\n"
    if is_up_to_date(output, json.loads(record), force):  # loads turns tuples into lists
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Next to output, so that it can be renamed. Removed at the end, also after an error.
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        root = Path(temporary, "made")
        root.mkdir()
        for split, count in counts.items():
            write_split(root, split, count, size, seed)
        (root / "made_with.json").write_text(record)
        if output.exists():
            output.rename(Path(temporary, "replaced"))
        root.rename(output)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog="example: python datasets/make_synthetic.py --output datasets/mine --unlabeled 1000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    folder = Path(__file__).parent / "synthetic"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the data set")
    for split, count in zip(SPLITS, (40, 500, 200), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help="number of images")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--force", action="store_true", help="replace an existing data set")
    options = parser.parse_args(arguments)
    try:
        make_dataset(**vars(options))
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.exit(1, f"error: cannot write {options.output}: {error.strerror or error}\n")
    print(f"{options.output}: {options.labeled} + {options.unlabeled} + {options.val} images")


if __name__ == "__main__":
    main()
