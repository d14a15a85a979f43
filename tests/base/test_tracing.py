"""From the metadata of a CRI call to the registry's request."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from imgsvc.api import cri_pb2, cri_pb2_grpc
from imgsvc.base import tracing
from imgsvc.base.reference import Reference
from imgsvc.daemon.rpc import ErrorInterceptor
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import client_for, hosts_d, image_of, run

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    "value", ["", "00-x", PARENT.upper(), f"{PARENT}\r\nX: y", PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), b"x"]
)
def test_what_is_not_well_formed_is_dropped(value: str | bytes) -> None:
    tracing.enter([(tracing.HEADER, value)])
    assert tracing.parent() == ""


def test_a_pull_belongs_to_the_trace_of_its_call_and_tells_no_other_host(tmp_path: Path) -> None:
    async def main() -> None:
        with FakeRegistry() as fake, FakeRegistry() as other:
            fake.add(image_of(), "app")
            fake.rule(fake.on("/app2/", Reply(307, {"Location": f"{other.url}/v2/app/manifests/latest"})))
            hosts_d(tmp_path, {})

            class Service(cri_pb2_grpc.ImageServiceServicer):
                async def PullImage(self, request: cri_pb2.PullImageRequest, context: object) -> cri_pb2.PullImageResponse:
                    async with client_for(tmp_path) as client:
                        found = await client.resolve(Reference.parse(f"{fake.address}/app"))
                        with pytest.raises(Exception, match="404"):
                            await client.resolve(Reference.parse(f"{fake.address}/app2"))
                    return cri_pb2.PullImageResponse(image_ref=str(found.descriptor.digest))

            server = grpc.aio.server(interceptors=[ErrorInterceptor()])
            cri_pb2_grpc.add_ImageServiceServicer_to_server(Service(), server)  # type: ignore[abstract]  # one method will do
            server.add_insecure_port(f"unix://{tmp_path}/sock")
            await server.start()
            async with grpc.aio.insecure_channel(f"unix://{tmp_path}/sock") as channel:
                stub = cri_pb2_grpc.ImageServiceStub(channel)
                await stub.PullImage(cri_pb2.PullImageRequest(), metadata=((tracing.HEADER, PARENT),))
                await stub.PullImage(cri_pb2.PullImageRequest())
            await server.stop(None)
            assert [r.headers.get(tracing.HEADER) for r in fake.seen("/app/")] == [PARENT, None]
            assert other.requests
            assert not any(tracing.HEADER in r.headers for r in other.requests)

    run(main())
