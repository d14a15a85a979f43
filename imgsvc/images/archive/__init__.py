"""Images to and from files: OCI image layouts and Docker archives, as tar streams.

    reading   a hostile tar stream → blobs in the content store and the images it names
    source    those images as a Registry, so that an import ends in the same unpack and publish as a pull
    writing   images → one tar that is an OCI layout and a Docker archive at once

Decisions, and what they cost:

* Blobs go into the content store while the stream is read, nothing is spooled and no order is asked for. An archive
  that turns out to be useless leaves unreferenced blobs; the next collection removes them.
* What we write carries `index.json` and `manifest.json` over the same blobs, so that Docker, Podman, containerd and
  skopeo read one file. Layers stay compressed as they were pulled: digests survive the trip.
* An export holds the manifest of this node's platform, not the index it was chosen from: a layout that lists manifests
  it does not contain is refused by some readers.

Source: OCI image-spec image-layout.md; Docker image-spec v1.2 (manifest.json); GHSA-259w-8hf6-59c2.
"""
