"""Check that a model still fits an average: names, shapes, ties, roles, division among ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastema.average.entries import Names
from fastema.average.memory import Averages, Entry
from fastema.binding.binding import Match
from fastema.binding.sides import FreezeState
from fastema.bridges.registry import leaves_of
from fastema.errors import LayoutError, StateError, format_problems
from fastema.layout.group import Pair, check_pair, refuse_overlap, refuse_shared_elements
from fastema.layout.spec import Leaf, Leaves, Sharding, StateEntry, TensorSpec

__all__ = [
    "Matcher",
    "frozen_states",
    "names_of_state",
    "pair_with_model",
    "refuse_divided_otherwise",
    "refuse_other_holder",
    "refuse_other_model",
]


class Matcher:
    """Pairs averages with a model's tensors. It holds no reference to the binding: no cycle."""

    def __init__(self, memory: Averages, names: Names) -> None:
        self._memory, self._names = memory, names

    def match_exactly(self, averages: Leaves, model: Leaves) -> Match:
        """Match a model that must have the tensors of the average, and no others."""
        return self._match_leaves(averages, model, match_subset=False)

    def match_subset(self, averages: Leaves, model: Leaves) -> Match:
        """Match a model that may have new or unfrozen tensors: to restore its weights."""
        return self._match_leaves(averages, model, match_subset=True)

    def _match_leaves(self, averages: Leaves, model: Leaves, *, match_subset: bool) -> Match:
        memory, names = self._memory, self._names
        located = memory.locate(averages, model)
        entries = memory.sets[0]
        refuse_other_model(model, entries, names, match_subset=match_subset)
        found = {leaf.name: leaf for leaf in model.items}
        pairs = memory.pairs({name: found[name].spec for name in entries})
        for pair in pairs:
            check_pair(pair)
            refuse_shared_elements(pair.name, pair.src)
        # A swap writes the weights: writable ones must not overlap.
        weights = [(pair.name, pair.src) for pair in pairs if not pair.average_index]
        refuse_overlap([one for one in weights if one[1].writable])
        by_tag: dict[str, list[Pair]] = {"averaged": [], "copied": []}
        for pair in pairs:
            by_tag["averaged" if pair.name in memory.averaged else "copied"].append(pair)
        watched = model.select_names({*entries, *names.aliases, *names.shared})
        return Match(by_tag, located, watched, frozen_states(model, names))


def frozen_states(model: Leaves, names: Names) -> list[FreezeState]:
    """Return the parameters without an average because they are frozen, which must stay so."""
    return [
        FreezeState(leaf.spec.owner, before=False)
        for leaf in model.items
        if leaf.role == "frozen" and names.must_stay_frozen(leaf.name)
    ]


def refuse_other_model(
    leaves: Leaves, entries: Mapping[str, Entry], names: Names, *, match_subset: bool
) -> None:
    """Refuse a model with tensors added, removed, renamed, reshaped, untied or unfrozen.

    With ``match_subset`` new and unfrozen tensors are accepted: restoring weights needs the old
    tensors only.

    Raises
    ------
    LayoutError
        Listing every mismatch, including a different division among ranks.
    """
    for one in leaves.opaque:
        if one.name in entries:
            raise one.error
    found = {leaf.name: leaf for leaf in leaves.items}
    gone = _find_missing_or_reshaped(found, entries)
    problems = [*gone.values(), *_find_untied(found, names.aliases)]
    if not match_subset:
        problems += _find_new_or_unfrozen(leaves, entries, names)
    refuse_divided_otherwise(found, entries)
    if problems:
        advice = "Build a new average for the changed model."
        if gone.keys() & names.buffers:
            advice = (
                "If a buffer changes its shape, or is sometimes None, register it with "
                f"persistent=False, or build the average with buffers='skip'.\n{advice}"
            )
        raise LayoutError(
            f"the model no longer matches the average:\n{format_problems(problems)}\n{advice}"
        )


def _find_missing_or_reshaped(
    found: Mapping[str, Leaf], entries: Mapping[str, Entry]
) -> dict[str, str]:
    """Return what is wrong with averaged tensors, by name."""
    problems = {name: f"{name!r} is gone from the model" for name in entries if name not in found}
    for name, entry in entries.items():
        if name in found and found[name].spec.full_shape != entry.spec.full_shape:
            now, was = list(found[name].spec.full_shape), list(entry.spec.full_shape)
            problems[name] = f"{name!r} is now {now}, was {was}"
    return problems


