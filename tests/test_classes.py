"""Class map: names reach slots, and what can't be told apart is refused."""

from __future__ import annotations

import shlex
import unicodedata

import pytest
import yaml

from qskd.config.recipe import apply_overrides, build
from qskd.datasets.classes import NOBODY, map_classes, model_side
from qskd.errors import QskdError

# COCO's own ids: 91 slots, of which 80 are used; 0 and the gaps are "N/A" in DETR's checkpoints.
COCO_91 = ["N/A", "person", "bicycle", "car", "N/A", "traffic light", "stop-sign", "N/A"]


def test_names_find_their_slot_in_a_head_with_gaps() -> None:
    assert map_classes(["person", "car", "traffic light"], COCO_91, {}) == (1, 3, 5)


def test_names_find_their_slot_in_a_contiguous_head() -> None:
    assert map_classes(["b", "c", "a"], ["a", "b", "c"], {}) == (1, 2, 0)


def test_id2label_is_read_by_its_keys_not_its_order() -> None:
    assert map_classes(["cat", "dog"], {90: "dog", 17: "cat"}, {}) == (17, 90)


@pytest.mark.parametrize("written", ["Traffic Light", "traffic_light", "TRAFFIC-LIGHT", "trafficlight"])
def test_case_spaces_underscores_and_hyphens_do_not_matter(written: str) -> None:
    assert map_classes([written], COCO_91, {}) == (5,)


def test_an_exact_name_wins_over_one_that_only_reads_the_same() -> None:
    assert map_classes(["cell_phone"], ["cell phone", "cell_phone"], {}) == (1,)


def test_the_explicit_map_wins_over_equal_names() -> None:
    assert map_classes(["person", "car"], COCO_91, {"car": "bicycle"}) == (1, 2)


def test_the_explicit_map_may_point_classes_at_one_label_or_at_a_slot_number() -> None:
    assert map_classes(["sedan", "coupe"], COCO_91, {"sedan": "car", "coupe": "car"}) == (3, 3)
    assert map_classes(["void"], COCO_91, {"void": "4"}) == (4,)


def test_a_label_that_is_a_number_is_a_label_before_it_is_a_slot() -> None:
    assert map_classes(["three"], ["3", "2", "1", "0"], {"three": "3"}) == (0,)


def refusal(dataset: list[str], teacher: list[str], explicit: dict[str, str | None]) -> QskdError:
    with pytest.raises(QskdError) as caught:
        map_classes(dataset, teacher, explicit)
    return caught.value


def test_unmapped_classes_are_listed_with_both_vocabularies_and_the_remedy() -> None:
    error = refusal(["person", "giraffe"], COCO_91, {})
    assert "giraffe" in error.found
    assert "person" not in error.found
    assert "[person, giraffe]" in error.expected
    assert "traffic light" in error.expected
    assert "--set 'teacher.class_map={giraffe: null}'" in error.remedy


def test_ambiguous_teacher_labels_are_refused_only_when_needed() -> None:
    teacher = ["mouse", "Mouse", "cat"]
    assert map_classes(["cat"], teacher, {}) == (2,)
    assert map_classes(["mouse"], teacher, {}) == (0,)
    error = refusal(["MOUSE"], teacher, {})
    assert "slots 0, 1" in error.found
    assert map_classes(["MOUSE"], teacher, {"MOUSE": "Mouse"}) == (1,)


def test_a_dataset_class_called_like_the_unused_slots_is_ambiguous() -> None:
    assert "N/A (slots 0, 4, 7)" in refusal(["N/A"], COCO_91, {}).found
    assert "slots 0, 4, 7" in refusal(["void"], COCO_91, {"void": "N/A"}).found


def test_explicit_entries_must_name_known_classes_on_both_sides() -> None:
    assert "persn" in refusal(["person"], COCO_91, {"persn": "person"}).found
    assert "humanoid" in refusal(["person"], COCO_91, {"person": "humanoid"}).found
    assert "99" in refusal(["person"], COCO_91, {"person": "99"}).found


def test_default_label_names_are_refused_even_when_the_counts_agree() -> None:
    error = refusal(["cat", "dog"], ["LABEL_0", "LABEL_1"], {})
    assert "names no classes" in error.found
    assert map_classes(["cat", "dog"], ["LABEL_0", "LABEL_1"], {"cat": "LABEL_1", "dog": "label_0"}) == (1, 0)


