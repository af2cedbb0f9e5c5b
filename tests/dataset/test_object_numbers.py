"""Labels that number objects: told from classes, and made classes when that is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from segfit.cli.main import run
from segfit.dataset.annotation import read_labels
from segfit.dataset.checks import OBJECTS, check_dataset
from segfit.dataset.contents import FileHashes
from segfit.dataset.layouts import open_dataset
from segfit.dataset.object_numbers import ObjectNumbers, as_classes, count_areas, object_numbers
from segfit.errors import DatasetError
from segfit.labels import LabelScheme
from segfit.options import DatasetOptions, Options
from segfit.project import Project
from segfit.project.stages import STAGES

_ONE, _TWO = DatasetOptions(labels="objects-as-foreground"), DatasetOptions(labels="objects-as-boundary")


def dots(number: int, first: int = 1, size: int = 32) -> NDArray[np.uint16]:
    """Return a picture with so many squares of 3 x 3 pixels, each with a value of its own."""
    labels = np.zeros((size, size), np.uint16)
    for index in range(number):
        y, x = divmod(index, size // 4)
        labels[4 * y : 4 * y + 3, 4 * x : 4 * x + 3] = first + index
    return labels


def paired(root: Path, maps: list[NDArray[np.uint16]], **declared: object) -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number, label in enumerate(maps):
        image = np.random.default_rng(number).integers(0, 255, label.shape).astype(np.uint8)
        tifffile.imwrite(root / f"images/c{number}.tif", image)
        tifffile.imwrite(root / f"labels/c{number}.tif", label)
    if declared:
        (root / "dataset.json").write_text(json.dumps(declared))
    return root


def found(root: Path, options: DatasetOptions | None = None) -> list[tuple[str, bool]]:
    """Return code and weight of what is wrong with the labels."""
    dataset = open_dataset(root)
    problems = check_dataset(dataset if options is None else dataset.taken(options))
    return [(problem.code, problem.fatal) for problem in problems]


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([range(1, 40), range(1, 60), range(1, 80)], True),  # cells
        ([[*range(1, 40)], [*range(1, 40), 42, 43], [*range(1, 90)]], True),  # some lie behind others
        ([[1, 2], [1, 2, 3, 4, 5, 6], [1], []], True),  # lesions
        ([range(1, 8), range(8, 20), range(20, 24)], True),  # numbered on from case to case
        ([[7, 900, 17, 41, 5000], [3, 8, 60, 61, 62, 63], [90, 91, 105, 9000]], True),  # any, each used once
        ([[7, 900, 17, 41, 5000], [7, 900, 17, 41, 63, 70], [7, 900, 17, 41]], None),  # structures of an atlas
        ([[1, 2, 3], [1], [1, 2], [1]], False),  # so few may be classes
        ([range(1, 38)] * 5, None),  # structures that all cases have
        ([[*range(1, 103)], [*range(1, 80), *range(83, 105)], [*range(1, 105)]], None),  # some lack some
        ([range(8, 21), range(5, 16), range(1, 9)], None),  # vertebrae
        ([[1], [1, 2], [1, 2]], None),  # organ and lesion
        ([[11, 12, 13, 21, 22], [11, 13, 21], [11, 12, 13, 14, 21, 22, 23]], None),  # teeth
        ([range(1, 40), range(1, 60)], None),  # two cases tell nothing
    ],
)
def test_numbers_are_told_from_classes(cases: list[list[int]], expected: bool | None) -> None:
    counted = {str(n): (values, len(values) if len(values) > 2 else None) for n, values in enumerate(cases)}
    result = object_numbers(counted)
    assert (None if result is None else result.certain) is expected
    scattered = {name: (values, areas and 2 * areas) for name, (values, areas) in counted.items()}
    assert object_numbers(scattered) is None


def test_the_cases_with_fewest_and_most_objects_are_named() -> None:
    cases = {"a": ([0, 1, 2, 3, 4], 4), "b": ([0, 1], None), "c": ([0, *range(1, 8)], 7)}
    assert object_numbers(cases) == ObjectNumbers(("b", 1), ("c", 7), certain=True)


def test_areas_are_counted_value_by_value() -> None:
    labels = np.array([[[1, 1, 2, 0, 3], [0, 0, 2, 0, 3], [1, 0, 0, 0, 3]]], np.int16)
    assert count_areas(labels, {0, 1, 2, 3}) == 4
    assert count_areas(labels, {0, 1, 2}) is None


def test_objects_become_one_class_or_two() -> None:
    labels = np.array([[[0, 0, 0, 0, 0, 0], [4, 4, 4, 7, 7, 7], [4, 4, 4, 7, 7, 7], [4, 4, 4, 7, 7, -1]]], np.int32)
    scheme = LabelScheme.of_values([1, 2])
    one, two = scheme.of_objects(boundary=False), scheme.of_objects(boundary=True)
    assert as_classes(labels, one, boundary=False)[0].tolist() == [[0] * 6, *[[1] * 6] * 2, [1, 1, 1, 1, 1, 2]]
    expected = [[0] * 6, [2, 2, 2, 2, 2, 2], [2, 1, 2, 2, 1, 2], [2, 2, 2, 2, 2, 3]]
    assert as_classes(labels, two, boundary=True)[0].tolist() == expected
    assert [(class_.name, class_.values) for class_ in two.classes] == [("interior", (1,)), ("boundary", (2,))]


def test_the_declared_name_and_the_ignore_value_stay() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "nucleus": 1, "ignore": 255})
    labels = np.array([[[1, 0, 255, 9, 9, 9, 9]]], np.int16)
    one = scheme.of_objects(boundary=False)
    assert [class_.name for class_ in one.classes] == ["nucleus"]
    assert as_classes(labels, one, boundary=False).ravel().tolist() == [1, 0, 2, 1, 1, 1, 1]
    assert scheme.of_objects(boundary=True).stored_values == (0, 1, 2, 255)


def test_the_check_tells_objects_and_what_to_do(tmp_path: Path) -> None:
    root = paired(tmp_path / "a", [dots(number) for number in (7, 12, 9, 20, 15)])
    assert found(root) == [(OBJECTS, True)]
    (problem,) = check_dataset(open_dataset(root))
    assert "7 in c0, 20 in c3" in problem.problem
    assert "--labels objects-as-foreground" in problem.action
    assert found(root, _ONE) == []
    assert found(root, _TWO) == []


def test_pairs_of_one_folder_may_number_objects(tmp_path: Path) -> None:
    for number in range(5):
        image = np.random.default_rng(number).integers(0, 255, (32, 32)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{number:03d}_img.tif", image)
        tifffile.imwrite(tmp_path / f"{number:03d}_masks.tif", dots(7 + 3 * number))
    assert found(tmp_path) == [(OBJECTS, True)]
    assert found(tmp_path, _ONE) == []


def test_undeclared_values_are_not_to_be_declared_where_they_number_objects(tmp_path: Path) -> None:
    root = paired(
        tmp_path / "a", [dots(n) for n in (7, 12, 9, 20, 15)], labels={"background": 0, "cell": 1}
    )  # every case has undeclared values
    assert found(root) == [(OBJECTS, True)]
    assert "declare" not in check_dataset(open_dataset(root))[0].action
    assert found(root, _ONE) == []
    assert [one.name for one in open_dataset(root).taken(_ONE).labels.classes] == ["cell"]


def test_declared_numbers_are_classes(tmp_path: Path) -> None:
    names = {f"organ {number}": number for number in range(1, 8)}
    root = paired(tmp_path / "a", [dots(n) for n in (5, 6, 7, 7, 5)], labels={"background": 0, **names})
    assert found(root) == [("same_label", False)] * 2


def test_few_numbers_are_a_doubt(tmp_path: Path) -> None:
    root = paired(tmp_path / "a", [dots(number) for number in (1, 2, 3, 1, 2)])
    assert found(root) == [(OBJECTS, False)]


def test_more_values_than_classes_there_may_be(tmp_path: Path) -> None:
    many = [dots(number, size=128) for number in (700, 1010, 300, 900, 800)]
    root = paired(tmp_path / "objects", many)
    assert found(root) == [(OBJECTS, True)]
    assert found(root, _ONE) == []
    scattered = [np.concatenate([label, label]) for label in many]
    root = paired(tmp_path / "scattered", scattered)
    assert found(root) == [("", True)]


def test_masks_of_single_objects_are_told(tmp_path: Path) -> None:
    root = tmp_path / "a"
    (root / "images").mkdir(parents=True)
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 1000, (32, 32), dtype=np.uint16)
        tifffile.imwrite(root / f"images/c{number}.tif", noise)
        (root / f"masks/c{number}").mkdir(parents=True)
        for value in range(1, number + 3):
            mask = (dots(number + 2) == value).astype(np.uint8)
            tifffile.imwrite(root / f"masks/c{number}/{number}f{value}.tif", mask)
    assert found(root) == [(OBJECTS, True)]
    assert found(root, _ONE) == []
    dataset = open_dataset(root).taken(_TWO)
    assert check_dataset(dataset) == ()
    inner = read_labels(dataset.case("c1"), dataset.labels).array[0]
    assert (inner[:3, :3].tolist(), inner.max()) == ([[2, 2, 2], [2, 1, 2], [2, 2, 2]], 2)


def test_what_labels_are_taken_for_is_in_the_identity_of_a_case(tmp_path: Path) -> None:
    dataset = open_dataset(paired(tmp_path / "a", [dots(number) for number in (7, 12, 9)]))
    hashes, uses = FileHashes(), ("classes", "exclusive", "objects-as-foreground", "objects-as-boundary")
    keys = [hashes.case(dataset.taken(DatasetOptions(labels=use)).case("c0")) for use in uses]
    assert keys[0] == keys[1] == hashes.case(dataset.case("c0"))
    assert len(set(keys)) == 3
    assert dataset.taken(_TWO).labels.num_outputs == 3


def test_export_takes_numbers_of_objects_as_it_is_told(tmp_path: Path) -> None:
    root = paired(tmp_path / "a", [dots(number) for number in (7, 12, 9)])
    written = tmp_path / "Dataset001_X"
    assert run(["export", str(root), "--to", "nnunet", "-o", str(written), "--labels", "objects-as-boundary"]) == 0
    declared = json.loads((written / "dataset.json").read_text())["labels"]
    assert declared == {"background": 0, "interior": 1, "boundary": 2}
    assert tifffile.imread(written / "labelsTr/c0.tif")[:3, :3].tolist() == [[2, 2, 2], [2, 1, 2], [2, 2, 2]]


def test_plans_stay_when_it_is_said_that_classes_may_overlap() -> None:
    parts = {"fingerprint": "1", "labels": "2", "splits": "3", "weights": "4"}
    said = Options().with_settings(["dataset.labels=exclusive"])
    assert STAGES["plan"].key(said, **parts) == STAGES["plan"].key(Options(), **parts)
    assert STAGES["check"].key(said, dataset="1") != STAGES["check"].key(Options(), dataset="1")


def test_a_project_learns_what_was_asked_for(tmp_path: Path) -> None:
    root = paired(tmp_path / "a", [dots(number) for number in (7, 12, 9, 8, 10)])
    with pytest.raises(DatasetError, match="--labels objects-as-foreground"):
        Project.create(tmp_path / "p", root).fingerprint()
    found = Project.open(tmp_path / "p", settings=["dataset.labels=objects-as-boundary"]).fingerprint()
    assert found.cases[0].label_voxels == {0: 32 * 32 - 63, 1: 7, 2: 56}
    found = Project.open(tmp_path / "p", settings=["dataset.labels=objects-as-foreground"]).fingerprint()
    assert found.cases[0].label_voxels == {0: 32 * 32 - 63, 1: 63}
