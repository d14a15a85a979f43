"""Looking after the store.

service      all of this as one daemon runs it
collector    mark and sweep over nodes and edges; knows nothing of images
nodes        what the nodes are: blobs, snapshots, images, leases
fsck         checking and repairing
df           disk use, each byte counted once
"""
