"""imgsvc: the image service of a Kubernetes node, with a compact runtime on top.

Each directory is a layer; imports point down only (tests/test_layering.py)::

    cli/         the `imgsvc` command
    daemon/      the process that serves the socket: build, listen, settings of each package, gRPC services, reload
    images/      the use cases: pull, push, layers, records, leases, upkeep, mirror, archives, pre-pull, verification
    registry/  content/  snapshot/  decrypt/  runtime/      the five packages; none knows another
    config/      the configuration file, and containerd's turned into ours
    base/        errors, digests, references, threads, files, the kernel, the metadata database
    api/         generated gRPC stubs

A newcomer reads docs/architecture.md, then images/pull.py and images/layers.py, the packages' interfaces.py, and
daemon/build.py, where every object is made.
"""

__version__ = "0.1.0"