def test_two_dataset_classes_never_share_a_slot_by_accident() -> None:
    assert "both reach" in refusal(["stop sign", "stop_sign"], COCO_91, {}).found
    assert "both reach" in refusal(["car", "truck"], COCO_91, {"truck": "car"}).found


def test_repeated_dataset_names_are_refused() -> None:
    assert "same name" in refusal(["car", "car"], COCO_91, {}).found


def test_long_vocabularies_are_shortened_with_a_count() -> None:
    error = refusal([f"class {i}" for i in range(500)], ["a" * 200], {})
    assert "and 476 more" in error.found
    assert len(str(error)) < 2000


def test_names_in_another_unicode_form_case_or_spacing_are_the_same() -> None:
    composed = "caf\u00e9 table"
    for written in (unicodedata.normalize("NFD", composed), "CAF\u00c9\u00a0Table", "\ufeffcafe\u0301\u200b-table "):
        assert map_classes([written], ["tea", composed], {}) == (1,)
    assert map_classes(["_", "-"], ["-", "_"], {}) == (1, 0)  # all of a name is never left out


SPELLED = {
    **{"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"},
    **{"dining table": "diningtable", "potted plant": "pottedplant", "hair drier": "hair dryer", "donut": "doughnut"},
}


def test_coco_s_other_spellings_are_matched_both_ways_and_never_before_the_name_itself() -> None:
    coco, other = list(SPELLED), list(SPELLED.values())
    assert map_classes(coco, other[::-1], {}) == map_classes(other, coco[::-1], {}) == tuple(range(len(coco)))[::-1]
    assert map_classes(["sofa", "couch"], ["couch", "sofa"], {}) == (1, 0)
    assert "both reach" in refusal(["sofa", "couch"], ["couch"], {}).found
    assert "slots 0, 1" in refusal(["tvmonitor"], ["tv", "television"], {}).found


def test_null_leaves_a_class_to_nobody_but_not_all_of_them() -> None:
    assert map_classes(["shapes", "car", "animals"], COCO_91, {"shapes": None, "animals": None}) == (NOBODY, 3, NOBODY)
    assert map_classes(["car", "bicycle"], COCO_91, {"car": None}) == (NOBODY, 2)  # wins over names, too
    assert "every class" in refusal(["a", "b"], COCO_91, {"a": None, "b": None}).found


@pytest.mark.parametrize("extra", [["giraffe"], [f"thing {i}" for i in range(60)], ["no", "1", "null", "it's: {odd}"]])
def test_the_class_map_that_an_error_offers_can_be_pasted_and_is_all_that_was_missing(extra: list[str]) -> None:
    dataset, given = ["person", "two wheels", *extra], {"two wheels": "bicycle"}
    error = refusal(dataset, COCO_91, given)
    assert "[car, traffic light, stop-sign]" in error.expected  # the teacher's labels that are left
    said, _, rest = error.remedy.partition("\n")
    assert "null" in said
    block, _, option = rest.partition("  or: ")
    config = build(yaml.safe_load(block))
    assert config.teacher.class_map == {**given, **dict.fromkeys(extra)}
    assert map_classes(dataset, COCO_91, config.teacher.class_map) == (1, 2, *[NOBODY] * len(extra))
    if option:
        flag, value = shlex.split(option)
        assert flag == "--set"
        assert build(apply_overrides({}, [value])).teacher.class_map == config.teacher.class_map


def test_an_offered_class_map_guesses_plurals_and_nothing_bolder() -> None:
    assert "bicycles: bicycle" in refusal(["bicycles"], COCO_91, {}).remedy
    assert "cab: null" in refusal(["cab"], COCO_91, {}).remedy
    assert "cat: LABEL_0" in refusal(["cat", "dog"], ["LABEL_0", "LABEL_1"], {}).remedy
    assert "LABEL" not in refusal(["cat"], ["LABEL_0", "LABEL_1"], {}).remedy


def test_where_there_is_no_teacher_no_message_speaks_of_one() -> None:
    cases: list[tuple[list[str], dict[str, str | None]]] = [
        (["giraffe"], {}), (["N/A"], {}), (["car", "truck"], {"truck": "car"}), (["car"], {"bus": "car"}),
        (["car"], {"car": "lorry"}), (["car"], {"car": None}), (["car", "car"], {}),
    ]  # fmt: skip
    for dataset, explicit in cases:
        with pytest.raises(QskdError) as caught:
            map_classes(dataset, COCO_91, explicit, model_side("runs/small"))
        assert "teacher" not in str(caught.value).lower().replace("teacher.class_map", "")