def refuse_divided_otherwise(found: Mapping[str, Leaf], entries: Mapping[str, Entry]) -> None:
    """Refuse a model that is divided among ranks differently from the average."""
    both = [
        (name, found[name].spec.division, entry.spec.division)
        for name, entry in entries.items()
        if name in found
    ]
    problems = [
        f"{name!r} is {_describe_division(now)}, its average {_describe_division(was)}"
        for name, now, was in both
        if now != was
    ]
    if problems:
        raise LayoutError(
            f"the model is not divided as its average is:\n{format_problems(problems)}\nFSDP "
            "gathers parameters for a forward pass, and leaves them gathered if no backward pass "
            "follows. Call update() after optimizer.step(), or reshard() on the modules first; "
            "after a forward pass that raised, reset_iter_state() on the root module. To change "
            "the division, load the state_dict() into a new average of the new model."
        )


def _describe_division(division: Sharding | None) -> str:
    return "whole on this rank" if division is None else str(division)


def _find_untied(found: Mapping[str, Leaf], aliases: Mapping[str, str]) -> list[str]:
    return [
        f"{name!r} was tied to {kept!r} and no longer is"
        for name, kept in aliases.items()
        if name in found and kept in found and found[name].spec != found[kept].spec
    ]


def _find_new_or_unfrozen(leaves: Leaves, entries: Mapping[str, Entry], names: Names) -> list[str]:
    known = {*entries, *names.aliases, *names.skipped}
    present = [leaf.name for leaf in leaves.items if leaf.persistent]
    present += [one.name for one in leaves.opaque if one.persistent]
    new = [name for name in present if name not in known and not names.may_appear(name)]
    problems = [f"{name!r} is new in the model" for name in new]
    return problems + [
        f"{leaf.name!r} is trained now but was frozen when the average was built"
        for leaf in leaves.items
        if leaf.role == "weight" and names.must_stay_frozen(leaf.name)
    ]


def names_of_state(
    found: Mapping[str, StateEntry], entries: Mapping[str, Entry], names: Names
) -> dict[str, str]:
    """Return the average's name for every key of a model's state dict.

    Raises
    ------
    LayoutError
        If averaged tensors have unknown keys: their raw values would pass for averages.
    """
    kept = {key: names.aliases.get(one.name, one.name) for key, one in found.items()}
    missing = {name for name, entry in entries.items() if entry.averaged} - {*kept.values()}
    known = {*entries, *names.skipped}
    strange = [
        key
        for key, name in kept.items()
        if name not in known and hasattr(found[key].value, "shape")
    ]
    if missing and strange:
        raise LayoutError(
            "the model's state_dict() renames or copies averaged tensors (by a hook): "
            f"{strange[0]!r} is unknown, {min(missing)!r} is missing; use "
            "ema.shadow, or swapped() and model.state_dict()"
        )
    return kept


def refuse_other_holder(container: Any, holder: Any, weights: Mapping[str, TensorSpec]) -> None:
    """Refuse to restore a model other than ``holder``, to which the average is applied."""
    if container is holder:
        return
    found = {leaf.name: leaf.spec for leaf in leaves_of(container).items}

    def is_same(name: str, spec: TensorSpec) -> bool:
        # Addresses of tensors that move prove nothing: compare their owners too.
        return name in found and (found[name] == spec or found[name].owner is spec.owner)

    if not all(is_same(name, spec) for name, spec in weights.items()):
        raise StateError(
            "the average is applied to another model; call restore() without an argument to "
            "restore that one"
        )


def pair_with_model(leaves: Leaves, entries: Mapping[str, Entry], names: Names) -> list[Pair]:
    """Pair every name of an average with the tensor of a model that will receive it.

    Raises
    ------
    LayoutError
        If tensors are missing, trained weights have no average, or the division differs.
    """
    found = {leaf.name: leaf for leaf in leaves.items}
    wanted = {name: name for name in entries} | {
        name: kept for name, kept in names.aliases.items() if name in found
    }
    for one in leaves.opaque:
        if one.name in wanted:
            raise one.error
    problems = [f"{name!r} is missing" for name in wanted if name not in found]
    known = {*wanted, *names.skipped}
    problems += [
        f"{leaf.name!r} is trained and has no average"
        for leaf in leaves.items
        if leaf.role == "weight" and leaf.name not in known
    ]
    if problems:
        raise LayoutError("the model does not match the average:\n" + format_problems(problems))
    refuse_divided_otherwise(found, {name: entries[kept] for name, kept in wanted.items()})
    return [_pair_for_copy(entries[kept], name, found[name]) for name, kept in wanted.items()]


def _pair_for_copy(entry: Entry, name: str, leaf: Leaf) -> Pair:
    return entry.pair(leaf.spec, 0)._replace(name=name, ring=None)
