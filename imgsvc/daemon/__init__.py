"""The process behind the socket: the only place, with the CLI, that names concrete classes and knows the configuration.

main           run, signals, readiness
build          every object, from the bottom up
image_side     archives, mirror, metrics page, pre-pull, events
runtime_side   the runtime service, or why there is none
settings/      from the configuration to what each package takes
services/      protobuf <-> use cases
listen  rpc    the socket; errors -> gRPC status
ownership  preflight  reload  systemd  logs
"""
