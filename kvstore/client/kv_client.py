"""`KVClient`: look up, load and store the KV of prefixes. Every failure of the service becomes a miss and a counter.

Only a wrong argument raises (UsageError). Of an event loop; `kvstore.client.engine_face` is for callers without one.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from kvstore.auth import client_credentials
from kvstore.client.bulk import ready
from kvstore.client.direct import Direct
from kvstore.client.fetch import Failed, Fetch
from kvstore.client.getting import Buffers, GetResult, conclude, missing, preparing
from kvstore.client.hinting import NO_HINT, Hinter
from kvstore.client.layer_stream import LayerStream
from kvstore.client.links import Coordinators, Links
from kvstore.client.lookup import KEYS_MAX, Lookup
from kvstore.client.members import Members
from kvstore.client.needs import LayerReady, Need, Progress, delivered_blocks
from kvstore.client.pinning import Pin, Pinner
from kvstore.client.plan import HitPlan
from kvstore.client.prefetching import Prefetcher
from kvstore.client.purging import Purger
from kvstore.client.put_blocks import PutResult, Putter
from kvstore.client.rates import Rates
from kvstore.client.scores import Scores, request_of, scores_of
from kvstore.client.targets import buffer_of
from kvstore.client.watching import Watching
from kvstore.config import ClientConfig
from kvstore.errors import BadRequest, Corrupt, Incompatible, KVStoreError, NotGranted, ServiceError, Unauthenticated
from kvstore.keys import Chain, Tokens, chain
from kvstore.layout import block_bytes
from kvstore.operations.observe import Observer, look, status_object
from kvstore.policies.usage import Hint
from kvstore.recent import Recent
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard
from kvstore.transport.base import Credentials, Transport
from kvstore.transport.methods import CAPABILITIES, COORDINATOR, PROTOCOL_VERSION
from kvstore.types import CommitToken, Fidelity
from kvstore.wire import common_pb2

REFUSALS = (NotGranted, Unauthenticated, Incompatible)
"""What a server says when the configuration is wrong: told at `connect`, later a miss like anything else."""

PIN_S = 15.0
"""Life of a pin that is not renewed."""

SETTLE_SHARE = 0.05
"""Of a call's time, kept back so that what has arrived when it ends is still counted."""


