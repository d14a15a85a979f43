"""The `imgsvc` command: one module per group of commands, one parser here.

    main        parser, exit codes, error lines         serve     the daemon
    client      finding and calling the daemon          images    pull, images, inspect, rmi, tag
    config      config default|dump|check|import    registry  hosts explain|check
    store       df, gc, fsck                            output    tables, JSON
    archives    export, import                          prepull   many images, the daemon's files
    events      what happens to images            progress  the live display of a pull
    usage       what may be typed

Exit code 0 done, 1 failed, 2 wrong usage. A new command is a row of main.COMMANDS and two functions in the module of its
group. Only the module of the command that runs is imported, and heavy packages (gRPC, asyncio) only where they are used.
"""

from imgsvc.cli.main import main

__all__ = ["main"]
