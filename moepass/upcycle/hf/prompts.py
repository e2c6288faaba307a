"""A router from prompts: each expert is told by examples which tokens it should get.

Contract
    in    for each expert (each group of virtual groups, or each parent) a list of prompts: texts or token ids
    out   ``PromptRouter``: for each layer the rows [E, D] in float32, and digests that enter the plan's hash
    Deterministic: one thread, sums in float64; the prompts, SRC and the machine's float32 arithmetic decide the bytes,
    and the digest holds the rows, so that a resumed run never mixes two of them.
The rows of a layer (U entries, token t of entry u has the router's input x_t [D])
    m_u    mean of x_t over the tokens of entry u, the tokenizer's special tokens included, padding not
    c_u    m_u minus the mean of all m: what the entries share routes nowhere
    r_u    c_u without its part along the mean of all m, made a unit vector: were that part left, an expert would win or
           lose every token by it.  So the mean token of entry u has its largest logit at expert u: r_v.m_u = r_v.c_u,
           and of unit vectors r_u has the largest product with c_u
    row_u  r_u * router_std / s, s being the root mean square, over all prompt tokens t and entries u, of the logit
           r_u.x_t less its mean over u: on the prompts, what routes has standard deviation router_std
Input: SRC's hidden state after the norm in front of the feed-forward block, which is what the router reads.  mergekit's
``hidden`` mode takes the residual stream at the layer's input, before attention and that norm: no router sees it
(``reference/upcycling.md`` section 1.7).  With averaged parents the MoE's inputs are near SRC's, not equal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from moepass import errors
from moepass.upcycle.checkpoint.observe import observe
from moepass.upcycle.checkpoint.source import Source
from moepass.upcycle.hf.calibration import single_threaded
from moepass.upcycle.hf.recipe import Plan
from moepass.upcycle.hf.tokenizer import tokenizer_of

#: Token positions, padding included, that run through a layer at once: what memory grows with.
MAX_POSITIONS = 8192
_INSTEAD = "give lists of token ids instead of texts"
#: Below this share of the mean input's length, a difference between entries is rounding.
_SAME = 1e-6

#: Entries -> prompts -> token ids.
Ids = tuple[tuple[tuple[int, ...], ...], ...]
#: A JSON file, or its content.
Given = str | os.PathLike[str] | Sequence[Sequence[str | Sequence[int]]]


@dataclass(frozen=True)
class PromptRouter:
    """``rows``: layer -> [E, D] float32; ``ids``: what they were made from."""

    rows: dict[int, Tensor]
    ids: Ids
    warnings: tuple[str, ...] = ()

    def weight(self, layer: int, dtype: torch.dtype) -> Tensor:
        """Router weight ``[E, D]``."""
        return self.rows[layer].to(dtype)

    def digest(self, layer: int) -> str:
        """Identifies the prompts and the rows of a layer."""
        rows = hashlib.sha256(self.rows[layer].numpy().tobytes()).hexdigest()
        return f"prompts {_digest(self.ids)[:16]} rows {rows[:16]}"

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        tokens = [sum(len(ids) for ids in entry) for entry in self.ids]
        return {"digest": _digest(self.ids), "prompts": [len(entry) for entry in self.ids], "tokens": tokens}


def router_for(
    given: Given | None, source: Source, plan: Plan, layers: Sequence[int], parents: int = 0
) -> PromptRouter | None:
    """The router of a recipe that asks for one from prompts, else None.

    ``parents``: how many there are, 0 for none.  Raises as ``read_prompts`` and ``prompt_router``.
    """
    if (plan.recipe.router == "prompts") != (given is not None):
        _refuse("router", plan.recipe.router, "--router prompts and --prompts FILE go together")
    if given is None:
        return None
    embedding = source.headers.get("model.embed_tokens.weight")
    if embedding is None:
        name, remedy = "model.embed_tokens.weight", "check that config.json belongs to these tensors"
        raise errors.UnexpectedTensor(folder=source.folder, name=name, detail="is missing", remedy=remedy)
    return prompt_router(source, read_prompts(given, source, embedding.shape[0]), plan, layers, parents)


def read_prompts(given: Given, source: Source, vocabulary: int) -> Ids:
    """Token ids of a JSON file, or of a list as in it.  Texts go through SRC's tokenizer, special tokens included.

    Raises ``BadOption`` for what is no such list, ids outside ``0..vocabulary-1``, too many tokens, or texts without a
    tokenizer.
    """
    content = _load(Path(given)) if isinstance(given, str | os.PathLike) else given
    entries = _items(content, "it", "a list with one entry per expert")
    tokenizer: Any = None
    found = []
    for u, entry in enumerate(entries):
        prompts = []
        for i, prompt in enumerate(_items(entry, f"entry {u}", "a list of prompts")):
            where = f"prompt {i} of entry {u}"
            if prompt == "":
                prompt = []
            if isinstance(prompt, str):
                tokenizer = tokenizer or tokenizer_of(source.folder, "prompts", "texts", _INSTEAD)
                prompt = tokenizer(prompt)["input_ids"]
            prompts.append(_ids(prompt, where, vocabulary))
        found.append(tuple(prompts))
    ids = tuple(found)
    _check_size(ids)
    return ids


def prompt_router(source: Source, ids: Ids, plan: Plan, layers: Sequence[int], parents: int = 0) -> PromptRouter:
    """Run the prompts through SRC, a layer in memory at a time, and make the rows of ``layers``.

    ``ids`` has an entry per expert (per group of virtual groups), or one for each of ``parents``.
    Raises ``BadOption`` for another number of entries and for entries that do not differ, and as ``observe``.
    """
    repeat = repeats(len(ids), plan, parents)
    flat = [prompt for entry in ids for prompt in entry]
    owner = [u for u, entry in enumerate(ids) for _ in entry]
    padded = torch.zeros(len(flat), max(map(len, flat)), dtype=torch.long)
    for row, prompt in zip(padded, flat, strict=True):  # on the right: causal models do not look there
        row[: len(prompt)] = torch.tensor(prompt)
    rows: dict[int, Tensor] = {}

    def see(layer: int, x: Tensor, _: Tensor) -> None:
        if layer in layers:
            tokens = [x[b, : len(prompt)].double() for b, prompt in enumerate(flat)]
            made = router_rows_of(tokens, owner, plan.recipe.router_std, f"layer {layer}")
            rows[layer] = made.repeat_interleave(repeat, 0).float()

    with single_threaded():
        observe(source.folder, padded, see)
    return PromptRouter(rows, ids, _sharing(plan, repeat))


def repeats(entries: int, plan: Plan, parents: int = 0) -> int:
    """How many experts share the row of an entry.  Raises ``BadOption``."""
    each = plan.init.granularity if plan.init.method == "virtual_groups" else 1
    blocks = plan.recipe.experts // each
    if plan.zero_router:
        _refuse("router", "prompts", "a split whose tokens use all experts starts from a zero router; leave it out")
    if entries == blocks or (parents > 1 and entries == parents):
        return blocks // entries * each
    wanted = f"{blocks} ({'one per expert' if each == 1 else 'one per virtual group'})"
    wanted += f" or {parents} (one per parent)" if parents > 1 and parents != blocks else ""
    return _refuse("prompts", f"{entries} entries", f"give {wanted}")


def router_rows_of(tokens: Sequence[Tensor], owner: Sequence[int], std: float, where: str) -> Tensor:
    """Rows ``[U, D]``, see above.  ``tokens``: inputs ``[S_i, D]`` of prompt i in float64; ``owner``: its entry."""
    sums = torch.zeros(max(owner) + 1, tokens[0].shape[1], dtype=torch.float64)
    counts = torch.zeros(len(sums), 1, dtype=torch.float64)
    for x, u in zip(tokens, owner, strict=True):
        sums[u] += x.sum(0)
        counts[u] += len(x)
    means = sums / counts
    common = means.mean(0)
    along = common / common.norm().clamp(min=torch.finfo(torch.float64).tiny)
    apart = means - common
    apart -= (apart @ along).unsqueeze(1) * along
    lengths = apart.norm(dim=1)
    same = lengths <= _SAME * means.norm(dim=1)
    if same.any():
        u = int(same.nonzero()[0])
        detail = f"in {where} its tokens are on average those of all entries, so nothing tells its expert apart"
        _refuse("prompts", f"entry {u}", f"{detail}; give entries that differ")
    units = apart / lengths.unsqueeze(1)
    total = 0.0
    for x in tokens:
        logits = x @ units.T
        total += float((logits - logits.mean(1, keepdim=True)).square().sum())
    rms = (total / (float(counts.sum()) * len(units))) ** 0.5
    rows: Tensor = units * (std / rms)
    return rows


def _sharing(plan: Plan, repeat: int) -> tuple[str, ...]:
    """Experts that are equal and have equal rows never come apart."""
    shared = repeat // plan.cut
    if plan.recipe.method not in {"copy", "virtual-groups"} or shared == 1:
        return ()
    return (f"{shared} copies of a parent share a router row and stay equal in training: give an entry for each",)


def _refuse(name: str, value: object, detail: str) -> NoReturn:
    raise errors.BadOption(name=name, value=value, detail=detail)


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as e:
        _refuse("prompts", str(path), f"it cannot be read ({e.strerror})")
    except (ValueError, RecursionError) as e:
        _refuse("prompts", str(path), f"it is not JSON ({e})")


def _items(content: object, what: str, wanted: str) -> Sequence[Any]:
    if not isinstance(content, list | tuple):
        _refuse("prompts", _short(content), f"{what} must be {wanted}")
    if not content:
        _refuse("prompts", content, f"{what} is empty and must be {wanted}")
    return content


def _ids(prompt: object, where: str, vocabulary: int) -> tuple[int, ...]:
    whole = isinstance(prompt, list | tuple) and all(type(i) is int for i in prompt)
    if not whole:
        _refuse("prompts", _short(prompt), f"{where} must be a text or a list of token ids")
    assert isinstance(prompt, list | tuple)
    if not prompt:
        _refuse("prompts", prompt, f"{where} has no token")
    wrong = next((i for i in prompt if not 0 <= i < vocabulary), None)
    if wrong is not None:
        _refuse("prompts", wrong, f"{where} holds an id outside the vocabulary, which is 0 to {vocabulary - 1}")
    return tuple(prompt)


def _check_size(ids: Ids) -> None:
    lengths = [len(prompt) for entry in ids for prompt in entry]
    positions = len(lengths) * max(lengths)
    if positions > MAX_POSITIONS:
        detail = f"padded to the longest they fill {positions} positions, at most {MAX_POSITIONS} fit in memory"
        _refuse("prompts", f"{len(lengths)} prompts of up to {max(lengths)} tokens", f"{detail}; shorten the longest")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(content: Mapping[str, Any] | Ids) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
