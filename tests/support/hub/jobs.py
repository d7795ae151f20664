"""Jobs: what is asked for is remembered, and nothing runs; a job that is looked at has ended."""

from __future__ import annotations

import json
from typing import Any

from .access import check_write
from .routing import Call, Routes
from .store import HubError
from .wire import Response

routes = Routes()

# Of the client's own examples, with prices that are none of the Hub's.
HARDWARE = [
    {
        "name": "cpu-basic", "prettyName": "CPU Basic", "cpu": "2 vCPU", "ram": "16 GB",
        "ephemeralStorage": "20 GB", "accelerator": None, "unitCostMicroUSD": 1,
        "unitCostUSD": 0.000001, "unitLabel": "minute",
    },
]  # fmt: skip


@routes("GET", "/api/jobs/hardware")
def hardware(call: Call) -> Response:
    return Response.of_json(HARDWARE)


@routes("POST", "/api/jobs/{namespace}")
def start(call: Call) -> Response:
    user = check_write(call.user, call.args["namespace"])
    job = call.json()
    call.hub.jobs.append(job)
    job |= {"id": f"job{len(call.hub.jobs)}", "createdAt": "2024-01-01T00:00:00.000Z"}
    job["owner"] = {"id": f"user-{user.name}", "name": call.args["namespace"], "type": "user"}
    job["status"] = {"stage": "RUNNING", "message": None}
    return _shown(job)


@routes("GET", "/api/jobs/{namespace}")
def listed(call: Call) -> Response:
    check_write(call.user, call.args["namespace"])
    return call.page([json.loads(bytes(_shown(job).body)) for job in call.hub.jobs])


@routes("GET", "/api/jobs/{namespace}/{id}")
def inspect(call: Call) -> Response:
    job = _job(call)
    if job["status"]["stage"] == "RUNNING":
        job["status"] = {"stage": "COMPLETED", "message": None}
    return _shown(job)


@routes("GET", "/api/jobs/{namespace}/{id}/logs")
def logs(call: Call) -> Response:
    return _events({"timestamp": _job(call)["createdAt"], "data": "Merged 20 checkpoints."})


@routes("GET", "/api/jobs/{namespace}/{id}/metrics")
def metrics(call: Call) -> Response:
    _job(call)
    return _events(
        {
            "cpu_usage_pct": 99, "cpu_millicores": 2000, "memory_used_bytes": 10**9,
            "memory_total_bytes": 16 * 10**9, "rx_bps": 10**6, "tx_bps": 0, "gpus": {},
        }
    )  # fmt: skip


@routes("POST", "/api/jobs/{namespace}/{id}/cancel")
def cancel(call: Call) -> Response:
    _job(call)["status"] = {"stage": "CANCELED", "message": None}
    return Response.of_json({})


def _job(call: Call) -> dict[str, Any]:
    check_write(call.user, call.args["namespace"])
    for job in call.hub.jobs:
        if job["id"] == call.args["id"]:
            return job
    raise HubError(404, "No such job")


def _shown(job: dict[str, Any]) -> Response:
    """A job as its owner sees it: secrets have names only."""
    return Response.of_json({**job, "secrets": dict.fromkeys(job.get("secrets", {}), "")})


def _events(event: dict[str, Any]) -> Response:
    body = f"data: {json.dumps(event)}\n\n".encode()
    return Response(200, body, {"Content-Type": "text/event-stream"})
