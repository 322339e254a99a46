"""Attack defenses and record whether they are right: every image, every threat, the worst attack.

All defenses answer the same images, cropped to the model's own S x S pixels, in which epsilon is
measured: view 0 of the original is attacked, rounded to 8 bits and given to the defense as its
image. An image counts as robust only if the defense is right on it clean and under every attack;
once no answer to it is right it is not attacked any further.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.attacks import ATTACKS
from models.attacks.adaptive import AttackableDefense, surrogates
from models.attacks.attack import LEVELS, Budget, Model
from models.attacks.stealthy import stealthy
from models.attacks.strong import STRONG, ways_of
from models.attacks.threats import STEALTHY, static, transfer
from models.classifier import DefendedClassifier, ImageQuery
from models.clip import PromptedCLIP
from models.defenses.catalog import DEFENSES
from models.evaluation.journal import CLEAN, Cell, Journal, Outcome
from models.evaluation.sample import Subject

# Shared attacks that already attack exactly this defense.
ATTACKED_THEMSELVES = {("plain", "transfer"), ("apt", "static")}

# Attacks that do not depend on the defense, by threat.
SHARED: Mapping[str, Callable[[DefendedClassifier, tuple[str, ...]], Model]] = {
    "transfer": transfer,
    "static": static,
}

BY_QUERIES = ("square", "rays")  # without gradients: all ways through an adaptation are the same

MASKED = 0.05  # share of what attacks by gradients leave that queries may break

# Views of the images that are attacked adaptively together. A small batch leaves a GPU idle.
CPU_VIEWS, GPU_VIEWS = 128, 4096
GPU_GRAPH_SHARE = 1 / 4  # of a GPU's memory, at most, for their activations


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is measured, and how.

    Attributes:
        epsilons: in levels of 1/255.
        budget: what every attack may spend; its epsilon is ignored.
        views, steps, readout: the defense's.
        batch: images in one batch.
        answers: how often a random defense is asked about each image, with other draws.
        queried: images that attacks by queries attack, the first of the sample; None: all.
    """

    defenses: Sequence[str]
    threats: Sequence[str]
    attacks: Sequence[str]
    epsilons: Sequence[float]
    budget: Budget
    views: int
    steps: int = 1
    readout: str = "all"
    seed: int = 0
    batch: int = 8
    answers: int = 1
    queried: int | None = None

    def answers_of(self, defense: str) -> int:
        """How often a defense is asked: once if its answers do not differ."""
        return self.answers if DEFENSES[defense].random else 1

    def attacks_of(self, threat: str) -> list[str]:
        """The attacks that a threat's attacker makes, in order."""
        if threat == STEALTHY:
            return [STEALTHY]
        shared = threat in SHARED
        return [a for a in self.attacks if not (shared and a in STRONG and not STRONG[a].alone)]

    def steps_of(self, defense: str) -> int:
        """`steps`, unless the defense has a number of its own."""
        own = DEFENSES[defense].steps
        return self.steps if own is None else own

    @property
    def cells(self) -> list[Cell]:
        """The rows of the table, the clean ones first."""
        hurt = [threat for threat in self.threats if threat != CLEAN]
        pairs = [(CLEAN, 0.0), *((threat, eps) for threat in hurt for eps in self.epsilons)]
        return [Cell(name, threat, eps) for threat, eps in pairs for name in self.defenses]


