"""The process behind the socket: the only place, with the CLI, that names concrete classes and knows the configuration.

main         run, signals, readiness, reload on SIGHUP
build        every object, from the bottom up: one function per side (store, registries, images, runtime, upkeep, tools)
settings/    from the configuration to what each package takes: registry, decrypt, runtime, snapshot, verify, upkeep
services/    protobuf <-> use cases
listen  rpc  the sockets; errors -> gRPC status
reload       which settings change while the daemon runs
preflight    what in the configuration will not work
background   tasks that run until the daemon stops
ownership  systemd  logs
"""
