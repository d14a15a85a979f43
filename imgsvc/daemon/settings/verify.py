"""[verify] as the verification of images takes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from imgsvc.base.concurrency import Threads
from imgsvc.base.metadb.database import MetaDB
from imgsvc.config import Config, Loaded
from imgsvc.images.verification.policy import Policy, load_policy
from imgsvc.images.verification.programs import Programs
from imgsvc.images.verification.service import Verification
from imgsvc.images.verification.signatures import Signatures
from imgsvc.registry.interfaces import Registry


def open_verification(settings: Config, registry: Registry, db: MetaDB, threads: Threads) -> Verification:
    """Build it. Raises: InvalidArgument, NotFound for a policy that cannot be used: a daemon without it would allow every image."""
    policy, programs = _judges(settings, threads)
    return Verification(
        policy=policy,
        programs=programs,
        signatures=Signatures(registry),
        db=db,
        threads=threads,
        fail_closed=settings.verify.fail_closed,
    )


def prepare(verification: Verification, threads: Threads, loaded: Loaded) -> Callable[[], None]:
    """What puts other settings in force. Raises: as open_verification."""
    policy, programs = _judges(loaded.config, threads)
    return partial(verification.go_by, policy, programs, fail_closed=loaded.config.verify.fail_closed)


def _judges(settings: Config, threads: Threads) -> tuple[Callable[[], Policy] | None, Programs]:
    verify = settings.verify
    programs = Programs(Path(verify.bin_dir), verify.max_verifiers, verify.per_verifier_timeout, threads)
    if not verify.policy:
        return None, programs
    policy = Path(verify.policy)
    load_policy(policy)
    return partial(load_policy, policy), programs
