"""Make a small synthetic detection set: shapes among clutter, for a training without downloads.

::

    labeled.json          labeled/000000.jpg ...      few images with boxes
    unlabeled_truth.json  unlabeled/000000.jpg ...    many without; their truth is for analysis only
    val.json              val/000000.jpg ...          held out
    made_with.json                                    the arguments, by which a set is recognised

The classes share colors, textures and sizes with one another and with the clutter: only outlines
differ. An image follows from ``(seed, split, index)``, size and style, so more images leave earlier
ones as they were; the same arguments give the same bytes (with the same numpy and opencv).

Points are xy in absolute pixels, pixel ``i`` covering ``[i, i + 1]``; boxes are COCO's xywh in the
same units. ``k`` in the shapes of arrays is ``SUPERSAMPLING``.
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

FORMAT = 1  # Raise it when the same arguments would make other files.
ANNOTATIONS = {"labeled": "labeled", "unlabeled": "unlabeled_truth", "val": "val"}
SPLITS = tuple(ANNOTATIONS)
SUPERSAMPLING = 4  # Drawn this many times larger and averaged down, which smooths the edges.
PLACEMENT_TRIES = 20


@dataclass(frozen=True)
class SceneStyle:
    """How the scenes look, and so how hard they are. Pairs are ranges, low to high, inclusive."""

    classes: tuple[str, ...] = ("disc", "square", "triangle")  # from SHAPES
    objects: tuple[int, int] = (1, 3)
    extent: tuple[float, float] = (0.3, 0.6)  # longer side of the box / side of the image
    aspect: tuple[float, float] = (0.75, 1.33)  # stretch before the rotation
    min_visibility: float = 0.5  # part of an object's area that is in the image and uncovered
    clutter_in_front: tuple[int, int] = (0, 1)
    clutter_behind: tuple[int, int] = (0, 3)
    clutter_extent: tuple[float, float] = (0.12, 0.3)
    hue_spread: float = 40.0  # degrees, about a hue for each class; clutter has any hue
    contrast: float = 110.0  # least distance of these from the background's mean, in BGR of 0..255
    relief: tuple[float, float] = (0.0, 8.0)  # amplitude of the pieces' shading, of 0..255
    rim: float = 0.75  # brightness of their edges, which parts pieces of the same color
    texture: tuple[float, float] = (2.0, 6.0)  # amplitude of the background's, of 0..255
    gain: tuple[float, float] = (0.8, 1.1)
    blur: tuple[float, float] = (0.2, 0.5)  # sigma in pixels
    noise: tuple[float, float] = (1.0, 4.0)  # sigma, of 0..255


@dataclass(frozen=True)
class Piece:
    """One drawn thing: an object, or clutter if its category is 0."""

    outline: np.ndarray  # (N, 2) corners of a polygon, xy in pixels; may reach out of the image
    mask: np.ndarray  # (S * k, S * k) bool, what of it is in the image, whether covered or not
    category: int  # 1-based place in SceneStyle.classes

    @property
    def box(self) -> list[float]:
        """Tight xywh, in pixels, of all that is in the image, covered parts too."""
        return [side / SUPERSAMPLING for side in cv2.boundingRect(self.mask.astype(np.uint8))]


def polar(radii: np.ndarray, turns: float = 1.0) -> np.ndarray:
    """``(N, 2)`` points at ``(N,)`` radii, equally spaced over a number of turns."""
    angles = np.arange(len(radii)) * (2 * np.pi * turns / len(radii))
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Outlines: (N, 2) corners, of any place and scale.
SHAPES: dict[str, np.ndarray] = {
    "disc": polar(np.ones(64)),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": polar(np.ones(3)),
    "star": polar(np.tile([1.0, 0.45], 5)),
}


def clutter_outline(rng: Generator) -> np.ndarray:
    """``(N, 2)`` corners of a line, a segment of a ring, a cross or a blob with some lobes."""
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
    # Without the fourth and fifth harmonic, whose lobes would pass for a square's or a star's.
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)[:, None] + rng.uniform(0, 2 * np.pi, 3)
    return polar(1 + np.cos(angles * [2, 3, 7]) @ rng.uniform([0.1, 0.12, 0.04], [0.22, 0.25, 0.1]))


def log_uniform(rng: Generator, low: float, high: float) -> float:
    """As often in ``[x, 2x]`` as in ``[2x, 4x]``."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def rasterize(outline: np.ndarray, size: int) -> np.ndarray:
    """``(size * k, size * k)`` bool mask of a polygon in pixels."""
    mask = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    # opencv counts from the middle of the first pixel, not from its corner: hence the half.
    points = (outline * SUPERSAMPLING - 0.5) * 2**8
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1, cv2.LINE_8, shift=8)
    return mask.astype(bool)


def visibility(piece: Piece, covered: np.ndarray) -> float:
    """Part of the whole shape's area that lies in the image and outside of the covered mask."""
    whole = piece.outline - piece.outline.min(axis=0)
    area = rasterize(whole, int(np.ceil(whole.max())) + 1).sum()
    return float((piece.mask & ~covered).sum() / area)


