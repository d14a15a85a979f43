"""The `imgsvc` command: one module per group of commands, one parser here.

    main        parser, exit codes, error lines         serve     the daemon
    client      finding and calling the daemon          images    pull, images, inspect, rmi, tag
    config      config default|dump|check|import    registry  hosts explain|check
    store       df, gc, fsck                            output    tables, JSON
    archives    export, import                          prepull   many images, the daemon's files
    events      what happens to images            progress  the live display of a pull
    usage       what may be typed

Exit code 0 done, 1 failed, 2 wrong usage. Heavy imports (gRPC, httpx) happen inside the commands that need them.
"""

from imgsvc.cli.main import main

__all__ = ["main"]
