"""The use cases of the image side. Packages are seen through their interfaces only.

    pull  layers  downloads    resolve -> verify -> documents -> layers -> publish; one flight per layer, one download per blob
    push                       and back
    choosing                   which image of an index this platform runs
    records  leases            stored images and their names; what must not be collected
    rootfs  mounts             containers' root file systems; images on directories
    upkeep/                    collection, checking and repairing, disk use
    mirror/                    the store as a registry for others; a cache of other registries
    telemetry/                 metrics, events, and the observer that feeds them
    archive/  prepull/  verification/

Start with pull.py, then layers.py.
"""
