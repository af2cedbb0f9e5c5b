"""Datasets of pictures, TIFF stacks and OME-Zarr with one fault each: it is named, in its case, with what to do."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image as Pillow

from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import describe, inspect_dataset, leave_out
from segfit.geometry import Grid
from segfit.images import omezarr

CASES = "abcde"
SIZE = (40, 48)
FATAL, WARNING = True, False
Spoil = Callable[[Path], object]


def photo(case: str, channels: int = 1) -> np.ndarray:
    random = np.random.default_rng(ord(case))
    ramp = np.add.outer(np.arange(SIZE[0]), np.arange(SIZE[1])) * 2
    noisy = ramp[..., None] + random.integers(0, 40, (*SIZE, channels))
    return noisy.clip(0, 255).astype(np.uint8).squeeze()


def labels(case: str, *values: int) -> np.ndarray:
    array = np.zeros(SIZE, np.uint8)
    y, x = np.indices(SIZE)
    for number, value in enumerate(values or (1, 2)):
        array[(y - 12 - ord(case) % 5) ** 2 + (x - 12 - 20 * number) ** 2 < 80] = value
    return array


def pair(root: Path, image: str = ".png", label: str = ".png", channels: int = 3) -> Path:
    """Write paired folders without a declaration."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for case in CASES:
        Pillow.fromarray(photo(case, channels)).save(root / f"images/{case}{image}")
        Pillow.fromarray(labels(case)).save(root / f"labels/{case}{label}")
    return root


def grey(root: Path) -> Path:
    return pair(root, channels=1)


def jpegs(root: Path) -> Path:
    return pair(root, image=".jpg")


