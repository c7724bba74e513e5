"""From counts of reuse to an order: Kaplan-Meier hazards by class, Gittins indices from them, keys of rows.

Kaplan and Meier, "Nonparametric estimation from incomplete observations", 1958, in discrete ages: who is of an age now,
or was forgotten at it, was under observation up to there (censored). The Gittins index (Gittins, "Bandit processes and
dynamic allocation indices", 1979) of a class at an age is the best ratio, over all times to wait, of the chance of
reuse until then to the expected time the block takes its place meanwhile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvstore.kernels import jit
from kvstore.kernels.reuse_state import (
    AGE_BINS,
    AGE_FIRST_S,
    AGE_STEP,
    BY_AGE,
    CLASSES,
    CLASSES_MAX,
    COARSE,
    FINISHES,
    INDEX,
    LOST,
    NONE,
    NOW,
    OPEN,
    REUSED,
    SERIAL,
    Known,
    age_bin,
    class_of,
)

SHRINK = 100.0  # observations with which a class doubts its own and goes with the coarser one
ENDED = FINISHES - 1  # the caller said that the session is over
PRIOR_ALL, PRIOR_ENDED = 0.02, 1e-4  # chance of reuse within an age bin before anything was seen; constant: that is LRU
PRIOR_WEIGHT = 1.0
VALUE_MAX, VALUE_SCALE = 1e4, 1e10  # of an index: together less than 2^47


@jit
def gittins(hazard: Any, into: Any) -> Any:
    """`hazard` [bin]: the chance of reuse in a bin of who reaches it; `into` [bin]. Mutates `into`."""
    for first in range(AGE_BINS):
        alive, gained, paid, best = 1.0, 0.0, 0.0, 0.0
        for b in range(first, AGE_BINS):
            high = AGE_FIRST_S * math.exp(AGE_STEP * b)
            width = high if b == 0 else high * (1.0 - math.exp(-AGE_STEP))
            if b == first:
                width *= 0.5  # it may be anywhere in it
            chance = alive * hazard[b]
            gained += chance
            paid += (alive - 0.5 * chance) * width
            alive -= chance
            best = max(best, gained / paid)
            if alive < 1e-6:
                break
        into[first] = best


@jit
def at_risk(reused: Any, lost: Any, now: Any, into: Any) -> Any:
    """Who reached each bin, and half of who was last seen in it. Mutates `into`."""
    beyond = 0.0
    for b in range(AGE_BINS - 1, -1, -1):
        beyond += reused[b]
        into[b] = beyond + 0.5 * (lost[b] + now[b])
        beyond += lost[b] + now[b]


@jit
def count_open(s: Known, blocks: Any, tables: Any) -> Any:
    """Every entry in its class and age; neighbours are mostly of one request and kind, as in `write_keys`. Mutates."""
    request, role, gap, c, b = np.int64(NONE), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    for e in range(len(blocks)):
        if blocks[e].request == NONE:
            continue
        if blocks[e].request != request or blocks[e].role != role or blocks[e].gap != gap:
            request, role, gap = np.int64(blocks[e].request), np.int64(blocks[e].role), np.int64(blocks[e].gap)
            c, b = np.int64(class_of(s, e)), np.int64(age_bin(s.x[NOW] - s.requests[request].time))
        tables[OPEN, c, b] += 1.0


@jit
def sweep(s: Known, keep: Any) -> Any:
    """Learn anew from all counts; older ones weigh `keep` of what they did. Mutates."""
    classes = s.n[CLASSES]
    s.tables[OPEN, :classes] = 0.0
    count_open(s, s.blocks, s.tables)
    classes = s.n[CLASSES]
    s.tables[REUSED, :classes] *= keep
    s.tables[LOST, :classes] *= keep
    risk = np.zeros((classes, AGE_BINS))
    reused_of, risk_of = np.zeros((COARSE, AGE_BINS)), np.zeros((COARSE, AGE_BINS))
    for c in range(classes):
        at_risk(s.tables[REUSED, c], s.tables[LOST, c], s.tables[OPEN, c], risk[c])
        for b in range(AGE_BINS):
            reused_of[s.coarse[c], b] += s.tables[REUSED, c, b]
            risk_of[s.coarse[c], b] += risk[c, b]
    reused_all, risk_all = reused_of.sum(axis=0), risk_of.sum(axis=0)
    hazard = np.zeros(AGE_BINS)
    for c in range(classes):
        k = s.coarse[c]
        if c != k and risk[c, 0] == 0.0:
            continue
        for b in range(AGE_BINS):
            prior = (reused_all[b] + PRIOR_WEIGHT * PRIOR_ALL) / (risk_all[b] + PRIOR_WEIGHT)
            if k % FINISHES == ENDED:
                prior = PRIOR_ENDED
            prior = (reused_of[k, b] + SHRINK * prior) / (risk_of[k, b] + SHRINK)
            hazard[b] = (s.tables[REUSED, c, b] + SHRINK * prior) / (risk[c, b] + SHRINK)
        gittins(hazard, s.tables[INDEX, c])


@jit
def write_key(s: Known, row: Any) -> Any:
    """A row's place in the order, as of now: its index, then the deeper first. Mutates."""
    e = s.entry[row]
    r = s.blocks[e].request
    now = s.x[NOW]
    age = now - s.requests[r].time
    value: Any = 0.0
    if s.n[BY_AGE]:
        value = 1.0 / (1.0 + np.float64(s.n[SERIAL] - s.requests[r].serial))  # age in requests: clocks may stand still
        if s.requests[r].finish == ENDED:
            value = value * PRIOR_ENDED / PRIOR_ALL
    else:
        value = np.float64(s.tables[INDEX, class_of(s, e), age_bin(age)])
    if s.requests[r].expect > now:
        value = max(value, 1.0 / (s.requests[r].expect - now))
    if s.requests[r].priority:
        value *= 2.0 ** s.requests[r].priority
    if now > s.requests[r].until:
        value = 0.0
    s.key[row] = (np.int64(min(value, VALUE_MAX) * VALUE_SCALE) << 16) | (0xFFFF - np.int64(s.blocks[e].depth))


@jit
def write_keys(s: Known, rows: Any) -> Any:
    """Of many rows. Neighbours are mostly of one request and kind: then one index serves them all. Mutates."""
    entry, blocks, key = s.entry, s.blocks, s.key
    request, role, gap, index = np.int64(NONE), np.int64(0), np.int64(0), np.int64(0)
    for row in rows:
        e = entry[row]
        if blocks[e].request != request or blocks[e].role != role or blocks[e].gap != gap:
            request, role, gap = np.int64(blocks[e].request), np.int64(blocks[e].role), np.int64(blocks[e].gap)
            write_key(s, row)
            index = key[row] >> 16 << 16
        key[row] = index | (0xFFFF - np.int64(blocks[e].depth))


def first_classes(coarse: Any, number: Any) -> Any:
    """The coarse classes take the first numbers, so that there is always one to count in. Mutates."""
    coarse[:COARSE] = np.arange(COARSE)
    number[:] = NONE
    assert COARSE < CLASSES_MAX
