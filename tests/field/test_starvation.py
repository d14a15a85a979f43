"""What one registry, identity or image does leaves others their share."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgsvc.reference import Reference
from imgsvc.registry.interfaces import Credential, PullFailed
from imgsvc.registry.retry import Health
from tests.fakes.registry import FakeRegistry, Reply
from tests.registry.support import client_for, hosts_d, image_of, run

APP = Reference.parse("docker.io/library/app")
ALICE = Credential("CRI request", "alice", "secret")


def test_S9_an_anonymous_limit_closes_the_registry_for_the_anonymous_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with client_for(tmp_path) as client:
            with pytest.raises(PullFailed) as limited:
                await client.resolve(APP)
            assert limited.value.code == "RESOURCE_EXHAUSTED"
            assert (await client.resolve(APP, ALICE)).descriptor
            asked = len(fake.requests)
            with pytest.raises(PullFailed, match="rate limited"):
                await client.resolve(Reference.parse("docker.io/library/other"))
            assert len(fake.requests) == asked, "the limit of the anonymous holds for their other repositories"

    with FakeRegistry() as fake:
        hosts_d(tmp_path, {"docker.io": f'fallback = false\n[host."{fake.url}"]\ncredentials = "namespace"\n'})
        fake.add(image_of(), "library/app")
        challenge = {"WWW-Authenticate": "Basic realm=r"}
        limit = Reply(429, {"Retry-After": "3600", **challenge})
        fake.rule(lambda r: None if r.authorization else limit if len(fake.seen("/manifests/")) == 1 else Reply(401, challenge))
        run(main())


@pytest.mark.parametrize("wait", [3600.0, 299.0])
def test_S9_a_long_limit_lets_a_probe_through_and_ends_with_its_success(wait: float) -> None:
    health = Health()
    health.limited(0, wait, "")
    assert health.parked_for(0, "") <= 300
    assert "rate limited" in health.refusal(59, "", is_last=True)
    assert not health.refusal(61, "", is_last=True), "the probe"
    assert "rate limited" in health.refusal(62, "", is_last=True), "one"
    health.served("")
    assert not health.refusal(63, "", is_last=True)


def test_S9_an_answer_to_an_earlier_request_does_not_end_a_limit() -> None:
    health = Health()
    health.limited(0, 30, "")
    health.served("")
    assert health.parked_for(1, "") == 29


def test_S9_the_retries_of_one_identity_are_not_anothers() -> None:
    health = Health()
    while health.take_retry(0, "eve"):
        pass
    assert health.take_retry(0, "alice")
