"""Pods and containers: the CRI RuntimeService.

    service, convert           the gRPC servicer: protobuf <-> the dataclasses of model; no decisions
    sandboxes, containers      the use cases: life of a pod, life of a container, undone at every step that fails
    checkpoint, recovery       a running container's state in an archive; what a restarted daemon does with what it finds
    model, state, records      what CRI asks for; what state a record is in (derived, never stored); versioned records
    interfaces, core           the seams (Images, OCIRuntime, NetworkPlugin); what the use cases share
    spec/                      CRI request + image -> OCI runtime specification
    handlers/                  what runs containers: an OCI runtime's command, or containerd shims
    holder/                    what holds a pod while none of its containers runs
    network/                   CNI
    nri/                       plugins that watch and change pods and containers
    numbers/                   statistics, metrics, limits of a pod
    processes/                 short programs, ends of processes, orphans
    streaming/                 exec, attach, port-forward
    rootfs, podfiles, logs     mounts of a bundle; files a pod's containers share; log files
    events, signals, host, settings, node

Decisions, and what they cost:

* No pause container. Namespaces are pinned by bind mounts in STATE/sandboxes/ID/ns; only a shared PID namespace has a
  process (holder/pause.py, some 200 bytes). Cost: nothing tells a lost namespace but a check of the mount.
* One conmon per container keeps stdio, log and exit code while the daemon is away. Cost: 0.3 MiB each.
* A record is written before the first thing it describes is made, and deleted after the last is gone; so a crash leaves
  a record too many, never a thing without a record.
* States are derived from timestamps and the exit code. Nothing can disagree.
"""
