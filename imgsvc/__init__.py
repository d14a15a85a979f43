"""imgsvc: the image service of a Kubernetes node, with a compact runtime on top.

Start reading at docs/architecture.md. Imports point down only::

    edge        server, pods, care, cli, image_service, admin_service, decryption, rpc, notify, logs   name concrete classes
    edge        image_side, image_tools, registries, offline, ownership, preflight, reload
    use cases   pull, choosing, push, layers, blobs, images, leases           see packages through their interfaces only
    use cases   documents, provenance, gc, gc_sources, fsck, df, roots, mounts
    use cases   archive, verification, mirror, pullthrough, prepull, config_import, observe
    packages    registry, content, snapshot, decrypt, runtime              never import one another
    base        errors, oci, reference, config, tomlfile, yamlfile, fsutil, concurrency, metadb, lmdbcheck, failpoints, cosign, metrics
    base        events, http1, children, tracing, kernel, confinement, places, procfs, removal, numerals
    leaf        api                                 generated gRPC stubs

tests/test_layering.py holds these lines.
"""

__version__ = "0.1.0"
