from __future__ import annotations

from pathlib import Path

from imgsvc.api import cri_pb2, cri_pb2_grpc, keyprovider_pb2_grpc, ttrpc_pb2
from tests.support import genapi


def generated(api: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in api.glob("*_pb2*.py*")}


def test_generating_again_changes_nothing(tmp_path: Path) -> None:
    genapi.generate(tmp_path)
    assert generated(tmp_path / "imgsvc" / "api") == generated(genapi.API)


def test_service_names_are_the_wire_contract() -> None:
    services = cri_pb2.DESCRIPTOR.services_by_name
    assert {s.full_name for s in services.values()} == {"runtime.v1.RuntimeService", "runtime.v1.ImageService"}
    assert len(services["RuntimeService"].methods) == 37
    assert len(services["ImageService"].methods) == 6
    assert hasattr(cri_pb2_grpc, "RuntimeServiceServicer")
    assert hasattr(keyprovider_pb2_grpc, "KeyProviderServiceStub")


def test_fields_of_a_newer_client_survive_a_round_trip() -> None:
    newer = ttrpc_pb2.KeyValue(key="k", value="v").SerializeToString() + b"\xfa\x3e\x03new"  # field 1007
    assert ttrpc_pb2.KeyValue.FromString(newer).SerializeToString() == newer
