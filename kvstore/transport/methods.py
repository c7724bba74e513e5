"""The calls of proto/ as a table: one source for servers, clients and the simulator."""

from __future__ import annotations

from kvstore.transport.base import Method
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2

PROTOCOL_VERSION = 1
CAPABILITIES = (
    "get.v1",
    "put.v1",
    "local.v1",
    "announce.v1",
    "release.v1",
    "purge.model.v1",
    "watch.v1",
    "score.v1",
    "data.v1",
    "rows.v1",
)

COORDINATOR = {
    m.name: m
    for m in (
        Method("Coordinator", "Hello", common_pb2.HelloRequest, common_pb2.HelloReply),
        Method("Coordinator", "Match", common_pb2.MatchRequest, common_pb2.MatchReply),
        Method("Coordinator", "Score", coordinator_pb2.ScoreRequest, coordinator_pb2.ScoreReply),
        Method("Coordinator", "Members", coordinator_pb2.MembersRequest, coordinator_pb2.MembersReply),
        Method("Coordinator", "Status", common_pb2.StatusRequest, coordinator_pb2.CoordinatorStatus),
        Method(
            "Coordinator", "Watch", coordinator_pb2.WatchRequest, coordinator_pb2.WatchReply, False, True, lasting=True
        ),
        Method(
            "Coordinator", "Announce", coordinator_pb2.AnnounceRequest, coordinator_pb2.AnnounceReply, True, True, True
        ),
    )
}

WORKER = {
    m.name: m
    for m in (
        Method("Worker", "Hello", common_pb2.HelloRequest, common_pb2.HelloReply),
        Method("Worker", "Match", common_pb2.MatchRequest, common_pb2.MatchReply),
        Method("Worker", "Get", worker_pb2.GetRequest, None, server_stream=True),
        Method("Worker", "Put", None, worker_pb2.PutReply, client_stream=True),
        Method("Worker", "Purge", worker_pb2.PurgeRequest, worker_pb2.PurgeReply),
        Method("Worker", "Status", common_pb2.StatusRequest, common_pb2.WorkerStatus),
        Method("Worker", "Probe", worker_pb2.ProbeRequest, worker_pb2.ProbeReply),
        Method("Worker", "Inspect", worker_pb2.InspectRequest, worker_pb2.InspectReply),
        Method("Worker", "Pin", worker_pb2.PinRequest, worker_pb2.PinReply),
        Method("Worker", "Renew", worker_pb2.RenewRequest, worker_pb2.RenewReply),
        Method("Worker", "Unpin", worker_pb2.UnpinRequest, worker_pb2.UnpinReply),
        Method("Worker", "Hint", worker_pb2.HintRequest, worker_pb2.HintReply),
        Method("Worker", "Prefetch", worker_pb2.PrefetchRequest, worker_pb2.PrefetchReply),
        Method("Worker", "Pull", worker_pb2.PullRequest, worker_pb2.PullReply),
        Method("Worker", "Drain", worker_pb2.DrainRequest, worker_pb2.DrainReply),
        Method("Worker", "Data", worker_pb2.DataRequest, worker_pb2.DataReply),
    )
}

WORKER_LOCAL = {
    m.name: m
    for m in (
        Method("WorkerLocal", "Hello", worker_pb2.LocalHelloRequest, common_pb2.HelloReply),
        Method("WorkerLocal", "Match", common_pb2.MatchRequest, common_pb2.MatchReply),
        Method("WorkerLocal", "Open", worker_pb2.OpenRequest, worker_pb2.OpenReply),
        Method("WorkerLocal", "Release", worker_pb2.ReleaseRequest, worker_pb2.ReleaseReply),
        Method("WorkerLocal", "Stage", worker_pb2.StageRequest, worker_pb2.StageReply),
        Method("WorkerLocal", "Commit", worker_pb2.CommitRequest, worker_pb2.PutReply),
        Method("WorkerLocal", "Pin", worker_pb2.PinRequest, worker_pb2.PinReply),
        Method("WorkerLocal", "Renew", worker_pb2.RenewRequest, worker_pb2.RenewReply),
        Method("WorkerLocal", "Unpin", worker_pb2.UnpinRequest, worker_pb2.UnpinReply),
        Method("WorkerLocal", "Hint", worker_pb2.HintRequest, worker_pb2.HintReply),
        Method("WorkerLocal", "Prefetch", worker_pb2.PrefetchRequest, worker_pb2.PrefetchReply),
    )
}

SERVICES = {"Coordinator": COORDINATOR, "Worker": WORKER, "WorkerLocal": WORKER_LOCAL}
