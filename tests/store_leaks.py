"""Bytes that a store still counts: after everything it holds was purged, there must be none."""

from __future__ import annotations

from kvstore.store.tiered import TieredStore


def counted(store: TieredStore) -> dict[str, int]:
    """What each account of the store says, those that are not 0 only. Bytes, unless the name says what."""
    stack, residency = store.stack, store.stack.residency
    accounts = {
        "arena": store.arena.used,
        "arena, freed but held by readers": store.arena.limbo_bytes,
        "staging": store.staging.used,
        "on their way down": store.movement.moving_bytes,
        "being loaded": store.loading.budget.used,
        "pins of rows": sum(residency.rows.pins),
        "holds": len(store.opening.holds),
        "blocks": len(residency),
    }
    for level, tier in enumerate(stack.tiers):
        name = f"level {level} ({tier.tier.name.lower()})"
        accounts[f"{name}, by the tier"] = tier.used
        accounts[f"{name}, by residency"] = residency.used[level]
        accounts[f"{name}, leaving"] = residency.leaving_bytes[level]
        accounts[f"{name}, raw"] = residency.raw_bytes[level]
    for namespace, held in residency.held.items():
        accounts[f"namespace {namespace}"] = sum(held)
    return {name: number for name, number in accounts.items() if number}


async def emptied(store: TieredStore) -> None:
    """Purge everything, wait until nothing moves, and require that every byte came back."""
    for namespace in list(store.heads()):
        store.purge(namespace)
    await store.idle()
    left = counted(store)
    assert not left, f"leaked: {left}"
    store.validate()
