"""[decrypt] and [stream_processors] as the decrypt package takes them. The edge: configuration knows no packages."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from imgsvc.base.errors import ImgsvcError, InvalidArgument, from_os_error
from imgsvc.config import Config, Loaded
from imgsvc.decrypt.authorise import load_salt
from imgsvc.decrypt.decryptor import Settings
from imgsvc.decrypt.keyprovider import load_providers
from imgsvc.decrypt.processors import BadProcessor, Processor, check_processors

log = logging.getLogger(__name__)


def check(loaded: Loaded) -> Loaded:
    """The configuration, when its stream processors can work. Raises: InvalidArgument with file:line of the bad entry."""
    try:
        check_processors(_processors(loaded.config))
    except BadProcessor as error:
        where = loaded.origins.get(f"stream_processors.{error.processor}", "stream_processors")
        raise InvalidArgument(f"{error.where}: {error.what}", where=where, hint=error.hint) from error
    return loaded


def provider_problem(config: Config) -> str:
    """What is wrong with the key providers' file; "" when nothing is. The daemon works without: other keys still open."""
    try:
        load_providers(_provider_config(config))
    except ImgsvcError as error:
        return str(error)
    return ""


def settings(config: Config, root: Path) -> Settings:
    """How this node decrypts. Blocking. Raises: ImgsvcError when a file named in [decrypt] cannot be read."""
    if problem := provider_problem(config):
        log.warning("key providers are off: %s", problem)
    decrypt = config.decrypt
    return Settings(
        keys_path=Path(decrypt.keys_path) if decrypt.keys_path else None,
        salt=load_salt(root / "salt"),
        key_model=decrypt.key_model,
        password_files={name: Path(file) for name, file in decrypt.passwords.items()},
        keyprovider_config=_provider_config(config),
        ocicrypt_config=decrypt.ocicrypt_config or os.environ.get("OCICRYPT_CONFIG", ""),
        provider_parameters={name: (_parameter(name, file),) for name, file in decrypt.provider_parameters.items()},
        processors=_processors(config),
    )


def _processors(config: Config) -> tuple[Processor, ...]:
    return tuple(Processor(name, p.accepts, p.returns, p.path, p.args, p.env) for name, p in config.stream_processors.items())


def _provider_config(config: Config) -> Path | None:
    named = config.decrypt.keyprovider_config or os.environ.get("OCICRYPT_KEYPROVIDER_CONFIG", "")
    return Path(named) if named else None


def _parameter(provider: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise from_os_error(error, "cannot read the parameter", where=f"decrypt.provider_parameters.{provider}: {file}") from error