class KVClient:
    """One process's view of the service, in one namespace. Make it with `connect`; close it, or use `async with`."""

    def __init__(
        self, config: ClientConfig, system: System, transport: Transport, credentials: Credentials, *, owns_system: bool
    ) -> None:
        self.config = config
        self.namespace = credentials.namespace
        self.counters: Counter[str] = Counter()
        self.system = system
        self._owns_system = owns_system
        self._pid = os.getpid()
        self._transport, self._credentials = transport, credentials
        self._links = Links(config, system, transport, credentials, self.counters)
        self.coordinators = Coordinators(config.coordinators, system, transport, credentials, probe_s=config.probe_s)
        self.members = Members(config, system, self.coordinators)
        self._failed: Recent[Failed] = Recent(system.clock, config.negative_cache_s, config.negative_cache_max)
        self.rates = Rates(self._is_here)
        self.watching = Watching(config, system, self.coordinators, self.members, self.counters)
        self._lookup = Lookup(
            config, system, self._links, self.coordinators, self.members, self._failed, self.counters, self.watching,
            self.rates,
        )  # fmt: skip
        self._direct = Direct(self.namespace, self._links, system, self._failed, self.rates, self.counters)
        self._prefetcher = Prefetcher(self._links, self.members, self.counters)
        self._pinner = Pinner(system, self._links, self.members, self.counters)
        self._purger = Purger(config, system, self._links, self.members, self.counters)
        self._hinter = Hinter(config, self._links, self.members, self.counters)
        self._putter = Putter(config, system, self._links, self.members, self.counters, self.watching.committed)

    @classmethod
    async def connect(
        cls, config: ClientConfig, system: System | None = None, transport: Transport | None = None
    ) -> KVClient:
        """A client; nobody has to answer yet. UsageError without any address. NotGranted, Unauthenticated and
        Incompatible when a server says so now."""
        if not config.coordinators and not config.workers:
            raise BadRequest("no coordinator and no worker given: set client.coordinators or client.workers")
        owns = system is None
        if system is None:
            from kvstore.machine.system import real_system

            system = real_system()
        if transport is None:
            from kvstore.transport.rpc import GrpcTransport
            from kvstore.transport.tls import client_tls

            transport = GrpcTransport(
                system.clock,
                connect_timeout_s=config.connect_timeout_s,
                tune_malloc=config.tune_malloc,
                tls=client_tls(config),
            )
        client = cls(config, system, transport, client_credentials(config), owns_system=owns)
        try:
            await system.pool.run(ready)
            await client._greet()
            if config.watch and config.coordinators:
                from kvstore.directory.block_table import prepare  # numba

                await system.pool.run(prepare)
                client.watching.start()
        except BaseException:
            await client.close()
            raise
        return client

    async def _greet(self) -> None:
        hello = common_pb2.HelloRequest(protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore")
        timeout_s = self.config.connect_timeout_s
        try:
            if self.config.coordinators:
                await self.coordinators.call(COORDINATOR["Hello"], hello, timeout_s=timeout_s)
                await self.members.refresh(timeout_s=timeout_s)
        except REFUSALS:
            raise
        except ServiceError as error:
            self.counters[f"errors_{type(error).__name__}"] += 1
        for socket in self.config.workers:
            try:
                async with self._links.local.use(socket):
                    pass
            except REFUSALS:
                raise
            except ServiceError as error:
                self.counters[f"errors_{type(error).__name__}"] += 1

    async def __aenter__(self) -> KVClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all connections. Idempotent."""
        await self.watching.close()
        await self._links.close()
        await self.coordinators.close()
        if self._owns_system:
            self.system.pool.close()

    # --- lookup ----------------------------------------------------------------------------------------------------

    async def match(
        self,
        spec: ModelSpec,
        prefix: Chain | Tokens,
        shards: Sequence[Shard] | None = None,
        least: Fidelity = Fidelity.EXACT,
        after: Iterable[CommitToken] = (),
        *,
        recompute_tokens_per_s: float | None = None,
        timeout_s: float | None = None,
    ) -> HitPlan:
        """The longest held prefix of a chain (or of tokens) in every needed shard; `shards` None: whole groups.

        `after`: commits, also other clients', that the answer should know; it waits for them up to 100 ms and names
        in `not_applied` what it does not know. One round trip, none with a view. No answer: a plan of 0 blocks.
        `recompute_tokens_per_s`: leave out what would take longer to load than to compute anew at that speed.
        """
        needed = self._shards(spec, shards)
        asked = self._chain(spec, prefix)
        keys = asked.keys
        if not keys:
            return HitPlan(spec, (), needed, least)
        timeout_s = self.config.match_timeout_s if timeout_s is None else timeout_s
        self._putter.tokens.add(after)
        shown = self._putter.tokens.pending()
        plan = await self._lookup.match(spec, asked, needed, least, after=shown, timeout_s=timeout_s)
        self._putter.tokens.applied(shown, plan.not_applied)
        if recompute_tokens_per_s is not None:
            if recompute_tokens_per_s <= 0:
                raise BadRequest("recompute_tokens_per_s must be greater than 0")
            held = plan.blocks
            plan = self.rates.worth(plan, recompute_tokens_per_s)
            self.counters["blocks_not_worth_loading"] += held - plan.blocks
        self.counters["match_blocks"] += len(keys)
        self.counters["match_hits"] += plan.blocks
        return plan

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise BadRequest("this client was made before a fork: make one in the process that uses it")

    def _is_here(self, plan: HitPlan, holder: str) -> bool:
        member = plan.holders.get(holder)
        return member is None or self.members.here(member)  # Redis: read through a worker of this host, mostly

    def _chain(self, spec: ModelSpec, prefix: Chain | Tokens) -> Chain:
        self._check_process()
        if not isinstance(prefix, Chain):
            return chain(spec, prefix)
        if prefix.spec != spec:
            raise BadRequest("the chain is of another model spec: make it from this one")
        return prefix

    def _shards(self, spec: ModelSpec, shards: Sequence[Shard] | None) -> tuple[Shard, ...]:
        if shards is None:
            return tuple(Shard.whole(spec, group) for group in range(len(spec.groups)))
        if not shards:
            raise BadRequest("no shard is asked for: name at least one")
        for shard in shards:
            shard.check(spec)
        return tuple(shards)

    # --- get -------------------------------------------------------------------------------------------------------

    async def get(
        self,
        plan: HitPlan,
        into: Buffers | None = None,
        *,
        first: int = 0,
        layers: range | None = None,
        planes: int = 0,
        on_layer: Callable[[LayerReady], object] | None = None,
        timeout_s: float | None = None,
    ) -> GetResult:
        """Deliver the plan's blocks from depth `first` on into `into[shard][depth]`, or into new numpy uint8 arrays.

        `layers`: only these of the model; a block's memory has their bytes then. `planes`: only so many leading planes
        of nested blocks, if the plan's `least` accepts what they are worth; 0: all. `on_layer` is called in this loop
        for each layer, in order, as soon as all blocks have it; what was told stands, but only the result says which
        blocks came whole. Every retry is within one deadline; what is not there by then is a miss. Nobody writes to the
        buffers after this has returned. UsageError for buffers that do not fit.
        """
        self._check_process()
        timeout_s = self.config.get_timeout_s if timeout_s is None else timeout_s
        ready, needs, whole = preparing(plan, into, first, layers, planes), list[Need](), False
        end = self.system.clock.monotonic() + timeout_s * (1 - SETTLE_SHARE)
        try:
            async with asyncio.timeout(timeout_s):
                if layers is None and on_layer is None and not planes and not self.config.verify_memory:
                    whole = await self._direct.get(plan, first, end, ready)
                if not whole:
                    needs = missing(plan, ready(), layers)
                if needs:
                    await self._fetch(plan, needs, first, layers, planes, on_layer, end).run()
        except TimeoutError:
            self.counters["errors_DeadlineExceeded"] += 1
            needs = needs or missing(plan, ready(), layers)
        result = ready()
        if result.wanted:
            conclude(plan, result, needs, first, self.counters)
        return result

    def _fetch(
        self, plan: HitPlan, needs: Sequence[Need], first: int, layers: range | None, planes: int,
        on_layer: Callable[[LayerReady], object] | None, end: float,
    ) -> Fetch:  # fmt: skip
        return Fetch(
            plan,
            self.namespace,
            needs,
            links=self._links,
            system=self.system,
            config=self.config,
            failed=self._failed,
            sockets=self.members.sockets(),
            addresses=list(self.members.takers().values()),
            counters=self.counters,
            end=end,
            layers=layers,
            planes=planes,
            rates=self.rates,
            progress=None if on_layer is None else Progress(plan, needs, first, on_layer),
        )

    def layers(self, plan: HitPlan, into: Buffers | None = None, **options: Any) -> LayerStream:
        """`get` with its options, layer by layer: `async with client.layers(plan, into) as coming`, then `async for
        ready in coming`, then `await coming.result()`. Left early, the rest is given up."""
        return LayerStream(lambda on_layer: self.get(plan, into, on_layer=on_layer, **options))

    async def score(
        self,
        spec: ModelSpec,
        prefix: Chain | Tokens,
        candidates: Iterable[str] = (),
        shards: Sequence[Shard] | None = None,
        least: Fidelity = Fidelity.EXACT,
        *,
        timeout_s: float | None = None,
    ) -> Scores:
        """How much of a prompt each candidate (an engine that announces its cache, or a worker; none: all of them) has
        at hand, for a router. One round trip. No answer: no replicas."""
        keys = self._chain(spec, prefix).keys[:KEYS_MAX]
        request = request_of(spec, keys, self._shards(spec, shards), least, candidates)
        try:
            reply = await self.coordinators.call(
                COORDINATOR["Score"], request, timeout_s=self.config.match_timeout_s if timeout_s is None else timeout_s
            )
            self.coordinators.learn(reply.coordinators)
            return scores_of(reply, spec, len(keys))
        except KVStoreError as error:
            self.counters[f"errors_{type(error).__name__}"] += 1
            return Scores()

    async def prefetch(self, plan: HitPlan, *, first: int = 0, timeout_s: float | None = None) -> int:
        """Have the plan's blocks from depth `first` on in the memory of this host's worker: up from its slower tiers,
        or pulled from the workers that hold them. How many (stored shard, block) pairs are ready; nothing keeps them
        there (see `pin`)."""
        timeout_s = self.config.get_timeout_s if timeout_s is None else timeout_s
        return await self._prefetcher.prefetch(plan, first=first, timeout_s=timeout_s)

    async def hint(self, spec: ModelSpec, prefix: Chain | Tokens, hint: Hint = NO_HINT, **options: Any) -> int:
        """Tell the workers what is known of a prompt; options (use, shards, timeout_s) as of `Hinter.hint`."""
        return await self._hinter.hint(self._chain(spec, prefix), hint, **options)

    # --- pin -------------------------------------------------------------------------------------------------------

    async def pin(self, plan: HitPlan, *, first: int = 0, ttl_s: float = PIN_S, timeout_s: float | None = None) -> Pin:
        """Keep the plan's blocks from depth `first` on where they are, for whoever reads them within `ttl_s`. Fewer,
        or none, where a worker does not answer or a bound is reached."""
        timeout_s = self.config.match_timeout_s if timeout_s is None else timeout_s
        return await self._pinner.pin(plan, first=first, ttl_s=ttl_s, timeout_s=timeout_s)

    async def renew(self, pin: Pin, *, ttl_s: float = PIN_S, timeout_s: float | None = None) -> bool:
        """Whether all of the pin was still there; it lives on for `ttl_s`."""
        timeout_s = self.config.match_timeout_s if timeout_s is None else timeout_s
        return await self._pinner.renew(pin, ttl_s=ttl_s, timeout_s=timeout_s)

    async def unpin(self, *pins: Pin, timeout_s: float | None = None) -> None:
        """Idempotent; also another process's pins. What can't be told ends by itself."""
        timeout_s = self.config.match_timeout_s if timeout_s is None else timeout_s
        await self._pinner.unpin(pins, timeout_s=timeout_s)

    # --- put -------------------------------------------------------------------------------------------------------

    async def put(
        self,
        spec: ModelSpec,
        prefix: Chain,
        blocks: Sequence[Any],
        first: int = 0,
        shard: Shard | None = None,
        computed_on: Fidelity = Fidelity.EXACT,
        *,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Store raw blocks (canonical order, `block_bytes` each) of one shard at depths `first`.. of a chain.

        `shard` None: the whole of group 0. `computed_on`: the worst fidelity of the prefix they were computed on. On
        this host's worker, else on the one the placement group belongs to; what nobody takes is "dropped".
        """
        chained = self._chain(spec, prefix)
        shard = self._shards(spec, None if shard is None else [shard])[0]
        if first < 0 or first + len(blocks) > len(chained):
            raise BadRequest(f"blocks {first}..{first + len(blocks) - 1} are not in a chain of {len(chained)}")
        size = block_bytes(spec, shard)
        raws = [_readable(block, size) for block in blocks]
        timeout_s = self.config.put_timeout_s if timeout_s is None else timeout_s
        result = await self._putter.put(chained, raws, first, shard, computed_on, timeout_s=timeout_s)
        if len(self._failed):
            for token in result.tokens:
                for depth in range(first, first + len(blocks)):
                    self._failed.discard((token.worker, shard.digest, chained.keys[depth]))
        return result

    # --- looking after it ------------------------------------------------------------------------------------------

    async def purge(self, spec: ModelSpec | None = None, *, timeout_s: float | None = None) -> int:
        """Drop a model's blocks (None: all) of this namespace on every worker that answers; how many."""
        timeout_s = self.config.put_timeout_s if timeout_s is None else timeout_s
        return await self._purger.purge(b"" if spec is None else spec.root, timeout_s)

    async def cluster_status(self) -> dict[str, Any]:
        """What `kvstore status --json` prints."""
        addresses = self.coordinators.addresses
        observer = Observer(self._transport, self._credentials, self.config.match_timeout_s)
        return status_object(await look(observer, addresses), addresses)


def _readable(buffer: Any, size: int) -> memoryview:
    view = buffer_of(buffer)
    if view.nbytes != size:
        raise BadRequest(f"a buffer of {view.nbytes} bytes was given: a block of this shard is {size}")
    return view


__all__ = ["Corrupt", "GetResult", "KVClient", "KVStoreError", "LayerReady", "PutResult", "delivered_blocks"]
