"""Words of a recipe that do not fit the model: rules without a layer, fused layers that differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prismquant.models.arch import Modality
from prismquant.models.bound import BoundModel
from prismquant.plan.plan import PlanRow, problem_groups
from prismquant.recipe.match import Match
from prismquant.recipe.resolve import Resolved
from prismquant.recipe.schema import Recipe


def idle_rules(recipe: Recipe, bound: BoundModel, resolved: Iterable[Resolved]) -> list[str]:
    """Rules that match no layer and must, but for those of :func:`rules_of_absent_towers`."""
    used = {index for one in resolved for index in one.rules}
    used |= {index for index, _ in rules_of_absent_towers(recipe, bound)}
    modalities = sorted({str(site.modality) for site in bound.sites})
    roles = sorted({site.role for site in bound.sites})
    return [
        f"rules[{index}] matches no layer: "
        f"{rule.match.model_dump(mode='json', exclude_defaults=True)}; "
        f"modalities: {', '.join(modalities)}; roles: {', '.join(roles)}"
        for index, rule in enumerate(recipe.rules)
        if index not in used and not rule.optional
    ]


def rules_of_absent_towers(recipe: Recipe, bound: BoundModel) -> list[tuple[int, str]]:
    """Rules of a recipe that are of towers which a model of text alone does not have.

    Returns:
        Index of each rule, with a remark on it.
    """
    if bound.arch.sees:
        return []
    roles = {site.role for site in bound.sites}

    def is_absent(match: Match) -> bool:
        other_tower = bool(match.modality) and Modality.LLM not in match.modality
        return other_tower or (bool(match.role) and not any(map(match.means_role, roles)))

    return [
        (
            index,
            f"rules[{index}] is idle: it is of a vision tower or a projector, and this "
            f"{bound.arch.title} has none",
        )
        for index, rule in enumerate(recipe.rules)
        if is_absent(rule.match)
    ]


def idle_entries(recipe: Recipe, bound: BoundModel) -> list[str]:
    """Entries of a rule's lists that mean no layer, although the rule itself does or need not."""
    told = {index for index, _ in rules_of_absent_towers(recipe, bound)}
    rules = [(index, rule) for index, rule in enumerate(recipe.rules) if index not in told]
    matches = [(f"rules[{index}]", rule.match) for index, rule in rules]
    matches += [(f"transforms[{index}]", t.match) for index, t in enumerate(recipe.transforms)]
    return [
        f"{where}.match: {entry} means no layer of this model"
        for where, match in matches
        for entry in match.idle_entries(bound.sites)
    ]


def torn_fusions(rows: Sequence[PlanRow]) -> list[str]:
    """Servers load q/k/v and gate/up as one matrix each: their schemes must agree."""
    groups: dict[str, list[PlanRow]] = {}
    for row in rows:
        if row.site.fuse_key is not None:
            groups.setdefault(row.site.fuse_key, []).append(row)
    findings = []
    for members in groups.values():
        schemes = {(row.config.weights, *row.config.sides) for row in members}
        if len(schemes) > 1:
            listed = "; ".join(f"{row.site.role}: {row.config.describe()}" for row in members)
            findings.append(
                f"{members[0].site.name} and its neighbours are fused by servers "
                f"and must share a scheme, but: {listed}"
            )
        elif _shares_global_scale(members) and len(problem_groups(members)) > 1:
            findings.append(
                f"{members[0].site.name} and its neighbours are fused by servers and share one "
                "global scale, so they must be solved alike: give them the same solver, options, "
                "range, correction and on_failure"
            )
    return findings


def torn_experts(rows: Sequence[PlanRow]) -> list[str]:
    """Servers run all experts of a block at once: their layers must have one scheme."""
    blocks: dict[str, list[PlanRow]] = {}
    for row in rows:
        if row.site.expert is not None:
            blocks.setdefault(row.site.expert.module, []).append(row)
    findings = []
    for module, members in blocks.items():
        schemes: dict[object, PlanRow] = {}
        for row in members:
            schemes.setdefault((row.config.weights, *row.config.sides), row)
        if len(schemes) > 1:
            said = "; ".join(f"{r.site.name}: {r.config.describe()}" for r in schemes.values())
            findings.append(
                f"{module}: all layers of all experts of a block must share a scheme, as servers "
                f"run them at once, but: {said}"
            )
    return findings


def _shares_global_scale(rows: Sequence[PlanRow]) -> bool:
    return any(
        row.config.weights is not None and row.config.weights.scale == "e4m3" for row in rows
    )
