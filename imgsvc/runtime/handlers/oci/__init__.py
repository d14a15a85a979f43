"""Handler kind 1: an OCI runtime's command.

handler          create, start, kill, delete, state
monitor          conmon: keeps stdio, writes the log, stores the exit code
exec  attach     sessions of the streaming server; child awaits their processes
execerror        a command that cannot be run, told from every other failure
criu             checkpoints
"""
