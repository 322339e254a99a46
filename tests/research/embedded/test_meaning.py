"""Names without published features: what WordNet and the names that have some make of them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from research.embedded.captions import Nouns
from research.embedded.losses import Targets
from research.embedded.meaning import Kernel, Meaning, predict_held_out, spread
from research.embedded.wordnet import WordNet

DATA = """\
  1 This line stands for the license.
00000001 03 n 01 entity 0 000 | that which is
00000002 05 n 01 animal 0 001 @ 00000001 n 0000 | a living thing that moves
00000003 05 n 02 fish 0 finny_one 0 001 @ 00000002 n 0000 | an animal with gills in water
00000004 05 n 02 tench 0 Tinca_tinca 0 001 @ 00000003 n 0000 | a fish of lakes; "the tench bit"
00000005 05 n 01 carp 0 001 @ 00000003 n 0000 | a fish of ponds
00000006 06 n 01 building 0 001 @ 00000001 n 0000 | a structure with a roof and walls
00000007 06 n 02 church 0 house_of_prayer 0 001 @ 00000006 n 0000 | a building for worship
00000008 06 n 01 barn 0 001 @ 00000006 n 0000 | a building for hay and cows
00000009 14 n 01 taxonomic_group 0 001 @ 00000001 n 0000 | a group of living things
00000010 05 n 01 genus_Tinca 0 001 @ 00000009 n 0000 | a genus of fish
00000011 06 n 01 Big_Ben 0 001 @i 00000006 n 0000 | a tower in London
00000012 14 n 01 carp 0 001 @ 00000001 n 0000 | a complaint
"""
INDEX = [
    ("entity", ["00000001"]),
    ("animal", ["00000002"]),
    ("fish", ["00000003"]),
    ("finny_one", ["00000003"]),
    ("tench", ["00000004"]),
    ("tinca_tinca", ["00000004"]),
    ("carp", ["00000012", "00000005"]),
    ("building", ["00000006"]),
    ("church", ["00000007"]),
    ("house_of_prayer", ["00000007"]),
    ("barn", ["00000008"]),
    ("genus_tinca", ["00000010"]),
    ("big_ben", ["00000011"]),
]


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    (tmp_path / "data.noun").write_text(DATA)
    rows = [f"{name} n {len(at)} 1 @ {len(at)} 0 {' '.join(at)}  \n" for name, at in INDEX]
    (tmp_path / "index.noun").write_text("  1 license\n" + "".join(rows))
    (tmp_path / "noun.exc").write_text("oxen ox\nfishes fish\n")
    return WordNet.read(tmp_path)


def test_the_database_reads(wordnet: WordNet) -> None:
    tench = wordnet.synsets["00000004"]
    assert tench.names == ("tench", "Tinca tinca")
    assert tench.gloss == "a fish of lakes"
    assert wordnet.ancestors["00000004"] == {"00000001", "00000002", "00000003", "00000004"}
    assert wordnet.information["00000004"] == 1
    assert wordnet.information["00000001"] == 0


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("church", "00000007"),
        ("Churches", "00000007"),
        ("house_of_prayer", "00000007"),
        ("fishes", "00000003"),
        ("carp", "00000005"),  # the fish before the complaint, though that is the first sense
        ("zeppelin", None),
    ],
)
def test_a_name_means_the_thing_it_most_often_is(
    wordnet: WordNet, name: str, offset: str | None
) -> None:
    assert wordnet.sense(name) == offset


def test_things_are_neither_latin_nor_single_nor_groups(wordnet: WordNet) -> None:
    names = {name for name, _ in wordnet.things()}
    assert {"tench", "church", "house of prayer", "carp"} <= names
    assert not names & {"Tinca tinca", "genus Tinca", "Big Ben", "entity", "taxonomic group"}
    assert "house of prayer" not in {name for name, _ in wordnet.things(words=2)}


def test_kinship_is_lins(wordnet: WordNet) -> None:
    tench, carp, barn = (Meaning(name, wordnet.sense(name)) for name in ("tench", "carp", "barn"))
    kernel, fish = Kernel(wordnet), wordnet.information["00000003"]
    found = kernel.lin_similarity([tench], [tench, carp, barn, Meaning("zeppelin", None)])[0]
    # Leaves have the content 1: twice the common ancestor's over two.
    assert torch.allclose(found, torch.tensor([1.0, fish, 0.0, 0.0]))


def test_a_name_lies_near_its_kin_and_known_names_keep_their_place(wordnet: WordNet) -> None:
    known = [Meaning(name, wordnet.sense(name)) for name in ("carp", "barn", "sea view")]
    features, kernel = torch.eye(3), Kernel(wordnet, noise=0.05)
    tench, church, view = spread(
        kernel, known, features, [Meaning("tench", "00000004"), Meaning("church", "00000007"),
                                  Meaning("old view", None)]
    )  # fmt: skip
    assert tench.argmax() == 0
    assert church.argmax() == 1
    assert view.argmax() == 2  # by its last word
    assert (spread(kernel, known, features, known).diagonal() > 0.99).all()


def test_foretelling_does_not_look(wordnet: WordNet) -> None:
    known = [Meaning(name, wordnet.sense(name)) for name in ("carp", "fish", "barn", "church")]
    features = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    kernel = Kernel(wordnet)
    predicted = predict_held_out(kernel, known, features, parts=4)
    others = spread(kernel, known[1:], features[1:], known[:1])
    assert torch.allclose(predicted[0], others[0], atol=1e-6)


def test_classes_and_other_names_take_their_features_from_kin(wordnet: WordNet) -> None:
    nouns = Nouns([["tench"], ["kirk", "church"]], ["carp", "barn", "fish"],
                  ["00000004", "00000007"])  # fmt: skip
    published = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    targets = Targets.derive(nouns, published, wordnet, torch.device("cpu"))
    assert (targets.classes @ targets.published.T).argmax(1).tolist() == [2, 1]  # a fish, a barn
    assert "house of prayer" in targets.names
    assert not {"tench", "church", "carp"} & set(targets.names)
    assert targets.meanings.shape == (len(targets.names), 8)
