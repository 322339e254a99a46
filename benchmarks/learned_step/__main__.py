"""Does a step that is learned beforehand earn its cost? And a gate without a step?

    python -m benchmarks.learned_step --model DIR --bundle DIR --data TRAIN.parquet \\
        --test VAL.parquet --out runs/learned-step

Learns two ways to answer from training images, half of them attacked through all of it. The first
is a linear step on few views: prompts, the weights of the loss terms and the length of the step for
each layer. The second has four prompt experts, which a gate mixes by the first views' predictions.
Then each answers the test images once, beside the mean over as many views as cost the same. The
same command resumes. Writes the part of docs/robustness.md between the comments `learned-step`.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.machine import machine
from benchmarks.harness.report import DOCS, command_line, make_parser, publish
from benchmarks.learned_step import experts, step
from benchmarks.learned_step.comparison import (
    REACH,
    Trial,
    judge,
    tabulate_accuracies,
    tabulate_differences,
)
from benchmarks.learned_step.experts import answer_by_experts
from benchmarks.learned_step.frozen import freeze
from benchmarks.learned_step.learning import Answer, Plan, Values, learn
from benchmarks.learned_step.step import TERMS, LearnedStep, answer_after_step
from models.attacks.threats import transfer
from models.classifier import DefendedClassifier
from models.data import open_dataset
from models.evaluation.sample import gather
from models.loading import load_classifier

STEP_COST = 3  # a forward and a backward pass, in forward passes


def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    classifier = load_classifier(str(options.model), bundle=options.bundle).without_resize()
    labels = tuple(open_dataset(options.test).names)
    try:
        frozen = freeze(classifier, labels)
    except ValueError as error:
        raise SystemExit(f"{options.bundle}: {error}") from error
    assert classifier.bundle is not None
    vision = classifier.bundle.prompts.tensors["vision"]
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(steps=options.steps, batch=options.batch, views=options.views, seed=options.seed)
    settings = {
        "checkpoint": classifier.checkpoint.sha256,
        "prompts": classifier.bundle.prompts_sha256,
    }
    pixels, targets = read_images(classifier, options.data, labels, plan)
    budget = plan.views * (STEP_COST + 1)

    def make_step(values: Values) -> Answer:
        return answer_after_step(frozen, LearnedStep(**values), plan.views)

    def make_experts(values: Values) -> Answer:
        return answer_by_experts(frozen, values, plan.views, budget)

    few = pixels[: plan.batch].float() / 255
    taught: dict[str, Values] = {}
    for name, make, values, rates in (
        ("step", make_step, step.begin(frozen, vision, few, plan.views), step.LEARNING_RATES),
        ("experts", make_experts, experts.begin(vision, plan.seed), experts.LEARNING_RATES),
    ):
        state = options.out / f"{name}.safetensors"
        taught[name] = learn(make, values, rates, pixels, targets, plan, state, settings)

    names_of = {
        "step": f"learned step, {plan.views} views",
        "experts": f"gated experts, {plan.views} and {budget - plan.views} views",
        "step-prompts": f"mean over {budget} views, prompts of the step",
        "bundle-prompts": f"mean over {budget} views, prompts of the bundle",
        "few-views": f"mean over {plan.views} views, prompts of the step",
    }
    answers = {
        "step": make_step(taught["step"]),
        "experts": make_experts(taught["experts"]),
        "step-prompts": frozen.answer_by_mean(taught["step"]["vision"], budget),
        "bundle-prompts": frozen.answer_by_mean(vision, budget),
        "few-views": frozen.answer_by_mean(taught["step"]["vision"], plan.views),
    }
    trial = Trial(attack_steps=options.attack_steps, seed=options.seed)
    test = gather(classifier, open_dataset(options.test), options.limit, options.seed)
    undefended, made = transfer(classifier, labels), settings | {"plan": repr(plan)}
    outcomes = {
        names_of[name]: judge(answer, undefended, test, trial, options.out / f"{name}.jsonl", made)
        for name, answer in answers.items()
    }
    pairs = [
        ("step", "bundle-prompts"),
        ("step", "step-prompts"),
        ("step", "few-views"),
        ("experts", "bundle-prompts"),
    ]
    passes = dict.fromkeys(names_of.values(), budget) | {names_of["few-views"]: plan.views}
    named = [(names_of[one], names_of[other]) for one, other in pairs]
    page = "\n\n".join(
        [
            tabulate_accuracies(outcomes, passes),
            tabulate_differences(outcomes, named),
            describe(options, plan, trial, taught["step"], len(test)),
        ]
    )
    figures = {"outcomes": outcomes, "n": len(test), "settings": made}
    section = None if options.dry else "learned-step"
    publish(figures, page, options.out / "figures.json", section, DOCS / "robustness.md")


def read_images(
    classifier: DefendedClassifier, path: Path, labels: tuple[str, ...], plan: Plan
) -> tuple[Tensor, Tensor]:
    """Images to learn from, uint8 [N, 3, S, S], and their classes [N]; exits if `labels` are not
    the classes."""
    data = open_dataset(path)
    if tuple(data.names) != labels:
        raise SystemExit("--data and --test name different classes")
    subjects = gather(classifier, data, plan.steps * plan.batch, plan.seed)
    pixels = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in subjects])
    return pixels, torch.tensor([subject.label for subject in subjects])


def describe(
    options: argparse.Namespace, plan: Plan, trial: Trial, learned: Values, count: int
) -> str:
    """What the tables rest on."""
    epsilon = f"{trial.epsilon * 255:g}/255"
    pairs = zip(TERMS, learned["weights"].tolist(), strict=True)
    weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in pairs)
    rates = " ".join(f"{1000 * rate:+.1f}" for rate in learned["rates"].tolist())
    shown = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]
    return (
        f"Top-1 accuracy in % with 95% intervals and paired differences in points, on the same "
        f"{count} images of `{options.test.name}`, each answered once. Under attack, an image "
        f"counts if it is right both without the attack and with it. `transfer`: PGD on undefended "
        f"CLIP, {trial.attack_steps} steps at {epsilon}. `adaptive`: {trial.attack_steps} signed "
        f"steps at {epsilon}, {REACH:g} epsilons long in all, from a random start up the "
        "cross-entropy of the mean logits, with new views at every step and the exact gradient "
        "through step and gate; the last result counts, on fresh views. A quick attack, the same "
        f"for all rows: read it for the differences. Model `{options.model.name}` with bundle "
        f"`{options.bundle.name}`. Passes are of one view through the image encoder; a backward "
        "pass counts as two forward ones. The last row, at a quarter of the cost, has the step's "
        "views and prompts and no step. Both ways were learned from the same "
        f"{plan.steps * plan.batch} images of `{options.data.name}` in {plan.steps} batches, half "
        f"of each attacked by a signed step through all of it.\n\n"
        f"The step's learned weights, in units of each term's gradient at the start: {weights}. "
        f"Its length by layer, in thousandths: {rates}.\n\n"
        f"{machine()} Made by `{command_line('benchmarks.learned_step', shown)}`."
    )


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.learned_step", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--bundle", type=Path, required=True, help="directory of its bundle")
    parser.add_argument("--data", type=Path, required=True, help="training images")
    parser.add_argument("--test", type=Path, required=True, help="validation images")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and results")
    parser.add_argument("--steps", type=int, default=Plan().steps, help="batches to learn from")
    parser.add_argument("--batch", type=int, default=Plan().batch, help="images in a batch")
    parser.add_argument("--views", type=int, default=Plan().views, help="that the step is taken on")
    parser.add_argument("--limit", type=int, default=200, help="test images")
    parser.add_argument("--attack-steps", type=int, default=20, help="of the test's attacks")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    parser.add_argument("--dry", action="store_true", help="leave the page as it is")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