class Trial:
    """Fills a journal with outcomes; those it already holds are not computed again.

    Args:
        classifier: takes S x S images, see `DefendedClassifier.without_resize`.
        names: the classes, in the order of the subjects' labels.
        advance: called with the number of (image, row, attack) that are done or decided.
    """

    def __init__(
        self,
        classifier: DefendedClassifier,
        names: Sequence[str],
        protocol: Protocol,
        journal: Journal,
        advance: Callable[[int], None],
    ) -> None:
        self._classifier, self._names, self._protocol = classifier, tuple(names), protocol
        self._journal, self._advance = journal, advance

    def work(self, subjects: Sequence[Subject]) -> int:
        """The total that `advance` will be called with."""
        protocol = self._protocol
        attacks = [
            len(protocol.attacks_of(cell.threat)) if cell.threat != CLEAN else 1
            for cell in protocol.cells
        ]
        return len(subjects) * sum(attacks)

    def run(self, subjects: Sequence[Subject]) -> None:
        protocol = self._protocol
        for start in range(0, len(subjects), protocol.batch):
            chunk = subjects[start : start + protocol.batch]
            for defense in protocol.defenses:
                self._judge(chunk, None, Cell(defense, CLEAN, 0), CLEAN, 0)
            for threat in protocol.threats:
                for epsilon in protocol.epsilons if threat != CLEAN else ():
                    for attack in protocol.attacks_of(threat):
                        few = chunk
                        if attack in BY_QUERIES and protocol.queried is not None:
                            few = [s for s in chunk if s.place < protocol.queried]
                            self._advance((len(chunk) - len(few)) * len(protocol.defenses))
                        if threat in SHARED:
                            self._attack_all(few, threat, epsilon, attack)
                        else:
                            for defense in protocol.defenses:
                                self.attack(few, Cell(defense, threat, epsilon), attack)

    def _attack_all(
        self, chunk: Sequence[Subject], threat: str, epsilon: float, attack: str
    ) -> None:
        """Make an attack that does not depend on the defense once for all of them."""
        cells = [Cell(defense, threat, epsilon) for defense in self._protocol.defenses]
        self._advance(len(chunk) * len(cells))
        hit = [s for s in chunk if any(self._open(s, cell, attack) for cell in cells)]
        if not hit:
            return
        model = SHARED[threat](self._classifier, self._names)
        pixels, ms = self._make(model, hit, threat, epsilon, attack)
        for cell in cells:
            places = [i for i, subject in enumerate(hit) if self._open(subject, cell, attack)]
            self._judge([hit[i] for i in places], pixels[places], cell, attack, ms)

    def attack(self, subjects: Sequence[Subject], cell: Cell, attack: str) -> None:
        """Attack a whole defense, in batches that its views allow, in every way through its
        adaptation that the attack takes."""
        protocol = self._protocol
        spec = DEFENSES[cell.defense]
        views = protocol.views if spec.views == "all" else 1
        count = max(1, views_at_once(self._classifier.checkpoint.clip) // (views * spec.images))
        ways = ways_of(attack, list(self._targets([], cell, attack)))
        for start in range(0, len(subjects), count):
            some = subjects[start : start + count]
            for way in ways if attack not in BY_QUERIES else ways[:1]:
                label = attack if way == ways[0] else f"{attack} {way}"
                if hit := [subject for subject in some if self._open(subject, cell, label)]:
                    model = self._targets(hit, cell, attack)[way]
                    pixels, ms = self._make(model, hit, cell.threat, cell.epsilon, attack)
                    self._judge(hit, pixels, cell, label, ms)
            self._advance(len(some))

    def _targets(
        self, subjects: Sequence[Subject], cell: Cell, attack: str
    ) -> Mapping[str, AttackableDefense]:
        """A cell's defense as models to attack, by the way through its adaptation."""
        purpose = (cell.threat, attack, f"{cell.epsilon:g}", "views")
        return surrogates(
            self._classifier,
            self._names,
            cell.defense,
            self._protocol.views,
            self._protocol.steps_of(cell.defense),
            self._protocol.readout,
            [self._seed(subject, *purpose) for subject in subjects],
        )

    def _open(self, subject: Subject, cell: Cell, attack: str) -> bool:
        """Whether an attack on an image can still change its result."""
        journal = self._journal
        seen = attack in journal.seen(subject.name, cell)
        return not seen and journal.right(subject.name, cell) > 0

    def _make(
        self, model: Model, subjects: Sequence[Subject], threat: str, epsilon: float, attack: str
    ) -> tuple[Tensor, float]:
        """Attacked pixels [N, 3, S, S] and the milliseconds that each took."""
        start, device = time.perf_counter(), self._classifier.checkpoint.clip.device
        images = torch.from_numpy(np.stack([subject.image for subject in subjects]))
        pixels = (images.permute(0, 3, 1, 2).float() / LEVELS).to(device)
        labels = torch.tensor([subject.label for subject in subjects], device=device)
        seeds = [self._seed(s, threat, attack, f"{epsilon:g}") for s in subjects]
        budget = replace(self._protocol.budget, epsilon=epsilon / LEVELS)
        if not (isinstance(model, AttackableDefense) and model.random):
            budget = replace(budget, draws=1)  # nothing random to average over
        make = stealthy if attack == STEALTHY else ATTACKS[attack]
        attacked = make(model, pixels, labels, budget, seeds)
        return attacked, 1000 * (time.perf_counter() - start) / len(subjects)

    def _judge(
        self,
        subjects: Sequence[Subject],
        pixels: Tensor | None,
        cell: Cell,
        attack: str,
        attack_ms: float,
    ) -> None:
        """Classify the images, or the attacked `pixels`, with a defense and record the outcomes."""
        if pixels is None:
            self._advance(len(subjects))
            subjects = [s for s in subjects if not self._journal.seen(s.name, cell)]
            images = [subject.image for subject in subjects]
        else:
            levels = (pixels * LEVELS).round().byte().permute(0, 2, 3, 1)
            images = list(levels.cpu().contiguous().numpy())
        if not subjects:
            return
        start, asked = time.perf_counter(), self._protocol.answers_of(cell.defense)
        found = [
            answers(
                self._classifier,
                self._names,
                images,
                cell.defense,
                self._protocol,
                [self._seed(subject, "answer", *ask) for subject in subjects],
            )
            for ask in [(), *((str(number),) for number in range(1, asked))]
        ]
        ms = 1000 * (time.perf_counter() - start) / len(subjects) / asked
        self._journal.add(
            Outcome(
                subject.name,
                cell,
                attack,
                sum(answer == subject.label for answer, _ in each),
                each[0][1],
                ms,
                attack_ms,
                asked,
            )
            for subject, each in zip(subjects, zip(*found, strict=True), strict=True)
        )

    def _seed(self, subject: Subject, *what: str) -> int:
        """An image's draws depend only on the run's seed, the image and their purpose."""
        text = "/".join([str(self._protocol.seed), subject.name, *what])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def views_at_once(clip: PromptedCLIP) -> int:
    """How many views an adaptive attack differentiates together."""
    if clip.device.type == "cpu":
        return CPU_VIEWS
    memory = torch.cuda.get_device_properties(clip.device).total_memory
    graph = (1 + clip.patches) * clip.image_graph_bytes
    return min(GPU_VIEWS, int(GPU_GRAPH_SHARE * memory) // graph)


def answers(
    classifier: DefendedClassifier,
    names: tuple[str, ...],
    images: Sequence[NDArray[np.uint8]],
    defense: str,
    protocol: Protocol,
    seeds: Sequence[int],
) -> list[tuple[int, float]]:
    """The class that a defense names for each image, and its suspicion."""
    steps = protocol.steps_of(defense)
    queries = [
        ImageQuery(image, names, None, protocol.readout, seed, steps)
        for image, seed in zip(images, seeds, strict=True)
    ]
    (batch,) = classifier.prepare(queries, defense)
    found = {
        prediction.row: (int(prediction.probabilities.argmax()), round(prediction.suspicion, 4))
        for prediction in classifier.classify(batch, protocol.views)
    }
    return [found[row] for row in range(len(queries))]


def suspect(cells: Sequence[Cell], pictures: Sequence[str], journal: Journal) -> Iterator[str]:
    """Warnings on rows where queries break many images that attacks by gradients leave right."""
    for cell in cells:
        if cell.threat != "adaptive" and (cell.defense, cell.threat) not in ATTACKED_THEMSELVES:
            continue
        left, broken = 0, 0
        for picture in pictures:
            tried = journal.seen(picture, cell)
            by_queries = [tried[name].right for name in BY_QUERIES if name in tried]
            by_gradients = [o.right for name, o in tried.items() if name not in BY_QUERIES]
            if by_queries and by_gradients and min(by_gradients) > 0:
                left += 1
                broken += min(by_queries) == 0
        if broken > max(1, MASKED * left):
            yield (
                f"{cell.defense}, {cell.threat} {cell.epsilon:g}/255: queries break {broken} of "
                f"the {left} images that attacks by gradients leave right, so its gradients look "
                "masked; try more --eot, --restarts or --attack-steps."
            )
