"""Which label sets count as encoded."""

from dataclasses import replace

from service.engine.label_sets import LabelSets
from tests.service.engine.test_price import TYPICAL


def test_a_set_is_its_labels_their_template_and_the_prompts_of_the_defense() -> None:
    sets = LabelSets()
    sets.add(TYPICAL)
    assert replace(TYPICAL, views=64, steps=3, id="y") in sets
    assert replace(TYPICAL, labels=TYPICAL.labels[1:]) not in sets
    assert replace(TYPICAL, template="a {}") not in sets
    assert replace(TYPICAL, method="plain") not in sets  # other prompts
    sets.clear()
    assert TYPICAL not in sets


def test_the_sets_used_last_are_kept_up_to_a_number_of_labels() -> None:
    tasks = [replace(TYPICAL, labels=(f"{number}", "b", "c")) for number in range(4)]
    sets = LabelSets(max_labels=9)
    for task in (*tasks[:3], tasks[0], tasks[3]):
        sets.add(task)
    assert [task in sets for task in tasks] == [True, False, True, True]
    sets.add(replace(TYPICAL, labels=("a",) * 10))
    assert not any(task in sets for task in tasks)
