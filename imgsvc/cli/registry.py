"""hosts explain|check: which endpoints a pull would ask, and whether they answer. Needs no daemon."""

from __future__ import annotations

import argparse
import asyncio
import os

from imgsvc import config
from imgsvc.cli import usage
from imgsvc.cli.output import print_json


def hosts_arguments(parser: argparse.ArgumentParser) -> None:
    """`imgsvc hosts`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    explain = actions.add_parser("explain", help="print the endpoints of an image in order, and why; sends no request")
    explain.add_argument("reference", metavar="REF", type=usage.reference)
    explain.set_defaults(run=run_explain)
    check = actions.add_parser("check", help="really ask each endpoint; without REF, those of every configured registry")
    check.add_argument("reference", nargs="?", metavar="REF", type=usage.reference)
    check.add_argument("--creds", type=usage.credentials, metavar="USER:PASSWORD", help="credentials for the registry of REF")
    check.set_defaults(run=run_check)
    for action in (explain, check):
        usage.add_config(action)
        action.add_argument("--json", action="store_true")


def run_explain(arguments: argparse.Namespace) -> int:
    """`imgsvc hosts explain`: 1 when a pull would fail before its first request."""
    from imgsvc.daemon.settings.registry import open_registries
    from imgsvc.registry.hosts.explain import explain, render

    registries = open_registries(config.load(arguments.config))
    explanation = explain(registries.client.directories, registries.credentials, arguments.reference, os.environ)
    if arguments.json:
        print_json({**explanation.to_json(), "deprecations": list(registries.warnings)})
    else:
        print("\n".join([*render(explanation), *(f"  warning: {warning}" for warning in registries.warnings)]))
    return 1 if explanation.problem else 0


def run_check(arguments: argparse.Namespace) -> int:
    """`imgsvc hosts check`: 1 when an endpoint does not do."""
    return asyncio.run(_check(arguments))


async def _check(arguments: argparse.Namespace) -> int:
    from imgsvc.daemon.settings.registry import open_registries
    from imgsvc.registry.check import check, check_namespace, render
    from imgsvc.registry.interfaces import Credential

    registries = open_registries(config.load(arguments.config))
    results, unasked = [], []
    try:
        if arguments.reference:
            credential = Credential("command line", *arguments.creds) if arguments.creds else None
            results = await check(registries.client, arguments.reference, credential)
        else:
            for namespace, prefix in registries.client.directories.namespaces():
                results += await check_namespace(registries.client, namespace, prefix)
            unasked = registries.client.directories.patterns()
    finally:
        await registries.client.close()
    if arguments.json:
        print_json([result.to_json() for result in results])
    else:
        lines = [*render(results), *(f"{path}: not asked (it applies to more than one registry; name an image of one)" for path in unasked)]
        print("\n".join(lines or ["no registry is configured; name an image to check its registry"]))
    return 0 if all(result.ok for result in results) else 1