def place(rng: Generator, size: int, style: SceneStyle, category: int) -> Piece:
    """An object (or clutter, category 0) of random stretch, rotation, size and position."""
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
    """The pieces of a scene, front to back.

    What lies in front is placed first, so how much of an object shows is known when it is placed.
    One that finds no place where enough does is left out of the picture altogether: an object
    without a box would be a wrong label.
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
    """``(size, size, 3)`` float32 BGR: a gradient under a coarse and a fine texture."""
    image = np.full((size, size, 3), rng.uniform(60, 195, 3), np.float32)
    for cells in (2, rng.integers(4, 9), rng.integers(12, 33)):
        amplitude = rng.uniform(*style.texture)
        grid = rng.normal(0, amplitude, (cells, cells, 1))  # brightness
        grid = grid + rng.normal(0, amplitude / 2, (cells, cells, 3))  # color
        image += cv2.resize(grid.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return image


def pick_color(rng: Generator, category: int, ground: np.ndarray, style: SceneStyle) -> np.ndarray:
    """``(3,)`` BGR, apart from the ground's mean: a class tends to a hue, clutter (0) does not."""
    hue = rng.uniform(0, 360, 64)
    if category:
        hue = 360 * (category - 1) / len(style.classes) + rng.normal(0, style.hue_spread, 64)
    colors = np.stack([hue % 360, rng.uniform(0.35, 1, 64), rng.uniform(60, 240, 64)], axis=1)
    colors = cv2.cvtColor(colors[None].astype(np.float32), cv2.COLOR_HSV2BGR)[0]
    # The first that is far enough; if none is, the farthest.
    distance = np.linalg.norm(colors - ground, axis=1).clip(max=style.contrast)
    return colors[np.argmax(distance)]


def paint(
    canvas: np.ndarray, mask: np.ndarray, color: np.ndarray, rng: Generator, style: SceneStyle
) -> None:
    """Fill the mask in place with a color under a wave: long ones shade it, short ones stripe."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((2 * SUPERSAMPLING - 1,) * 2, np.uint8))
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    window = np.s_[top : top + height, left : left + width]  # for speed
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / (len(canvas) * log_uniform(rng, 0.06, 1.0))
    y, x = np.ogrid[:height, :width]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * frequency + phase)[..., None]
    fill = color + rng.uniform(*style.relief) * wave.astype(np.float32)
    fill *= np.where(inside[window], 1, style.rim)[..., None]
    np.copyto(canvas[window], fill, where=mask[window][..., None])


def render(pieces: list[Piece], rng: Generator, size: int, style: SceneStyle) -> np.ndarray:
    """``(size, size, 3)`` uint8 BGR image of pieces that are given front to back."""
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
    """One image, ``(size, size, 3)`` uint8 BGR, and its pieces front to back."""
    style = SceneStyle()
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    pieces = compose(rng, size, style)
    return render(pieces, rng, size, style), pieces


def write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    """Write a split's images and its COCO json (boxes xywh in absolute pixels) under ``root``."""
    images: list[dict] = []
    annotations: list[dict] = []
    (root / split).mkdir()
    for index in tqdm(range(count), desc=split, disable=None):  # None: on a terminal only
        image = {"id": index + 1, "file_name": f"{index:06d}.jpg", "width": size, "height": size}
        images.append(image)
        pixels, pieces = make_image(seed, split, index, size)
        jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        # Not by imwrite, which would say nothing of a full disk.
        (root / split / image["file_name"]).write_bytes(jpeg.tobytes())
        for piece in (piece for piece in pieces if piece.category):
            what = {"image_id": image["id"], "category_id": piece.category, "iscrowd": 0}
            where = {"bbox": piece.box, "area": piece.box[2] * piece.box[3]}
            annotations.append({"id": len(annotations) + 1, **what, **where})
    categories = [{"id": n, "name": name} for n, name in enumerate(SceneStyle().classes, 1)]
    info = {"description": f"synthetic shapes, {split}", "version": str(FORMAT)}
    coco = {"info": info, "categories": categories, "images": images, "annotations": annotations}
    (root / f"{ANNOTATIONS[split]}.json").write_text(json.dumps(coco))


def is_kept(output: Path, made_with: dict, force: bool) -> bool:
    """Whether ``output`` is the set asked for; an error if it is another thing that must stay."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    record = output / "made_with.json"
    if not record.is_file():  # Someone's own files: not even --force may delete them.
        raise FileExistsError(f"{output} is not a synthetic set; give another --output")
    if not force and json.loads(record.read_text()) != made_with:
        raise FileExistsError(f"{output} was made otherwise; use --force or another --output")
    return not force


def make_dataset(
    output: Path, labeled: int, unlabeled: int, val: int, size: int, seed: int, force: bool = False
) -> None:
    """Write the three splits under ``output``, unless they are there already.

    Args:
        output: the set's folder; it appears when it is complete.
        labeled, unlabeled, val: numbers of images.
        size: side of the square images in pixels, at least 32.
        force: replace a set that is there, even the same; without it, another set that is there
            is a FileExistsError, and what is no set of this maker's always is.
    """
    counts = {"labeled": labeled, "unlabeled": unlabeled, "val": val}
    if min(*counts.values(), seed) < 0 or size < 32:
        raise ValueError("the counts and the seed must be at least 0, and the size at least 32")
    output = Path(output).resolve()
    made_with = {"format": FORMAT, **counts, "size": size, "seed": seed}
    record = json.dumps({**made_with, "style": asdict(SceneStyle())}, indent=2) + "\n"
    if is_kept(output, json.loads(record), force):  # as read back: its tuples are lists
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the renames stay on one disk; gone at the end, whatever happens.
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
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.split("\n")[0], formatter_class=formatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "synthetic")
    for split, count in zip(SPLITS, (40, 500, 200), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help="number of images")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same one makes the same files")
    parser.add_argument("--force", action="store_true", help="replace the set that is there")
    options = parser.parse_args(arguments)
    try:
        make_dataset(**vars(options))
    except (FileExistsError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.output}: {options.labeled} + {options.unlabeled} + {options.val} images")


if __name__ == "__main__":
    main()
