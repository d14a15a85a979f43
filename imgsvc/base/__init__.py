"""What everything stands on; nothing here knows what an image service is for.

errors                     one class per gRPC category
oci  reference             digests, descriptors, manifests, configs; image names
concurrency  children      locks, flights, the hop to a thread; companion processes
fsutil  removal            durable files; the one way to remove a tree
kernel  procfs             system calls; what /proc says
confinement                what helper processes give up
metadb/                    the metadata database
tomlfile  yamlfile  http1  strict TOML, YAML of others, a small HTTP server
failpoints  tracing  numerals  places
"""
