"""The claims of both papers, and the study's own questions, as comparisons of rows."""

from __future__ import annotations

from collections.abc import Iterable

from study.results import contrasts, forgetting
from study.results.claims import Claim, Compare, Comparison
from study.results.contrasts import Term
from study.results.load import Group
from study.results.studies import GROUPS, STUDIES, TWELVE, Results, method_of, role_of, standing

_AS_MANY = 1.25  # ratio of trained parameters up to which two methods have about as many


def difference(name: str, ours: Group | None, theirs: Group | None, tasks: Iterable[str] = TWELVE) -> Comparison:
    """Compare two groups; of unknown outcome if one is missing."""
    known = ours is not None and theirs is not None
    return Comparison(name, contrasts.difference(ours, theirs, tasks) if known else None)


def main_above(role: str, others: Iterable[str]) -> Compare:
    """Compare the main group of a method with those of others."""
    return lambda results: [
        difference(f"{role} − {other}", results.main(role), results.main(other)) for other in others
    ]


def setting(study: str, ours: dict[str, object] | None, theirs: dict[str, object] | None) -> Compare:
    """Compare groups of a study by what differs from CoVFT; None is CoVFT itself."""

    def compare(results: Results) -> list[Comparison]:
        groups = [_varied(results, study, changed) for changed in (ours, theirs)]
        return [difference(f"{_said(ours)} − {_said(theirs)}", *groups)]

    return compare


def _said(changed: dict[str, object] | None) -> str:
    told = ", ".join(f"{name} {value}" for name, value in (changed or {}).items())
    return told.replace("_", " ") or "covft"


def _varied(results: Results, study: str, changed: dict[str, object] | None) -> Group | None:
    """Return the group that differs from the main one of CoVFT in these settings alone."""
    covft = results.main("covft")
    if changed is None or covft is None:
        return covft
    wanted = {**_compared(covft), **changed}
    return next((g for g in results.groups if study in g.studies and _compared(g) == wanted), None)


def _compared(group: Group) -> dict[str, object]:
    kept = ("method", "control", "context", "routing", "experts", "text_encoder", "layers", "options", "tokens")
    return {name: group.settings.get(name) for name in kept}


# ---------------------------------------------------------------------------------- the CoVFT paper


def covft_above_all(results: Results) -> list[Comparison]:
    """Compare CoVFT with every other method of the study of methods."""
    covft = results.main("covft")
    others = [g for g in results.groups if "methods" in g.studies and role_of(g) not in (None, "covft")]
    return [difference(f"covft − {group.label}", covft, group) for group in others]


def every_task(results: Results) -> list[Comparison]:
    """Compare CoVFT with the frozen tower on each of the twelve tasks."""
    covft, frozen = results.main("covft"), results.main("frozen")
    return [difference(task, covft, frozen, (task,)) for task in TWELVE]


def largest_in_vision(results: Results) -> list[Comparison]:
    """Compare the gain over the frozen tower in the vision group with that in the others."""
    covft, frozen = results.main("covft"), results.main("frozen")
    if covft is None or frozen is None:
        return []
    found = []
    for name in ("general", "knowledge"):
        tasks = [contrasts.common(GROUPS[group], covft, frozen) for group in ("vision", name)]
        signs = ((1, covft, tasks[0]), (-1, frozen, tasks[0]), (-1, covft, tasks[1]), (1, frozen, tasks[1]))
        terms = [Term(weight, group, own) for weight, group, own in signs]
        found.append(Comparison(f"gain in vision − in {name}", contrasts.contrast(terms) if all(tasks) else None))
    return found


def later_above_first(results: Results) -> list[Comparison]:
    """Compare CoVFT in the last blocks with as many of the first blocks, for every number of blocks."""
    placed = _placed(results)
    found = []
    for layers, group in placed.items():
        last = max((other for other in placed if len(other) == len(layers)), key=max)
        if layers[0] == 0 and last[0] > 0:
            found.append(difference(f"blocks {_range(last)} − {_range(layers)}", placed[last], group))
    return found


