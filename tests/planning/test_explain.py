from __future__ import annotations

import json

from planning_fakes import case, fingerprint, scheme

from segfit.options import Options
from segfit.planning.explain import compare, explain, explain_json
from segfit.planning.plan import Plan
from segfit.planning.planner import derive


def _plan(preset: str) -> Plan:
    orientation = "canonical" if preset == "auto" else "stored"
    cases = [case((256, 256, 256), (1, 1, 1))] * 50
    data = fingerprint(cases, orientation=orientation)  # type: ignore[arg-type]
    return derive(data, scheme("left lung", "right lung"), Options.model_validate({"preset": preset}))


def test_text_names_value_rule_bound_source_and_change() -> None:
    text = explain(_plan("stock"))
    start = text.index("configuration 3d_fullres")
    paragraph = text[text.index("patch_size = 128x128x128", start) :].split("\n\n")[0]
    assert "  rule         as much context as possible: a volume of 256x256x256 voxels" in paragraph
    assert (
        "inputs start: 256x256x256; start volume: 256x256x256; median shape: 256x256x256; memory (GB): 8; multiples of"
        in " ".join(paragraph.split())
    )
    assert "  bound        memory 8 GB" in paragraph
    assert "  source       nnU-Net 2.8.1 planning rules, patch size" in paragraph
    assert "with 16 GB it would be 192x160x160, with 24 GB it would be" in " ".join(paragraph.split())
    assert text.startswith("Plan for Dataset001_Test: preset stock, every decision is nnU-Net's\n")


def test_text_tells_differences_and_groups_by_configuration() -> None:
    text = explain(_plan("auto"))
    assert "preset auto, differs from nnU-Net" in text
    assert "  - left and right labels change places where x is flipped\n" in text
    titles = ["Dataset", "configuration 2d", "configuration 3d_fullres", "configuration 3d_cascade_fullres"]
    places = [text.index(f"\n{title}\n---") for title in titles]
    assert places == sorted(places)
    assert all(len(line) <= 110 for line in text.splitlines())


def test_json_holds_every_decision_once() -> None:
    plan = _plan("auto")
    value = json.loads(json.dumps(explain_json(plan)))
    assert list(value["decisions"]) == ["dataset", *plan.configurations]
    assert sum(len(items) for items in value["decisions"].values()) == len(plan.decisions)
    assert value["decisions"]["3d_fullres"][0]["key"] == "3d_fullres.spacing_mm"


def test_comparison_lists_what_differs() -> None:
    stock, wide = _plan("stock"), _plan("resenc-l")
    assert compare(stock, stock) == []
    rows = {key: values for key, *values in compare(stock, wide)}
    assert rows["preset"] == ["stock", "resenc-l"]
    assert rows["memory_gb"] == ["8", "24"]
    assert rows["3d_fullres.network.encoder_convs"] == ["2, 2, 2, 2, 2, 2", "1, 3, 4, 6, 6, 6"]
    assert "target_spacing_mm" not in rows


def test_lines_are_no_wider_than_the_terminal() -> None:
    text = explain(_plan("auto"), 80)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_slices_of_a_2d_configuration_are_told_in_words() -> None:
    assert "target spacing (mm): the case's own, 1, 1" in explain(_plan("stock"))
