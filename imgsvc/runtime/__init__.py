"""Pods and containers: the CRI RuntimeService.

::

    service, convert      the gRPC servicer: protobuf <-> the dataclasses of model; no decisions
    sandboxes, containers the use cases: life of a pod, life of a container, rollback at every step
    stats, metrics, events
                          numbers for the kubelet; fan-out of container events
    checkpoint, criu      a running container's state in an archive; whether criu works here
    holder                what holds a pod beyond its namespaces: a pause process, or its shim
    recovery              what a restarted daemon, or a rebooted node, does with what it finds
    ---------------------------------------------------------------------------------------------
    model, state, records what CRI asks for; what state a record is in (derived, never stored); versioned records
    containerplan, spec, users, security, volumes, copyup, devices, cdi, rootfs, logs
                          CRI config + image config -> OCI runtime specification; hostile passwd files; mounts; log files
    oci_runtime, monitor  handler kind 1: an OCI CLI (runc, crun) under one conmon per container
    shim/                 handler kind 2: containerd shims (`io.containerd.NAME.vN`) over ttrpc
    cni, network          the CNI protocol; the pod network on top of it
    namespaces            namespaces pinned by bind mounts
    cgroups, podlimits, usage
                          drivers (cgroupfs, systemd), version 1 and 2; limits of a pod; what a cgroup has used
    oom                   kills for memory in cgroups that are gone already
    reaper, exits         orphans are ours (child subreaper); noticing the end of a process that is not our child
    interfaces            the seams: Images (from the edge), OCIRuntime, NetworkPlugin

Decisions, and what they cost:

* No pause container. Namespaces are pinned by bind mounts in STATE/sandboxes/ID/ns; only a shared PID namespace has a
  process (pause.py, some 200 bytes). Cost: nothing tells a lost namespace but a check of the mount.
* One conmon per container keeps stdio, log and exit code while the daemon is away. Cost: 0.3 MiB each.
* A record is written before the first thing it describes is made, and deleted after the last is gone; so a crash leaves
  a record too many, never a thing without a record.
* States are derived from timestamps and the exit code. Nothing can disagree.
"""