def later_above_all(results: Results) -> list[Comparison]:
    """Compare CoVFT in its own blocks, the last ones, with CoVFT in all blocks."""
    covft, placed = results.main("covft"), _placed(results)
    if covft is None or not placed:
        return []
    own, most = tuple(covft.settings["layers"]), max(placed, key=len)
    return [] if most == own else [difference(f"blocks {_range(own)} − {_range(most)}", covft, placed[most])]


def _placed(results: Results) -> dict[tuple[int, ...], Group]:
    """Return the groups of the study of placement by their blocks."""
    groups = [g for g in results.groups if "placement" in g.studies and role_of(g) == "covft"]
    return {tuple(group.settings["layers"]): group for group in groups if group.settings.get("layers")}


def _range(layers: Iterable[int]) -> str:
    layers = list(layers)
    return f"{min(layers)} to {max(layers)}" if len(layers) > 1 else str(layers[0])


def diversity_trend(results: Results) -> list[Comparison]:
    """Estimate how the gain of most over fewest experts grows with the number of tasks: last part minus first."""
    parts = results.parts(STUDIES["diversity"])
    by_part = {
        part: {g.settings["experts"]: g for g in groups if role_of(g) == "covft"} for part, groups in parts.items()
    }
    shared = set.intersection(*(set(each) for each in by_part.values())) if len(by_part) > 1 else set()
    if len(shared) < 2:
        return []
    least, most = min(shared), max(shared)
    high, low = max(by_part), min(by_part)  # type: ignore[type-var]
    ends = [by_part[high][most], by_part[high][least], by_part[low][least], by_part[low][most]]
    tasks = contrasts.common(TWELVE, *ends)
    terms = [Term(weight, group, tasks) for weight, group in zip((1, -1, 1, -1), ends, strict=True)]
    name = f"{most} − {least} experts, with {high} tasks − with {low}"
    return [Comparison(name, contrasts.contrast(terms) if tasks else None)]


def matched(results: Results) -> list[Comparison]:
    """Compare the CoVFT that is closest in size with each other method that has about as many parameters."""
    own = [g for g in results.groups if role_of(g) == "covft" and "matched" in g.studies]
    own += [g for g in (results.main("covft"),) if g is not None]
    others = [g for g in results.groups if "matched" in g.studies and method_of(g) != "covft"]
    if not own:
        return []

    def size(group: Group) -> int:
        return group.first.trained.get("tower", 0)

    closest = [(min(own, key=lambda group: abs(size(group) - size(other))), other) for other in others]
    pairs = [(a, b) for a, b in closest if max(size(a), size(b)) <= _AS_MANY * min(size(a), size(b))]
    return [difference(f"{a.label} − {b.label}", a, b) for a, b in pairs]


def in_each_part(study: str, references: tuple[str, ...], tasks: tuple[str, ...] = TWELVE) -> Compare:
    """Compare CoVFT with references in every part of a study."""

    def compare(results: Results) -> list[Comparison]:
        found = []
        for part, groups in results.parts(STUDIES[study]).items():
            covft = standing(groups, "covft")
            for role in references:
                other = results.reference(STUDIES[study], groups, role)
                name = f"covft − {role}, {STUDIES[study].part_form.format(part)}"
                found.append(difference(name, covft, other, tasks))
        return found

    return compare


def less_data(results: Results) -> list[Comparison]:
    """Compare CoVFT on three quarters of the data with the frozen tower on all of it."""
    parts = results.parts(STUDIES["fraction"])
    covft = next((g for g in parts.get(75, ()) if role_of(g) == "covft"), None)
    return [difference("covft, 75% − frozen, 100%", covft, results.main("frozen"))]


# ---------------------------------------------------------------------------------- the second paper


def _side(group: Group) -> tuple[str, bool]:
    """Return how the language model is tuned, and whether the projector is."""
    language = group.settings.get("language", "full")
    return language["method"] if isinstance(language, dict) else str(language), bool(group.settings.get("projector"))


def _languages(results: Results) -> dict[tuple[str, bool], Group]:
    """Return the groups that tune the language side beside a frozen tower."""
    return {_side(group): group for group in forgetting.tuned(results) if method_of(group) == "frozen"}


