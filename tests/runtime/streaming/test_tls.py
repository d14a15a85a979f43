from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from imgsvc.base.errors import InvalidArgument
from imgsvc.runtime.settings import StreamSettings
from imgsvc.runtime.streaming.server import StreamServer
from tests.runtime.streaming.targets import ALL, ScriptedTarget, echo
from tests.runtime.streaming.test_server import serving
from tests.support.stream_client import spdy_session, upgrade


def write_pair(directory: Path, name: str) -> StreamSettings:
    """A self-signed certificate for a common name, in the files that StreamSettings name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now - day, now + day)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (directory / "cert.pem").write_bytes(pem)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(private)
    return StreamSettings(tls_cert_file=str(directory / "cert.pem"), tls_key_file=str(directory / "key.pem"))


def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def presented_name(server: StreamServer) -> str:
    _, _, writer = await upgrade(server.exec_url(ScriptedTarget(echo), ALL), {}, tls=trusting())
    certificate = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    writer.close()
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def test_a_session_over_tls(tmp_path: Path) -> None:
    config = write_pair(tmp_path, "one")
    sent = bytes(3_000_000)

    async def scenario() -> None:
        async with serving(config) as server:
            url = server.exec_url(ScriptedTarget(echo), ALL)
            assert url.startswith("https://127.0.0.1:")
            async with spdy_session(url, tls=trusting()) as client:
                ids = [await client.open({"streamtype": role}) for role in ("error", "stdin", "stdout", "stderr")]
                await client.write(ids[1], sent, fin=True)
                await client.until(lambda s: s.ended >= set(ids))
                assert client.state.received[ids[2]] == sent

    asyncio.run(scenario())


def test_a_replaced_certificate_is_used_without_restart(tmp_path: Path) -> None:
    config = write_pair(tmp_path, "one")

    async def scenario() -> None:
        async with serving(config) as server:
            assert await presented_name(server) == "one"
            write_pair(tmp_path, "two")
            await server.reload_certificate()
            assert await presented_name(server) == "two"

    asyncio.run(scenario())


def test_a_broken_replacement_leaves_the_old_one_in_use(tmp_path: Path) -> None:
    config = write_pair(tmp_path, "one")

    async def scenario() -> None:
        async with serving(config) as server:
            key = Path(config.tls_key_file).read_bytes()
            write_pair(tmp_path, "two")
            Path(config.tls_key_file).write_bytes(key)  # the key of the old certificate
            with pytest.raises(InvalidArgument) as caught:
                await server.reload_certificate()
            assert config.tls_cert_file in caught.value.where
            assert await presented_name(server) == "one"

    asyncio.run(scenario())


def test_missing_files_are_named(tmp_path: Path) -> None:
    config = StreamSettings(tls_cert_file=str(tmp_path / "none.pem"), tls_key_file=str(tmp_path / "none.key"))
    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(StreamServer(config).start())
    assert "none.pem" in caught.value.where


def test_plain_http_on_the_tls_port_is_turned_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(write_pair(tmp_path, "one")) as server:
            url = server.exec_url(ScriptedTarget(echo), ALL).replace("https://", "http://")
            with pytest.raises(asyncio.IncompleteReadError):
                await upgrade(url, {})

    asyncio.run(scenario())
