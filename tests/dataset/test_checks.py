"""Every fault of the content is found, named with its case, and all of them in one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from dataset_builder import SHAPE, a_label, build, edit, write_volume
from PIL import Image as Picture

from segfit.dataset.case_checks import UNDECLARED, check_case
from segfit.dataset.checks import check_dataset, require_usable
from segfit.dataset.layouts import open_dataset
from segfit.dataset.phantom import make_phantom
from segfit.errors import DatasetError, Problem
from segfit.execution.execution import Execution
from segfit.files import write_json
from segfit.images.formats import read_image, write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme

FATAL, WARNING = True, False


def image(array: np.ndarray | None = None, **geometry: float) -> Callable[[Path], None]:
    """Replace the second channel of case b."""
    return lambda root: write_volume(root / "imagesTr" / "b_0001.nii.gz", array, **geometry)


def label(array: np.ndarray, **geometry: float) -> Callable[[Path], None]:
    """Replace the label of case b."""
    return lambda root: write_volume(root / "labelsTr" / "b.nii.gz", array, **geometry)


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:length]) and None


def with_values(*values: float) -> np.ndarray:
    array = np.arange(24, dtype=np.float32).reshape(SHAPE)
    array.flat[: len(values)] = values
    return array


FIT = "resample it to that image, or copy that image's header if the voxels already correspond"
FAULTS: list[tuple[Callable[[Path], None], str, str, bool]] = [
    (
        cut("imagesTr/b_0001.nii.gz", 50),
        "b_0001.nii.gz cannot be read (Compressed file ended",
        "copy or export it again",
        FATAL,
    ),
    (cut("imagesTr/b_0001.nii.gz", 0), "b_0001.nii.gz is empty", "copy or export it again", FATAL),
    (cut("labelsTr/b.nii.gz", 50), "b.nii.gz cannot be read (Compressed file ended", "copy or export it again", FATAL),
    (image(with_values(np.nan)), "b_0001.nii.gz has 1 NaN or infinite voxel", "replace them by", FATAL),
    (image(with_values(np.inf, np.nan)), "b_0001.nii.gz has 2 NaN or infinite voxels", "replace them by", FATAL),
    (
        image(np.full(SHAPE, 7, np.int16)),
        "b_0001.nii.gz is constant: every voxel is 7",
        "check the image; remove the case if it is empty",
        WARNING,
    ),
    (
        image(np.arange(30, dtype=np.int16).reshape(2, 3, 5)),
        "b_0001.nii.gz does not fit b_0000.nii.gz: its shape is (2, 3, 5), expected (2, 3, 4) (array order)",
        FIT,
        FATAL,
    ),
    (image(shift=4.0), "b_0001.nii.gz does not fit b_0000.nii.gz: it lies 4.0 voxels away", FIT, FATAL),
    (
        image(spacing=1.5),
        "b_0001.nii.gz does not fit b_0000.nii.gz: its spacing is (1.5, 1.5, 1.5) mm, expected (1, 1, 1) mm",
        FIT,
        FATAL,
    ),
    (
        label(a_label(1).reshape(2, 4, 3)),
        "b.nii.gz does not fit b_0000.nii.gz: its shape is (2, 4, 3), expected (2, 3, 4) (array order)",
        FIT,
        FATAL,
    ),
    (label(a_label(1), shift=-2.0), "b.nii.gz does not fit b_0000.nii.gz: it lies 2.0 voxels away", FIT, FATAL),
    (
        label(a_label(1, 5, 9)),
        "b.nii.gz has the undeclared values 5, 9; declared are 0, 1, 2",
        'correct the label or declare the value in "labels"',
        FATAL,
    ),
    (
        label(a_label(1, 2).astype(np.int16) - 1),
        "b.nii.gz has the undeclared value -1; declared are 0, 1, 2",
        'correct the label or declare the value in "labels"',
        FATAL,
    ),
    (
        label(np.arange(24).reshape(SHAPE).astype(np.uint8)),
        "b.nii.gz has the undeclared values 3, 4, 5, 6, 7, 8, 9, 10, ...; declared are 0, 1, 2",
        'correct the label or declare the value in "labels"',
        FATAL,
    ),
    (
        label(a_label(1).astype(np.float32) / 4),
        "b.nii.gz has the value 0.25, labels must be integers",
        "round or export it again",
        FATAL,
    ),
    (label(a_label()), "b.nii.gz is empty: it labels no class", "label the case or remove it", WARNING),
]


def test_a_good_dataset_has_no_problems(tmp_path: Path) -> None:
    root = build(tmp_path)
    assert check_dataset(open_dataset(root)) == ()
    assert check_dataset(root, execution=Execution(workers=1)) == ()
    require_usable(())


@pytest.mark.parametrize(("spoil", "problem", "action", "fatal"), FAULTS)
def test_faults_are_explained(
    tmp_path: Path, spoil: Callable[[Path], None], problem: str, action: str, fatal: bool
) -> None:
    root = build(tmp_path)
    spoil(root)
    problems = check_dataset(open_dataset(root))
    assert len(problems) == 1, problems
    assert problems[0].case == "b"
    assert problems[0].problem.startswith(problem)
    assert problems[0].action.startswith(action)
    assert problems[0].fatal == fatal
    if fatal:
        with pytest.raises(DatasetError, match=r"^b: "):
            require_usable(problems)
    else:
        require_usable(problems)


def test_one_table_for_structure_and_content(tmp_path: Path) -> None:
    root = build(tmp_path)
    (root / "labelsTr" / "a.nii.gz").unlink()
    (root / "imagesTr" / "d_0000.nii.gz").unlink()
    write_volume(root / "imagesTr" / "a_0001.nii.gz", with_values(np.nan))
    write_volume(root / "labelsTr" / "c.nii.gz", a_label(1, 3))
    edit(root, numTraining=9)
    problems = check_dataset(root)
    assert [(item.case, item.fatal) for item in problems] == [
        ("a", FATAL),  # no label
        ("d", FATAL),  # no first channel, and nothing else is said about it
        ("dataset", WARNING),  # numTraining
        ("a", FATAL),  # NaN
        ("c", FATAL),  # undeclared value
    ]
    with pytest.raises(DatasetError) as caught:
        require_usable(problems)
    assert caught.value.problems == tuple(item for item in problems if item.fatal)
    with pytest.raises(DatasetError):
        open_dataset(root)


def test_missing_listed_files_are_said_once(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    entries = {
        case: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"} for case in "abcde"
    }
    edit(root, dataset=entries)
    (root / "imagesTr" / "a_0000.nii.gz").unlink()
    problems = check_dataset(root)
    assert [(item.case, "a_0000.nii.gz is missing" in item.problem) for item in problems] == [("a", True)]


def test_an_unusable_declaration_is_reported_alone(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels={"background": 0})
    problems = check_dataset(root)
    assert [item.problem for item in problems] == [
        'in dataset.json, "labels" must declare at least one class besides "background"'
    ]


@pytest.mark.parametrize(
    ("cases", "text"),
    [(1, "1 training case, five folds need 5 or more"), (4, "4 training cases, five folds need 5 or more")],
)
def test_few_cases_are_a_warning(tmp_path: Path, cases: int, text: str) -> None:
    problems = check_dataset(build(tmp_path, cases=cases))
    assert len(problems) == 1
    assert problems[0].problem == text
    require_usable(problems)


def test_no_cases_are_fatal(tmp_path: Path) -> None:
    root = build(tmp_path, cases=0)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir()
    problems = check_dataset(root)
    assert [item.problem for item in problems if item.fatal] == ["imagesTr holds no .nii.gz image"]


def test_structures_that_never_occur_are_a_warning(tmp_path: Path) -> None:
    root = build(tmp_path)
    for case in "abcde":
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(1))
    assert check_dataset(root) == (
        Problem(
            "dataset",
            'the class "lesion" occurs in no label file',
            'correct its value in "labels" or remove it',
            WARNING,
        ),
    )


def test_many_labels_make_few_and_short_problems(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels={"background": 0, "organ": 1, "lesion": 2} | {f"part {n}": n for n in range(3, 2000)})
    write_volume(root / "labelsTr" / "b.nii.gz", a_label(1, 2, 5000))
    absent, undeclared = check_dataset(root)
    assert (absent.case, absent.fatal) == ("dataset", False)
    assert absent.problem.startswith("1997 classes occur in no label file: part 3, part 4, ")
    assert (undeclared.case, undeclared.code) == ("b", UNDECLARED)
    assert max(len(absent.problem), len(undeclared.problem)) < 400


def test_the_work_on_a_case_is_not_the_number_of_labels_squared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = open_dataset(build(tmp_path)).training[0]
    asked: list[int] = []
    values = LabelScheme.stored_values.fget
    assert values is not None

    def counted(scheme: LabelScheme) -> tuple[int, ...]:
        asked.append(len(scheme.labels))
        return values(scheme)

    monkeypatch.setattr(LabelScheme, "stored_values", property(counted))
    for top in (3, 300):
        scheme = LabelScheme.from_declaration({"background": 0} | {f"part {n}": n for n in range(1, top)})
        assert check_case(case, scheme, 2, complete=True).problems == ()
    assert asked.count(3) == asked.count(300) > 0


def test_the_ignore_label_is_declared_but_is_no_structure(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels={"background": 0, "organ": 1, "lesion": 2, "ignore": 3})
    write_volume(root / "labelsTr" / "a.nii.gz", a_label(1, 3))
    write_volume(root / "labelsTr" / "b.nii.gz", a_label(3))
    assert [(item.case, item.problem) for item in check_dataset(root)] == [
        ("b", "b.nii.gz is empty: it labels no class")
    ]


def test_test_cases_only_warn(tmp_path: Path) -> None:
    root = build(tmp_path)
    for channel in range(2):
        write_volume(root / "imagesTs" / f"a_{channel:04d}.nii.gz")  # the same name as a training case
    write_volume(root / "labelsTs" / "a.nii.gz", a_label(4))
    assert [(item.case, item.problem, item.fatal) for item in check_dataset(root)] == [
        ("a", "test case: a.nii.gz has the undeclared value 4; declared are 0, 1, 2", WARNING)
    ]


def tiff_dataset(root: Path, shapes: list[tuple[int, ...]], channels: int = 1) -> Path:
    """Write TIFF cases a, b, ... of the given image shapes."""
    for case, shape in zip("abcdefg", shapes, strict=False):
        for folder, name in (("imagesTr", f"{case}_0000.tif"), ("labelsTr", f"{case}.tif")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            pixels = np.arange(np.prod(shape)).reshape(shape) % 2
            if folder == "imagesTr":
                pixels += np.arange(shape[-1]) + ord(case)
            tifffile.imwrite(root / folder / name, pixels.astype(np.uint8), photometric="minisblack")
            if len(shape) == 3:
                write_json(root / folder / f"{case}.json", {"spacing": [2, 1, 1]})
    declaration = {
        "channel_names": {str(i): f"c{i}" for i in range(channels)},
        "labels": {"background": 0, "cell": 1},
        "numTraining": len(shapes),
        "file_ending": ".tif",
    }
    write_json(root / "dataset.json", declaration)
    return root


def test_flat_and_deep_images_do_not_mix(tmp_path: Path) -> None:
    problems = check_dataset(tiff_dataset(tmp_path, [(4, 5)] * 4 + [(3, 4, 5)]))
    assert [(item.problem, item.fatal) for item in problems] == [("4 cases are 2D and 1 3D (first 3D case: e)", FATAL)]


def test_channels_are_counted_in_the_files(tmp_path: Path) -> None:
    problems = check_dataset(tiff_dataset(tmp_path, [(4, 5)] * 5, channels=3))
    assert [item.problem for item in problems] == [f"{case}_0000.tif: 1 channel, the dataset has 3" for case in "abcde"]


def test_stacks_without_spacing_are_a_warning(tmp_path: Path) -> None:
    root = tiff_dataset(tmp_path, [(3, 4, 5)] * 5)
    (root / "imagesTr" / "c.json").unlink()
    problems = check_dataset(root)
    assert [(item.problem, item.fatal) for item in problems if "1 mm" in item.problem] == [
        ("c_0000.tif has no voxel size; 1 mm is assumed", WARNING)
    ]


def test_stacks_with_a_spacing_of_their_own_need_no_file(tmp_path: Path) -> None:
    root = tiff_dataset(tmp_path, [(3, 4, 5)] * 5)
    for path in (root / "imagesTr" / "c_0000.tif", root / "labelsTr" / "c.tif"):
        path.with_name("c.json").unlink(missing_ok=True)
        voxels = tifffile.imread(path).astype(np.uint8)
        about = {"axes": "ZYX", "spacing": 3, "unit": "mm"}
        tifffile.imwrite(path, voxels, imagej=True, resolution=(2, 2), metadata=about)
    assert not [item for item in check_dataset(root) if "spacing" in item.problem]


def test_images_may_be_folders(tmp_path: Path) -> None:
    root = build(tmp_path, channels=1)
    edit(root, file_ending=".zarr")
    for path in [*root.glob("*/*.nii.gz")]:
        image = read_image(path)
        write_labels(path.with_name(path.name.replace(".nii.gz", ".zarr")), LabelMap(image.array[0], image.grid))
        path.unlink()
    (root / "imagesTr" / "notes").mkdir()  # a folder that is no image
    dataset = open_dataset(root)
    assert [case.images[0].name for case in dataset.training] == [f"{case}_0000.zarr" for case in "abcde"]
    assert check_dataset(root) == ()
    chunk = root / "imagesTr" / "c_0000.zarr" / "0" / "0" / "0" / "0"
    chunk.write_bytes(b"rubbish")
    problem, *others = check_dataset(root)
    assert not others
    assert (problem.case, problem.fatal) == ("c", FATAL)
    assert problem.problem.startswith("c_0000.zarr cannot be read ")


def test_progress_counts_the_cases(tmp_path: Path) -> None:
    from contextlib import contextmanager

    seen: list[str] = []

    class Task:
        def advance(self, amount: float = 1.0, note: str = "") -> None:
            seen.append(note)

    class Progress:
        @contextmanager
        def task(self, description: str, total: float):  # type: ignore[no-untyped-def]
            assert (description, total) == ("Checking cases", 5)
            yield Task()

    check_dataset(build(tmp_path), execution=Execution(progress=Progress()))  # type: ignore[arg-type]
    assert sorted(seen) == ["a", "b", "c", "d", "e"]


@pytest.mark.real_data
def test_real_data_are_clean(data: Path) -> None:
    assert check_dataset(data / "Dataset120_Nuclei") == ()
    assert check_dataset(data / "Dataset004_Hippocampus") == ()


def test_copies_of_training_cases_are_told(tmp_path: Path) -> None:
    root = make_phantom(tmp_path / "data", cases=6, test_cases=1)
    for copy, case in (("Tr/turned", "Tr/phantom_tr_002"), ("Ts/phantom_ts_000", "Tr/phantom_tr_001")):
        for kind, channel in (("images", "_0000"), ("labels", "")):
            stored = read_image(root / f"{kind}{case}{channel}.nii.gz").array[0]
            write_volume(root / f"{kind}{copy}{channel}.nii.gz", stored.transpose(0, 2, 1)[:, ::-1, 3:])
    edit(root, numTraining=7)
    found = {(item.code, item.case, item.other, item.fatal) for item in check_dataset(root) if item.other}
    assert found == {
        ("copy", "turned", "phantom_tr_002", False),
        ("copy_in_test", "phantom_ts_000", "phantom_tr_001", False),
    }


def masks_of(root: Path, values: dict[str, int]) -> None:
    """Write label files of one class with another value each."""
    for number, (case, value) in enumerate(values.items()):
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(*(value,) * (3 + number)))


def test_masks_with_another_value_than_the_declared_one_are_told_as_what_they_are(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels={"background": 0, "organ": 1})
    masks_of(root, dict.fromkeys("abcde", 255))
    (found,) = check_dataset(open_dataset(root))
    assert (found.case, found.fatal, found.code) == ("dataset", FATAL, "")
    assert found.problem == "the label files hold 255 where 1 is declared"
    assert found.action == 'write 255 into "labels" in place of 1, or save the files with 1'
    edit(root, labels={"background": 0, "organ": 255})
    assert check_dataset(open_dataset(root)) == ()
    edit(root, labels={"background": 0, "organ": 1})
    masks_of(root, dict.fromkeys("abcde", 1))
    assert check_dataset(open_dataset(root)) == ()


def test_two_values_in_place_of_the_declared_ones_are_told_once(tmp_path: Path) -> None:
    root = build(tmp_path)
    for case in "abcde":
        write_volume(root / "labelsTr" / f"{case}.nii.gz", a_label(127, 255))
    (found,) = check_dataset(open_dataset(root))
    assert found.problem == "the label files hold 127 and 255 where 1 and 2 are declared"
    edit(root, labels={"background": 0, "organ": 127, "lesion": 255})
    assert check_dataset(open_dataset(root)) == ()


def test_one_mask_saved_as_black_and_white_among_others(tmp_path: Path) -> None:
    root = build(tmp_path)
    edit(root, labels={"background": 0, "organ": 1})
    masks_of(root, {**dict.fromkeys("acde", 1), "b": 255})
    (found,) = check_dataset(open_dataset(root))
    assert (found.case, found.fatal, found.code) == ("b", FATAL, UNDECLARED)
    assert found.problem == "b.nii.gz holds 0 and 255 where 0 and 1 are declared"
    masks_of(root, {"b": 1})
    assert check_dataset(open_dataset(root)) == ()


def _pictures(folder: Path, cases: int = 6) -> tuple[Path, Path]:
    """Write noisy pictures with a disc of another size in each, in paired folders; return the folders."""
    images, labels = folder / "images", folder / "labels"
    images.mkdir(parents=True)
    labels.mkdir()
    for number in range(cases):
        noise = np.random.default_rng(number).integers(1, 200, (30, 32), dtype=np.uint8)
        disc = (np.indices((30, 32)) - 15) ** 2
        Picture.fromarray(noise).save(images / f"c{number}.png")
        Picture.fromarray((disc.sum(axis=0) < 40 + 9 * number).astype(np.uint8)).save(labels / f"c{number}.png")
    return images, labels


def test_labels_that_are_copies_of_another_or_of_the_image_are_told(tmp_path: Path) -> None:
    images, labels = _pictures(tmp_path)
    assert check_dataset(tmp_path) == ()
    shutil.copy(labels / "c1.png", labels / "c4.png")
    shutil.copy(labels / "c2.png", images / "c2.png")
    found = {(item.case, item.code, item.other, item.fatal): item.problem for item in check_dataset(tmp_path)}
    assert list(found) == [("c4", "same_label", "c1", False), ("c2", "", "", True)]
    assert "c2.png" in found["c2", "", "", True]
    shutil.copy(images / "c1.png", images / "c4.png")  # the whole case twice is told as that alone
    assert [item.code for item in check_dataset(tmp_path) if item.case == "c4"] == ["copy"]


def test_values_of_a_single_case_are_told_where_no_class_is_named(tmp_path: Path) -> None:
    _, labels = _pictures(tmp_path)
    mask = np.array(Picture.open(labels / "c3.png"))
    mask[14:16, 14:16] = 255
    Picture.fromarray(mask).save(labels / "c3.png")
    (told,) = check_dataset(tmp_path)
    assert (told.case, told.code, told.fatal) == ("dataset", "stray_values", False)
    assert "255" in told.problem
    assert "c3" in told.problem
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "disc": 1, "white": 255}}))
    assert check_dataset(tmp_path) == ()
