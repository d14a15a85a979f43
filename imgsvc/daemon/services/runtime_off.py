"""The CRI RuntimeService of a daemon without a runtime."""

from __future__ import annotations

from typing import Any

from imgsvc import __version__
from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.runtime.service import API_VERSION, RUNTIME_NAME


class RuntimeOff(cri_pb2_grpc.RuntimeServiceServicer):
    """Serves Version and a truthful Status where there is no runtime; everything else is UNIMPLEMENTED."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def Version(self, request: cri_pb2.VersionRequest, context: Any) -> cri_pb2.VersionResponse:
        """Who we are; CRI clients ask before anything else."""
        return cri_pb2.VersionResponse(
            version="0.1.0", runtime_name=RUNTIME_NAME, runtime_version=__version__, runtime_api_version=API_VERSION
        )

    async def Status(self, request: cri_pb2.StatusRequest, context: Any) -> cri_pb2.StatusResponse:
        """Not ready, and why."""
        conditions = [
            cri_pb2.RuntimeCondition(type=kind, status=False, reason="RuntimeOff", message=self._reason)
            for kind in ("RuntimeReady", "NetworkReady")
        ]
        return cri_pb2.StatusResponse(status=cri_pb2.RuntimeStatus(conditions=conditions))