def declare(root: Path, ending: str) -> Path:
    content = {
        "channel_names": {"0": "image"},
        "labels": {"background": 0, "cell": 1, "nucleus": 2},
        "numTraining": len(CASES),
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def declared(root: Path) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case in CASES:
        Pillow.fromarray(photo(case)).save(root / f"imagesTr/{case}_0000.png")
        Pillow.fromarray(labels(case)).save(root / f"labelsTr/{case}.png")
    return declare(root, ".png")


def stacks(root: Path) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case in CASES:
        for name, array in ((f"imagesTr/{case}_0000", photo(case)), (f"labelsTr/{case}", labels(case))):
            tifffile.imwrite(root / f"{name}.tif", np.stack([array] * 3), photometric="minisblack")
            (root / f"{name.removesuffix('_0000')}.json").write_text('{"spacing": [3, 1, 1]}')
    return declare(root, ".tif")


def masks(root: Path) -> Path:
    """Write one mask per class."""
    pair(root)
    for case in CASES:
        (root / f"labels/{case}").mkdir()
        for value, name in ((1, "cell"), (2, "nucleus")):
            mask = (labels(case) == value).astype(np.uint8) * 255
            Pillow.fromarray(mask).save(root / f"labels/{case}/{name}.png")
        (root / f"labels/{case}.png").unlink()
    return root


def flat_tiffs(root: Path) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case in CASES:
        tifffile.imwrite(root / f"imagesTr/{case}_0000.tif", photo(case))
        tifffile.imwrite(root / f"labelsTr/{case}.tif", labels(case))
    return declare(root, ".tif")


def zarrs(root: Path) -> Path:
    grid = Grid((3, *SIZE), (1.0, 1.0, 1.0))
    for case in CASES:
        omezarr.write(root / f"imagesTr/{case}_0000.ome.zarr", np.stack([photo(case)] * 3), grid)
        omezarr.write(root / f"labelsTr/{case}.ome.zarr", np.stack([labels(case)] * 3), grid)
    return declare(root, ".ome.zarr")


def picture(name: str, array: np.ndarray, **options: Any) -> Spoil:
    return lambda root: Pillow.fromarray(array).save(root / name, **options)


def every(write: Callable[[str], np.ndarray], form: str = "labels/{}.png", **options: Any) -> Spoil:
    return lambda root: [Pillow.fromarray(write(case)).save(root / form.format(case), **options) for case in CASES]


def painted(root: Path, case: str, indices: np.ndarray) -> None:
    """Write the labels of a case with a palette, the left disc in red and the right one in green."""
    image = Pillow.fromarray(indices, mode="P")
    colours = [[255, 0, 0], [0, 255, 0]] if indices[12 + ord(case) % 5, 12] == 1 else [[0, 255, 0], [255, 0, 0]]
    image.putpalette([0, 0, 0, *colours[0], *colours[1]])
    image.save(root / f"labels/{case}.png")


def raw(name: str, content: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(content)


def tiff(name: str, array: np.ndarray, **options: Any) -> Spoil:
    return lambda root: tifffile.imwrite(root / name, array, **options)


def exchanged(root: Path) -> None:
    (root / "images").rename(root / "kept")
    (root / "labels").rename(root / "images")
    (root / "kept").rename(root / "labels")


def turned(root: Path) -> None:
    image = Pillow.fromarray(np.ascontiguousarray(np.rot90(photo("b", 3))))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(root / "images/b.jpg", exif=exif)


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """Return a grey PNG written by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_jpeg(root: Path) -> None:
    content = (root / "images/b.jpg").read_bytes()
    frame = content.find(b"\xff\xc0")
    (root / "images/b.jpg").write_bytes(content[: frame + 5] + struct.pack(">HH", 65500, 65500) + content[frame + 9 :])


def huge_tiff(root: Path) -> None:
    tags = [(256, 100_000), (257, 100_000), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, 100_000), (279, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = struct.pack("<2sHI", b"II", 42, 20) + bytes(12) + struct.pack("<H", len(tags)) + entries + bytes(4)
    (root / "imagesTr/b_0000.tif").write_bytes(content)


def chunk_gone(root: Path) -> None:
    level = root / "imagesTr/b_0000.ome.zarr/0"
    next(path for path in sorted(level.rglob("*")) if path.is_file() and path.name[0].isdigit()).unlink()


def metadata(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / name / ".zattrs"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def moved(content: dict[str, Any]) -> None:
    content["multiscales"][0]["datasets"][0]["coordinateTransformations"][1]["translation"] = [7.0, 0.0, 0.0]


def plate(root: Path) -> None:
    path = root / "imagesTr/b_0000.ome.zarr"
    shutil.rmtree(path)
    zarr.create_group(str(path), zarr_format=2, attributes={"plate": {"wells": [{"path": "A/1"}]}})


def lossy(case: str) -> np.ndarray:
    buffer = io.BytesIO()
    Pillow.fromarray(labels(case, 255)).save(buffer, "JPEG", quality=80)
    return np.array(Pillow.open(buffer))


ALPHA = np.dstack([photo("b", 3), photo("c")])
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
GAP = np.where(labels("b") > 0, 255, 0).astype(np.uint8)

CORPUS: dict[str, tuple[Callable[[Path], Path], Spoil, str, str, str, bool]] = {
    "a JPEG called .png as label": (
        *(pair, picture("labels/b.png", GAP, format="JPEG")),
        *(
            "b",
            "b.png is a JPEG image despite its name",
            "export the labels again as .png; converting this file keeps its errors",
            FATAL,
        ),
    ),
    "labels packed by JPEG and saved as PNG": (
        *(pair, every(lossy)),
        *("b", "b.png is not a label map (looks like", "save a lossless label map: one value per class", FATAL),
    ),
    "a mask packed by JPEG and saved as PNG": (
        *(masks, picture("labels/b/nucleus.png", lossy("b"))),
        *("b", "nucleus.png is not a binary mask (looks like", "save a lossless mask: 0 outside", FATAL),
    ),
    "one photograph among the labels": (
        *(grey, picture("labels/b.png", photo("c"))),
        *(
            "b",
            "b.png is not a label map (looks like a photograph",
            "save a lossless label map: one value per class",
            FATAL,
        ),
    ),
    "folders exchanged": (
        *(grey, exchanged),
        "dataset",
        "the images look like label maps and the labels like images",
        "swap the folders, or the columns of the table",
        FATAL,
    ),
    "folders of colours exchanged": (
        *(pair, exchanged),
        *("dataset", "the images look like label maps", "swap the folders, or the columns of the table", FATAL),
    ),
    "image and label of a declared case exchanged": (
        declared,
        lambda root: [picture("labelsTr/b.png", photo("b"))(root), picture("imagesTr/b_0000.png", GAP // 255)(root)],
        *(
            "b",
            "b.png is not a label map (looks like a photograph",
            "swap the two: b_0000.png looks like the label map",
            FATAL,
        ),
    ),
    "labels that cannot be read ": (
        *(pair, lambda r: [(r / f"labels/{case}.png").write_bytes(b"") for case in CASES]),
        *("c", "c.png is empty", "copy or export it again, or remove the case", FATAL),
    ),
    "labels in colours": (
        *(pair, every(lambda case: COLOURS[labels(case)])),
        *(
            "c",
            "c.png is a colour image (3 colours), expected label values",
            "save labels as one channel, one value per colour",
            FATAL,
        ),
    ),
    "labels in transparency": (
        *(declared, picture("labelsTr/b.png", np.dstack([labels("b", 0), labels("b", 255)]))),
        *("b", "b.png is partly transparent, so its labels are ambiguous", "save labels as one opaque channel", FATAL),
    ),
    "0 and 1 among 0 and 255": (
        *(pair, every(lambda case: labels(case, 255 if case == "b" else 1))),
        *(
            "dataset",
            "4 of the label files (a.png) have the values 0 and 1,",
            "use one value if they mean the same class",
            WARNING,
        ),
    ),
    "a palette in another order": (
        pair,
        lambda root: [painted(root, case, labels(case, *(2, 1) if case == "b" else (1, 2))) for case in CASES],
        *(
            "b",
            "b.png shows label 1 in #00ff00, which is label 2 in most files",
            "save all labels with one palette; palette indices are the label values",
            WARNING,
        ),
    ),
    "grey among colours": (
        *(pair, picture("images/a.png", photo("a"))),
        *("a", "a.png: 1 channel (grey), the dataset has 3", "save it as RGB without alpha", FATAL),
    ),
    "transparency among colours": (
        *(pair, picture("images/b.png", ALPHA)),
        *("b", "b.png: 4 channels (RGB and alpha), the dataset has 3", "save it as RGB", FATAL),
    ),
    "transparency that says nothing": (
        *(pair, every(lambda c: np.dstack([photo(c, 3), np.full(SIZE, 255, np.uint8)]), "images/{}.png")),
        *("b", "b.png is constant (channel 3 of the file)", "save all images without an alpha", WARNING),
    ),
    "transparent grey": (
        *(declared, picture("imagesTr/b_0000.png", np.dstack([photo("b"), photo("c")]))),
        *(
            "b",
            "b_0000.png is partly transparent; its grey",
            "save it without transparency, on the intended background",
            WARNING,
        ),
    ),
    "colours of a print": (
        *(jpegs, lambda r: Pillow.fromarray(photo("b", 3)).convert("CMYK").save(r / "images/b.jpg")),
        *(
            "b",
            "b.jpg is CMYK and is converted to RGB",
            "save it as RGB like the others if its colours matter",
            WARNING,
        ),
    ),
    "more bits than others": (
        *(declared, picture("imagesTr/b_0000.png", photo("b").astype(np.uint16) * 257)),
        *(
            "b",
            "b_0000.png has 16 bits per value, most have 8",
            "save all with the same bit depth; networks see values as intensities",
            WARNING,
        ),
    ),
    "stored turned": (
        *(jpegs, turned),
        *(
            "b",
            "b.png does not fit b.jpg: its shape is (40, 48), expected (48, 40)",
            "it looks rotated or transposed: store its axes in the order of that image",
            FATAL,
        ),
    ),
    "label of another size": (
        *(declared, picture("labelsTr/b.png", labels("b")[:-1])),
        *(
            "b",
            "b.png does not fit b_0000.png: its shape is",
            "draw it on that image, or resample both to one size",
            FATAL,
        ),
    ),
    "a PNG that cannot be so large": (
        *(declared, raw("imagesTr/b_0000.png", png(60_000, 60_000, 8, bytes(100)))),
        *(
            "b",
            "b_0000.png declares 60000 x 60000 pixels in its header but has 69 bytes",
            "copy or export it again",
            FATAL,
        ),
    ),
    "a JPEG that cannot be so large": (
        *(jpegs, huge_jpeg),
        *("b", "b.jpg declares 65500 x 65500 pixels in its header", "copy or export it again", FATAL),
    ),
    "a TIFF that cannot be so large": (
        *(flat_tiffs, huge_tiff),
        *("b", "b_0000.tif declares 100000 x 100000 pixels in its header", "copy or export it again", FATAL),
    ),
    "a PNG without width": (
        *(declared, raw("imagesTr/b_0000.png", png(0, 5, 8, b""))),
        *("b", "b_0000.png cannot be read ", "copy or export it again", FATAL),
    ),
    "a GIF": (
        *(declared, picture("imagesTr/b_0000.png", photo("b"), format="GIF")),
        *("b", "b_0000.png is a GIF image, not a PNG, JPEG or BMP image", "export it again as .png", FATAL),
    ),
    "a page of the web": (
        *(flat_tiffs, raw("imagesTr/b_0000.tif", b"<html>404</html>")),
        *("b", "b_0000.tif is a web page or another text file, not a TIFF file", "download the file", FATAL),
    ),
    "a pointer of Git LFS": (
        *(declared, raw("labelsTr/b.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n")),
        *("b", "b.png is a Git LFS pointer, not the file itself", "fetch it with git lfs", FATAL),
    ),
    "a PNG called .tif": (
        *(flat_tiffs, picture("imagesTr/b_0000.tif", photo("b"), format="PNG")),
        *("b", "b_0000.tif is a PNG image, not a TIFF file", "correct its ending or export it again", FATAL),
    ),
    "a label packed by JPEG in TIFF": (
        *(flat_tiffs, picture("labelsTr/b.tif", GAP, compression="jpeg")),
        *("b", "b.tif is JPEG-compressed, which changes label values", "export the labels again without", FATAL),
    ),
    "complex numbers": (
        *(flat_tiffs, tiff("imagesTr/b_0000.tif", photo("b").astype(np.complex64))),
        *("b", "b_0000.tif holds values of type complex64", "export real numbers", FATAL),
    ),
    "complex labels": (
        *(flat_tiffs, tiff("labelsTr/b.tif", labels("b").astype(np.complex64))),
        *("b", "b.tif holds values of type complex64", "export real numbers", FATAL),
    ),
    "two pages for one": (
        *(flat_tiffs, tiff("imagesTr/b_0000.tif", np.stack([photo("b")] * 2), photometric="minisblack")),
        *(
            "b",
            "b.tif does not fit b_0000.tif: its shape is (40, 48), expected (2, 40, 48)",
            "draw it on that image, or resample both to one size",
            FATAL,
        ),
    ),
    "white is 0": (
        *(flat_tiffs, tiff("imagesTr/b_0000.tif", photo("b"), photometric="miniswhite")),
        *("b", "b_0000.tif stores white as 0 (photometric MinIsWhite)", "save it with black as 0", WARNING),
    ),
    "a table of colours": (
        *(flat_tiffs, lambda r: Pillow.fromarray(photo("b", 3)).quantize(64).save(r / "imagesTr/b_0000.tif")),
        *(
            "b",
            "b_0000.tif has a colour map, which is ignored: its values are indices",
            "save it as RGB if its colours matter",
            WARNING,
        ),
    ),
    "a TIFF that is stored turned": (
        *(flat_tiffs, tiff("imagesTr/b_0000.tif", photo("b"), extratags=[(274, 3, 1, 3, True)])),
        *(
            "b",
            "b_0000.tif is rotated or mirrored by its Orientation tag, which is ignored",
            "save it upright if its label was drawn on the displayed image",
            WARNING,
        ),
    ),
    "spacing beyond all numbers": (
        *(stacks, lambda r: (r / "imagesTr/b.json").write_text(f'{{"spacing": [{"9" * 400}, 1, 1]}}')),
        *("b", 'b.json must hold {"spacing": [z, y, x]} with positive numbers, got', "correct it", FATAL),
    ),
    "a spacing file that is a link to nothing": (
        *(stacks, lambda r: [(r / "imagesTr/b.json").unlink(), (r / "imagesTr/b.json").symlink_to("/nowhere.json")]),
        *("b", "b.json is not valid JSON", 'write {"spacing": [z, y, x]} in mm', FATAL),
    ),
    "no spacing for the label": (
        *(stacks, lambda r: (r / "labelsTr/b.json").unlink()),
        *("b", "b.tif does not fit b_0000.tif: its spacing is", 'write the true {"spacing": [z, y, x]} in mm', FATAL),
    ),
    "a chunk is gone": (
        *(zarrs, chunk_gone),
        *(
            "b",
            "b_0000.ome.zarr has missing chunks, which are read as 0",
            "copy it again if they were lost; nothing if it is empty there",
            WARNING,
        ),
    ),
    "metadata that are no JSON": (
        *(zarrs, raw("imagesTr/b_0000.ome.zarr/.zattrs", b"{")),
        *("b", "b_0000.ome.zarr has metadata that is not valid JSON", "copy or export it again", FATAL),
    ),
    "no scale": (
        *(
            zarrs,
            metadata(
                "imagesTr/b_0000.ome.zarr",
                lambda m: m["multiscales"][0]["datasets"][0].pop("coordinateTransformations"),
            ),
        ),
        *(
            "b",
            "b_0000.ome.zarr has no scale; voxels of (1, 1, 1) mm are assumed",
            'write its true "scale" if that is wrong',
            WARNING,
        ),
    ),
    "moved": (
        *(zarrs, metadata("labelsTr/b.ome.zarr", moved)),
        *(
            "b",
            "b.ome.zarr is (7, 0, 0) mm away from b_0000.ome.zarr",
            "correct its translation or resample it if the voxels do not correspond",
            WARNING,
        ),
    ),
    "a plate": (
        *(zarrs, plate),
        *("b", "b_0000.ome.zarr holds several images of a plate", "give the folder of one of them, such as", FATAL),
    ),
    "labels inside the images": (
        zarrs,
        lambda root: shutil.move(root / "labelsTr/b.ome.zarr", root / "imagesTr/b_0000.ome.zarr/labels/cells"),
        "b",
        "its label labelsTr/b.ome.zarr is missing",
        "copy imagesTr/b_0000.ome.zarr/labels/cells to labelsTr/b.ome.zarr",
        FATAL,
    ),
    "a zip archive": (
        *(zarrs, lambda r: [shutil.rmtree(r / "labelsTr/b.ome.zarr"), raw("labelsTr/b.ome.zarr", b"PK\3\4")(r)]),
        *("b", "b.ome.zarr is a zip archive, not a folder, as OME-Zarr is", "unpack it", FATAL),
    ),
}


@pytest.mark.parametrize("fault", CORPUS)
def test_each_fault_is_named(tmp_path: Path, fault: str) -> None:
    build, spoil, case, problem, action, fatal = CORPUS[fault]
    root = build(tmp_path / "data")
    spoil(root)
    found = check_dataset(root)
    matching = [p for p in found if p.case == case and p.problem.startswith(problem) and p.action.startswith(action)]
    assert [p.fatal for p in matching] == [fatal], found
    others = {p.case for p in found if p.fatal} - {case, "dataset"}
    assert not others or others == set(CASES) - {case}, found  # this case alone, or all of them


@pytest.mark.parametrize("build", [pair, grey, jpegs, declared, masks, stacks, flat_tiffs, zarrs])
def test_good_datasets_have_no_problem(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    assert check_dataset(build(tmp_path / "data")) == ()


def test_labels_that_say_the_same_in_another_way_are_read(tmp_path: Path) -> None:
    root = declared(tmp_path / "data")
    Pillow.fromarray(np.dstack([labels("a")] * 3)).save(root / "labelsTr/a.png")
    Pillow.fromarray(np.dstack([labels("b"), np.full(SIZE, 255, np.uint8)])).save(root / "labelsTr/b.png")
    (root / "labelsTr/c.png").write_bytes(png(4, 1, 2, b"\0\x1b"))  # 0, 1, 2, 3 in two bits each
    Pillow.fromarray(photo("c")[:1, :4]).save(root / "imagesTr/c_0000.png")
    assert [(p.case, p.problem) for p in check_dataset(root)] == [
        ("c", "c.png has the undeclared value 3; declared are 0, 1, 2")
    ]


def test_structures_are_those_of_the_label_maps_alone(tmp_path: Path) -> None:
    root = grey(tmp_path / "data")
    Pillow.fromarray(photo("c")).save(root / "labels/b.png")
    dataset, problems = inspect_dataset(root)
    assert dataset is not None
    assert describe(dataset)[1] == "1 channel: image; labels (.png): label 1 = 1 and label 2 = 2"
    kept, told = leave_out(dataset, check_dataset(root))
    assert [case.id for case in kept.training] == ["a", "c", "d", "e"]
    assert not any(problem.fatal for problem in (*problems, *told))


def test_a_remark_on_many_files_is_made_once(tmp_path: Path) -> None:
    root = jpegs(tmp_path / "data")
    for case in CASES:
        Pillow.fromarray(photo(case, 3)).convert("CMYK").save(root / f"images/{case}.jpg")
    assert [(p.case, p.problem) for p in check_dataset(root)] == [
        (
            "dataset",
            "each of 5 files in images (a.jpg, b.jpg, c.jpg, ...) is CMYK and is converted to RGB",
        )
    ]