def _between(name: str, ours: tuple[str, Group | None], theirs: tuple[str, Group | None]) -> Comparison:
    """Compare E, F or O of two groups; of F, less is better."""
    (said, first), (other, second) = (theirs, ours) if name == "F" else (ours, theirs)
    known = first is not None and second is not None
    return Comparison(f"{name}: {said} − {other}", forgetting.compared(first, second, name) if known else None)


def language_better(name: str, ours: str, theirs: str) -> Compare:
    """Compare E, F or O of two ways to tune the language side, with the projector."""

    def compare(results: Results) -> list[Comparison]:
        found = _languages(results)
        return [_between(name, (ours, found.get((ours, True))), (theirs, found.get((theirs, True))))]

    return compare


def full_gains_most(results: Results) -> list[Comparison]:
    """Compare E of full tuning with that of every other way."""
    found = _languages(results)
    others = [way for way, projector in found if projector and way != "full"]
    return [_between("E", ("full", found.get(("full", True))), (way, found[way, True])) for way in others]


def projector_matters(results: Results) -> list[Comparison]:
    """Compare O with and without the projector, for every way that has both."""
    found = _languages(results)
    ways = [way for way, projector in found if projector and (way, False) in found]
    return [_between("O", (f"{way} with projector", found[way, True]), ("without", found[way, False])) for way in ways]


def tower_forgets_less(ours: str, theirs: str) -> Compare:
    """Compare F of two ways to tune the tower, beside the same language side."""

    def compare(results: Results) -> list[Comparison]:
        found = {method_of(group): group for group in forgetting.tuned(results) if method_of(group) != "frozen"}
        return [_between("F", (ours, found.get(ours)), (theirs, found.get(theirs)))]

    return compare


PAPER = (
    Claim("CoVFT is above the frozen tower", "Table 1", "+2.15", main_above("covft", ["frozen"])),
    Claim("CoVFT is above full fine-tuning", "Table 1", "+1.79", main_above("covft", ["full"])),
    Claim("CoVFT is above every other method", "Table 1, supplement B", "", covft_above_all, "methods"),
    Claim("CoVFT improves each of the twelve tasks over the frozen tower", "Table 1", "12 of 12", every_task),
    Claim("Its gain is largest in the vision-centric group", "Table 1", "+4.10 (+0.81, +0.73)", largest_in_vision),
    Claim("Full fine-tuning is above the frozen tower", "Table 1", "+0.36", main_above("full", ["frozen"])),
    Claim("BitFit is above the frozen tower", "Table 1", "+0.64", main_above("bitfit", ["frozen"])),
    Claim("LoRA is above the frozen tower", "Table 1", "+0.11", main_above("lora", ["frozen"])),
    Claim(
        "VPT and SVPT are below the frozen tower", "Table 1", "−0.74, −0.23",
        lambda results: [
            difference(f"frozen − {name}", results.main("frozen"), results.main(name)) for name in ("vpt", "svpt")
        ],
    ),
    Claim(
        "Any context is above none: the image alone is above full fine-tuning", "Table 2", "+0.48",
        lambda results: [
            difference("image − full", _varied(results, "context", {"context": "image"}), results.main("full"))
        ],
    ),
    Claim(
        "The text guides: text alone as context is above the image alone", "Table 2", "+0.78",
        setting("context", {"context": "text"}, {"context": "image"}),
    ),
    Claim(
        "Image and text together are above the text alone", "Table 2", "+0.53",
        setting("context", None, {"context": "text"}),
    ),
    Claim(
        "Cross-attention is above concatenation", "Table 2", "+0.64", setting("context", None, {"context": "concat"}),
    ),
    Claim("Dense routing is above sparse", "Table 2", "+0.98", setting("context", None, {"routing": "sparse"})),
    Claim(
        "Sparse routing is above random", "Table 2", "+1.10",
        setting("context", {"routing": "sparse"}, {"routing": "random"}),
    ),
    Claim(
        "It is not the parameters: dense routing is above uniform", "Table 2", "+1.48",
        lambda results: [difference("covft − uniform", results.main("covft"), _uniform(results))],
    ),
    Claim("The later blocks are a better place than the first", "Table 4", "+1.75", later_above_first, "placement"),
    Claim("The later blocks are a better place than all", "Table 4", "+0.85", later_above_all),
    Claim(
        "Four experts are best", "Table 5", "+0.61 over 2, +0.26 over 8",
        lambda results: [
            each for count in (2, 8) for each in setting("experts", None, {"experts": count})(results)
        ],
    ),
    Claim("The more kinds of task, the more experts help", "Table 6", "+2.02", diversity_trend),
    Claim("With as many parameters, CoVFT is above other methods", "Table 7", "+0.78 over LoRA", matched, "matched"),
    Claim(
        "CoVFT is above QA-ViT and Q-MoE", "Supplement B", "+1.96, +1.79", main_above("covft", ["qa_vit", "q_moe"]),
    ),
    Claim(
        "CoVFT is above frozen and full at every share of the data", "Fig. 4", "all",
        in_each_part("fraction", ("frozen", "full")), "fraction",
    ),
    Claim(
        "So it is in the vision-centric group", "Fig. 4", "not so at 50% and 25%",
        in_each_part("fraction", ("frozen", "full"), GROUPS["vision"]), "fraction",
    ),
    Claim("CoVFT with 75 percent of the data is above frozen with all of it", "Fig. 4", "", less_data),
    Claim("CoVFT is above frozen with another tower", "Table 3", "+2.20, +2.55", in_each_part("tower", ("frozen",))),
    Claim("CoVFT is above full fine-tuning with another tower", "Table 3", "+2.60", in_each_part("tower", ("full",))),
)  # fmt: skip

