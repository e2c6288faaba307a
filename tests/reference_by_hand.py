"""Routing and dispatch again, as loops over Python numbers that share nothing with ``moepass.reference``."""

from __future__ import annotations

import math

from moepass.spec import DispatchSpec, RouterSpec


def score(logits: list[float], kind: str) -> list[float]:
    if kind == "softmax":
        top = max(logits)
        powers = [math.exp(v - top) for v in logits]
        return [p / sum(powers) for p in powers]
    if kind == "sigmoid":
        return [1.0 / (1.0 + math.exp(-v)) for v in logits]
    return [math.sqrt(math.log1p(math.exp(v))) for v in logits]


def best(values: list[float], count: int) -> list[int]:
    """Positions of the highest values, ties to the lower position."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose(values: list[float], spec: RouterSpec, bias: list[float]) -> list[int]:
    """A token's K experts."""
    biased = [v + b for v, b in zip(values, bias, strict=True)]
    if spec.groups == 1:
        return best(biased, spec.top_k)
    size = len(values) // spec.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(spec.groups)]
    count = {"top2": 2, "max": 1, "top_k_per_group": spec.top_k // spec.kept_groups}[spec.group_score]
    worth = [sum(sorted((biased[e] for e in group), reverse=True)[:count]) for group in members]
    allowed = sorted(e for g in best(worth, spec.kept_groups) for e in members[g])
    return [allowed[i] for i in best([biased[e] for e in allowed], spec.top_k)]


def route(logits: list[float], spec: RouterSpec, bias: list[float]) -> tuple[list[int], list[float]]:
    """A token's K experts and their weights."""
    values = score(logits, spec.score) if spec.score_first else logits
    chosen = choose(values, spec, bias)
    weights = [values[e] for e in chosen]
    if not spec.score_first:
        weights = score(weights, spec.score)
    if spec.normalize is not None:
        norm = sum(w**spec.normalize for w in weights) ** (1.0 / spec.normalize) + spec.normalize_eps
        weights = [w / norm for w in weights]
    return chosen, [w * spec.scale for w in weights]


def kept(index: list[list[int]], weight: list[list[float]], E: int, spec: DispatchSpec, window: int) -> set[tuple]:
    """``(token, slot)`` pairs that are computed, with capacity counted over ``window`` tokens."""
    T, K = len(index), len(index[0]) if index else 0
    pairs = [(t, k) for t in range(T) for k in range(K) if index[t][k] < E]
    if spec.capacity_factor is not None:
        limit = max(1, math.ceil(spec.capacity_factor * window * K / E))
        by_expert: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for t, k in pairs:
            by_expert.setdefault((t // window, index[t][k]), []).append((t, k))
        if spec.drop_policy == "probability":
            for rows in by_expert.values():
                rows.sort(key=lambda p: -weight[p[0]][p[1]])
        pairs = [p for rows in by_expert.values() for p in rows[:limit]]
    if spec.ragged_buffer_factor is not None:
        pairs.sort(key=lambda p: (index[p[0]][p[1]], p))
        pairs = pairs[: math.ceil(spec.ragged_buffer_factor * T * K)]
    return set(pairs)


def choose_tokens(scores: list[list[float]], limit: int, window: int, real: list[bool]) -> set[tuple[int, int]]:
    """``(token, expert)`` pairs of expert choice."""
    pairs = set()
    for start in range(0, len(scores), window):
        tokens = [t for t in range(start, start + window) if real[t]]
        for e in range(len(scores[0])):
            pairs |= {(tokens[i], e) for i in best([scores[t][e] for t in tokens], limit)}
    return pairs