SECOND_PAPER = (
    Claim("LoRA forgets less than full tuning", "F", "", language_better("F", "lora", "full")),
    Claim("Full tuning gains most on the downstream tasks", "E", "", full_gains_most, "forgetting"),
    Claim("LoRA is the better balance of both", "O", "", language_better("O", "lora", "full")),
    Claim("DoRA forgets less than full tuning", "F", "", language_better("F", "dora", "full")),
    Claim("Tuning the projector matters", "O", "", projector_matters, "forgetting"),
)


def _uniform(results: Results) -> Group | None:
    """Return CoVFT with uniform routing, which may be a setting or a control."""
    found = _varied(results, "context", {"routing": "uniform"})
    return found or _controlled(results, "uniform")


def _controlled(results: Results, control: str, method: str = "covft") -> Group | None:
    found = (g for g in results.groups if g.settings.get("control") == control and method_of(g) == method)
    return min(found, key=lambda group: len(group.label), default=None)


def through_the_tower(results: Results) -> list[Comparison]:
    """Compare CoVFT with the frozen tower where the language model sees no question."""
    ours, theirs = (_controlled(results, "tower_only", method) for method in ("covft", "frozen"))
    return [difference("covft − frozen, without the question", ours, theirs)]


def covft_above(control: str) -> Compare:
    """Compare CoVFT with one of its controls."""
    name = f"covft − {control.replace('_', ' ')}"
    return lambda results: [difference(name, results.main("covft"), _controlled(results, control))]


OWN = (
    Claim("The question matters in training: above shuffled texts", "controls", "", covft_above("shuffled")),
    Claim(
        "The question is used: above the same model with texts shuffled in evaluation", "controls", "",
        covft_above("shuffled_eval"),
    ),
    Claim("A text of its own matters: above one text for all", "controls", "", covft_above("generic")),
    Claim("A text matters: above no text", "controls", "", covft_above("blank")),
    Claim("It is conditioning, not parameters: above uniform routing", "controls", "", covft_above("uniform")),
    Claim("The question says more than the name of its task", "controls", "", covft_above("oracle")),
    Claim(
        "The question passes through the tower, where the language model does not see it", "controls", "",
        through_the_tower,
    ),
    Claim(
        "Features that mean something matter: above random ones", "text encoder", "",
        setting("text_encoder", None, {"text_encoder": "random"}),
    ),
    Claim(
        "MiniLM is above a bag of words", "text encoder", "",
        setting("text_encoder", None, {"text_encoder": "bag_of_words"}),
    ),
    Claim(
        "Beside a language model tuned by LoRA, CoVFT forgets less than a fully tuned tower", "forgetting", "",
        tower_forgets_less("covft", "full"),
    ),
)  # fmt: skip
